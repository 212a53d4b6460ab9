// The kernels for 64-bit ARM processors with the dot product instructions.

#if defined(__aarch64__)
#define UNSPOOL_LEVEL dotprod
#define UNSPOOL_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#define UNSPOOL_DOTPROD
#define UNSPOOL_LINEAR products::linear
#define UNSPOOL_QUANTISED products::quantised

#include "simd_neon.h"

#include "level.h"
#endif

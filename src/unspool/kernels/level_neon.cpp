// The kernels for 64-bit ARM processors.

#if defined(__aarch64__)
#define UNSPOOL_LEVEL neon
#define UNSPOOL_TARGET
#define UNSPOOL_LINEAR products::linear
#define UNSPOOL_QUANTISED products::quantised

#include "simd_neon.h"

#include "level.h"
#endif

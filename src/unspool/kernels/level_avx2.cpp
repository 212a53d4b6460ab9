// The kernels for processors with AVX2, FMA and F16C.

#if defined(__x86_64__)
#define UNSPOOL_LEVEL avx2
#define UNSPOOL_TARGET __attribute__((target("avx2,fma,f16c")))
#define UNSPOOL_LINEAR products::linear
#define UNSPOOL_QUANTISED products::quantised

#include "simd_avx2.h"

#include "level.h"
#endif

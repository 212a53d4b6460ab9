// The kernels for processors with AVX-512 and its VNNI.

#if defined(__x86_64__)
#define UNSPOOL_LEVEL avx512
#define UNSPOOL_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define UNSPOOL_LINEAR products::linear
#define UNSPOOL_QUANTISED products::quantised

#include "simd_avx512.h"

#include "level.h"
#endif

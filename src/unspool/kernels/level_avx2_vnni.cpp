// The kernels for processors with AVX2, FMA, F16C and AVX-VNNI. The instruction is the same as that of AVX-512 VNNI but for
// its encoding, by which a test runs this level on processors that have only that.

#if defined(__x86_64__)
#define UNSPOOL_LEVEL avx2_vnni
#if defined(UNSPOOL_EMULATE)
#define UNSPOOL_TARGET __attribute__((target("avx2,fma,f16c,avx512vl,avx512vnni")))
#define UNSPOOL_AVX_VNNI _mm256_dpbusd_epi32
#else
#define UNSPOOL_TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define UNSPOOL_AVX_VNNI _mm256_dpbusd_avx_epi32
#endif
#define UNSPOOL_LINEAR products::linear
#define UNSPOOL_QUANTISED products::quantised

#include "simd_avx2.h"

#include "level.h"
#endif

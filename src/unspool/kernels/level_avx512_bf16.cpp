// The kernels for processors with AVX-512, its VNNI and BF16.

#if defined(__x86_64__)
#define UNSPOOL_LEVEL avx512_bf16
#define UNSPOOL_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")))
#define UNSPOOL_PAIRED
#define UNSPOOL_LINEAR linear_avx512_bf16
#define UNSPOOL_QUANTISED quantised_avx512_bf16

#include "simd_avx512.h"

#include "level.h"
#endif

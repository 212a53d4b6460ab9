// Sixteen fp32 numbers at a time, for processors with AVX-512, and how fp32 and bf16 arrays become such sixteens.

#pragma once

#include <cstdint>

namespace unspool {

using i64 = std::int64_t;
using bf16 = std::uint16_t;

constexpr i64 kLanes = 16;

}  // namespace unspool

#if defined(__x86_64__)
#include <immintrin.h>

#define UNSPOOL_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

namespace unspool {

// The nearest bf16 numbers, ties to even, in the upper halves; NaN stays NaN. The lower halves are to be ignored.
UNSPOOL_AVX512 inline __m512i rounded(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
}

UNSPOOL_AVX512 inline __m512i upper_halves(__m512i x) {
    return _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}

// An element type: `load` and `store` sixteen numbers in their order, of which the mask tells how many are there. A line
// is 64 bytes, whose numbers come as `kParts` sixteens in the order that is cheapest: bf16 as those at even and those at
// odd places. Of a line, only the 32-bit words of the mask are read or written; what is not read is 0.
struct Fp32 {
    using Number = float;
    static constexpr int kParts = 1;
    UNSPOOL_AVX512 static __m512 load(const float* from, __mmask16 there = 0xffff) {
        return _mm512_maskz_loadu_ps(there, from);
    }
    UNSPOOL_AVX512 static void store(float* to, __m512 x, __mmask16 there = 0xffff) {
        _mm512_mask_storeu_ps(to, there, x);
    }
    // What `load` would give after `store`.
    UNSPOOL_AVX512 static __m512 as_stored(__m512 x) { return x; }
    UNSPOOL_AVX512 static void load_line(const float* from, __mmask16 words, __m512 (&parts)[kParts]) {
        parts[0] = _mm512_maskz_loadu_ps(words, from);
    }
    UNSPOOL_AVX512 static void store_line(float* to, __mmask16 words, const __m512 (&parts)[kParts]) {
        _mm512_mask_storeu_ps(to, words, parts[0]);
    }
};

struct Bf16 {
    using Number = bf16;
    static constexpr int kParts = 2;
    UNSPOOL_AVX512 static __m512 load(const bf16* from, __mmask16 there = 0xffff) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from)), 16));
    }
    UNSPOOL_AVX512 static void store(bf16* to, __m512 x, __mmask16 there = 0xffff) {
        _mm256_mask_storeu_epi16(to, there, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(x), 16)));
    }
    UNSPOOL_AVX512 static __m512 as_stored(__m512 x) { return _mm512_castsi512_ps(upper_halves(rounded(x))); }
    UNSPOOL_AVX512 static void load_line(const bf16* from, __mmask16 words, __m512 (&parts)[kParts]) {
        const __m512i both = _mm512_maskz_loadu_epi32(words, from);
        parts[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        parts[1] = _mm512_castsi512_ps(upper_halves(both));
    }
    UNSPOOL_AVX512 static void store_line(bf16* to, __mmask16 words, const __m512 (&parts)[kParts]) {
        const __m512i even = _mm512_srli_epi32(rounded(parts[0]), 16), odd = upper_halves(rounded(parts[1]));
        _mm512_mask_storeu_epi32(to, words, _mm512_or_si512(even, odd));
    }
};

// e to the power of x, within 2 units in the last place; 0 below -104, infinity above 89, NaN of NaN.
UNSPOOL_AVX512 inline __m512 exponential(__m512 x) {
    // Of a NaN and a number, min and max give their second argument.
    x = _mm512_max_ps(_mm512_set1_ps(-120.0f), _mm512_min_ps(_mm512_set1_ps(120.0f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.442695041f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);      // ln 2 in two parts (Cody and Waite, 1980)
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);                                // Taylor series for |r| <= ln 2 / 2
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

}  // namespace unspool
#endif

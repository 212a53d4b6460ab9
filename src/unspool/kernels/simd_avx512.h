// Vectors of sixteen numbers, for processors with AVX-512 (Ice Lake's set). See simd.h.

#pragma once

#include "parallel.h"

#include <immintrin.h>

namespace unspool::UNSPOOL_LEVEL {

constexpr i64 kWidth = 16;
constexpr i64 kFloatSums = 24, kByteSums = 24, kNibbleSums = 24;

using Vec = __m512;
using Ints = std::uint32_t __attribute__((vector_size(64)));

UNSPOOL_TARGET inline __mmask16 lanes(i64 there) { return static_cast<__mmask16>((1u << there) - 1); }

UNSPOOL_TARGET inline Vec set(float x) { return _mm512_set1_ps(x); }
UNSPOOL_TARGET inline Ints set_ints(std::uint32_t x) { return (Ints)_mm512_set1_epi32(static_cast<int>(x)); }
UNSPOOL_TARGET inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
UNSPOOL_TARGET inline Vec load(const float* from, i64 there) { return _mm512_maskz_loadu_ps(lanes(there), from); }
UNSPOOL_TARGET inline void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }
UNSPOOL_TARGET inline void store(float* to, Vec x, i64 there) { _mm512_mask_storeu_ps(to, lanes(there), x); }
UNSPOOL_TARGET inline Ints load_ints(const void* from) { return (Ints)_mm512_loadu_si512(from); }
UNSPOOL_TARGET inline Ints load_ints(const void* from, i64 there) {
    return (Ints)_mm512_maskz_loadu_epi32(lanes(there), from);
}
UNSPOOL_TARGET inline void store_ints(void* to, Ints x) { _mm512_storeu_si512(to, (__m512i)x); }
UNSPOOL_TARGET inline void store_ints(void* to, Ints x, i64 there) {
    _mm512_mask_storeu_epi32(to, lanes(there), (__m512i)x);
}

UNSPOOL_TARGET inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
UNSPOOL_TARGET inline Vec fma_minus(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
UNSPOOL_TARGET inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
UNSPOOL_TARGET inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
UNSPOOL_TARGET inline Vec absolute(Vec x) { return _mm512_abs_ps(x); }
UNSPOOL_TARGET inline Vec nearest(Vec x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
UNSPOOL_TARGET inline Vec times_power(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
UNSPOOL_TARGET inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }
UNSPOOL_TARGET inline float greatest(Vec x) { return _mm512_reduce_max_ps(x); }

UNSPOOL_TARGET inline Ints where_nan(Vec x, Ints then, Ints otherwise) {
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return (Ints)_mm512_mask_mov_epi32((__m512i)otherwise, nan, (__m512i)then);
}
UNSPOOL_TARGET inline bool any_nan(Vec x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
UNSPOOL_TARGET inline bool any_not_below(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ) != 0; }
UNSPOOL_TARGET inline Vec where_less(Vec a, Vec b, Vec then, Vec otherwise) {
    return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), then);
}
UNSPOOL_TARGET inline Vec within(i64 low, i64 high, Vec x, Vec otherwise) {
    return _mm512_mask_mov_ps(otherwise, static_cast<__mmask16>(lanes(high) & ~lanes(low)), x);
}

UNSPOOL_TARGET inline Ints load_bf16(const std::uint16_t* from, i64 there) {
    return (Ints)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(there), from)), 16);
}
UNSPOOL_TARGET inline void store_upper(std::uint16_t* to, Ints x, i64 there) {
    _mm256_mask_storeu_epi16(to, lanes(there), _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)x, 16)));
}
UNSPOOL_TARGET inline Vec load_fp16(const std::uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

#if defined(UNSPOOL_PAIRED)
UNSPOOL_TARGET inline __m256i halves(Vec x) { return (__m256i)_mm512_cvtneps_pbh(x); }
UNSPOOL_TARGET inline Vec widened(__m256i x) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
UNSPOOL_TARGET inline void store_halves(std::uint16_t* to, __m256i x, i64 there) {
    _mm256_mask_storeu_epi16(to, lanes(there), x);
}
#endif

UNSPOOL_TARGET inline Vec from_integers(Ints x) { return _mm512_cvtepi32_ps((__m512i)x); }
UNSPOOL_TARGET inline Ints to_integers(Vec x) { return (Ints)_mm512_cvtps_epi32(x); }
UNSPOOL_TARGET inline std::int32_t sum_integers(Ints x) { return _mm512_reduce_add_epi32((__m512i)x); }
UNSPOOL_TARGET inline void store_bytes(std::uint8_t* to, Ints x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8((__m512i)x));
}

UNSPOOL_TARGET inline void transpose(Ints (&x)[kWidth]) {
    __m512i y[kWidth], z[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32((__m512i)x[i], (__m512i)x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32((__m512i)x[i], (__m512i)x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // then quarter q of z[i + j] is column 4 q + j of the rows from i
        z[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        z[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        z[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        z[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i even_low = _mm512_shuffle_i32x4(z[j], z[4 + j], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(z[j], z[4 + j], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(z[8 + j], z[12 + j], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(z[8 + j], z[12 + j], 0xdd);
        x[j] = (Ints)_mm512_shuffle_i32x4(even_low, even_high, 0x88);
        x[4 + j] = (Ints)_mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        x[8 + j] = (Ints)_mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        x[12 + j] = (Ints)_mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

// ---- Weights in bytes and in nibbles ------------------------------------------------------------------------------

// Bytes stay plus 128, so a sum of products with x has 128 times the sum of x too much.
constexpr std::int32_t kTooMuch = 128;

struct Bytes {
    Ints bytes;
};
UNSPOOL_TARGET inline Bytes bytes_of(Ints line) { return {line}; }
UNSPOOL_TARGET inline Ints dot(Ints sum, Bytes weights, Ints four) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights.bytes, (__m512i)four);
}

struct Table {
    __m512i numbers;
};
UNSPOOL_TARGET inline Table table_of(const std::uint16_t* twice) { return {_mm512_loadu_si512(twice)}; }
UNSPOOL_TARGET inline void pairs_of(Ints line, const Table& table, Ints (&pairs)[4]) {
    __m512i codes = (__m512i)line;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        // the index is a word's lowest five bits, of which the table ignores the fifth
        pairs[i] = (Ints)_mm512_permutexvar_epi16(codes, table.numbers);
        codes = _mm512_srli_epi16(codes, 4);
    }
}

}  // namespace unspool::UNSPOOL_LEVEL

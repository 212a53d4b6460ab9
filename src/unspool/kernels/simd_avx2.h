// Vectors of eight numbers, for processors with AVX2, FMA and F16C (Haswell's set). See simd.h.

#pragma once

#include "parallel.h"

#include <immintrin.h>

#include <algorithm>

namespace unspool::UNSPOOL_LEVEL {

constexpr i64 kWidth = 8;
constexpr i64 kFloatSums = 12, kByteSums = 8, kNibbleSums = 8;

using Vec = __m256;
using Ints = std::uint32_t __attribute__((vector_size(32)));

UNSPOOL_TARGET inline __m256i count_up() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
UNSPOOL_TARGET inline __m256i lanes(i64 there) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(there)), count_up());
}

UNSPOOL_TARGET inline Vec set(float x) { return _mm256_set1_ps(x); }
UNSPOOL_TARGET inline Ints set_ints(std::uint32_t x) { return (Ints)_mm256_set1_epi32(static_cast<int>(x)); }
UNSPOOL_TARGET inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
UNSPOOL_TARGET inline Vec load(const float* from, i64 there) {
    return there >= kWidth ? load(from) : _mm256_maskload_ps(from, lanes(there));
}
UNSPOOL_TARGET inline void store(float* to, Vec x) { _mm256_storeu_ps(to, x); }
UNSPOOL_TARGET inline void store(float* to, Vec x, i64 there) {
    if (there >= kWidth) return store(to, x);
    _mm256_maskstore_ps(to, lanes(there), x);
}
UNSPOOL_TARGET inline Ints load_ints(const void* from) {
    return (Ints)_mm256_loadu_si256(static_cast<const __m256i*>(from));
}
UNSPOOL_TARGET inline Ints load_ints(const void* from, i64 there) {
    return there >= kWidth ? load_ints(from) : (Ints)_mm256_maskload_epi32(static_cast<const int*>(from), lanes(there));
}
UNSPOOL_TARGET inline void store_ints(void* to, Ints x) { _mm256_storeu_si256(static_cast<__m256i*>(to), (__m256i)x); }
UNSPOOL_TARGET inline void store_ints(void* to, Ints x, i64 there) {
    if (there >= kWidth) return store_ints(to, x);
    _mm256_maskstore_epi32(static_cast<int*>(to), lanes(there), (__m256i)x);
}

UNSPOOL_TARGET inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
UNSPOOL_TARGET inline Vec fma_minus(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
UNSPOOL_TARGET inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
UNSPOOL_TARGET inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
UNSPOOL_TARGET inline Vec absolute(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
UNSPOOL_TARGET inline Vec nearest(Vec x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// In two steps, since the power may be past the range of floats where the result is not.
UNSPOOL_TARGET inline Vec times_power(Vec x, Vec n) {
    const __m256i all = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(all, 1), bias = _mm256_set1_epi32(127);
    const __m256i rest = _mm256_sub_epi32(all, half);
    const Vec first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const Vec second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return _mm256_mul_ps(_mm256_mul_ps(x, first), second);
}
UNSPOOL_TARGET inline float sum(Vec x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
UNSPOOL_TARGET inline float greatest(Vec x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

UNSPOOL_TARGET inline Ints where_nan(Vec x, Ints then, Ints otherwise) {
    return (Ints)_mm256_blendv_ps((Vec)otherwise, (Vec)then, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
UNSPOOL_TARGET inline bool any_nan(Vec x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0; }
UNSPOOL_TARGET inline bool any_not_below(Vec a, Vec b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)) != 0;
}
UNSPOOL_TARGET inline Vec where_less(Vec a, Vec b, Vec then, Vec otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
UNSPOOL_TARGET inline Vec within(i64 low, i64 high, Vec x, Vec otherwise) {
    return _mm256_blendv_ps(otherwise, x, (Vec)_mm256_andnot_si256(lanes(low), lanes(high)));
}

UNSPOOL_TARGET inline Ints load_bf16(const std::uint16_t* from, i64 there) {
    std::uint16_t some[8] = {};
    if (there < kWidth) from = (std::copy(from, from + there, some), some);
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Ints)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}
UNSPOOL_TARGET inline void store_upper(std::uint16_t* to, Ints x, i64 there) {
    const __m256i upper = _mm256_srli_epi32((__m256i)x, 16);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
    if (there >= kWidth) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
    std::uint16_t some[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(some), halves);
    std::copy(some, some + there, to);
}
UNSPOOL_TARGET inline Vec load_fp16(const std::uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

UNSPOOL_TARGET inline Vec from_integers(Ints x) { return _mm256_cvtepi32_ps((__m256i)x); }
UNSPOOL_TARGET inline Ints to_integers(Vec x) { return (Ints)_mm256_cvtps_epi32(x); }
UNSPOOL_TARGET inline std::int32_t sum_integers(Ints x) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    four = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 1)));
}
UNSPOOL_TARGET inline void store_bytes(std::uint8_t* to, Ints x) {
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(halves, halves));
}

UNSPOOL_TARGET inline void transpose(Ints (&x)[kWidth]) {
    __m256i y[kWidth], z[kWidth];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm256_unpacklo_epi32((__m256i)x[i], (__m256i)x[i + 1]);
        y[i + 1] = _mm256_unpackhi_epi32((__m256i)x[i], (__m256i)x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {  // then half h of z[i + j] is column 4 h + j of the rows from i
        z[i] = _mm256_unpacklo_epi64(y[i], y[i + 2]);
        z[i + 1] = _mm256_unpackhi_epi64(y[i], y[i + 2]);
        z[i + 2] = _mm256_unpacklo_epi64(y[i + 1], y[i + 3]);
        z[i + 3] = _mm256_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        x[j] = (Ints)_mm256_permute2x128_si256(z[j], z[4 + j], 0x20);
        x[4 + j] = (Ints)_mm256_permute2x128_si256(z[j], z[4 + j], 0x31);
    }
}

// ---- Weights in bytes and in nibbles ------------------------------------------------------------------------------

#if defined(UNSPOOL_AVX_VNNI)
// Bytes stay plus 128, so a sum of products with x has 128 times the sum of x too much.
constexpr std::int32_t kTooMuch = 128;

struct Bytes {
    Ints bytes;
};
UNSPOOL_TARGET inline Bytes bytes_of(Ints line) { return {line}; }
UNSPOOL_TARGET inline Ints dot(Ints sum, Bytes weights, Ints four) {
    return (Ints)UNSPOOL_AVX_VNNI((__m256i)sum, (__m256i)weights.bytes, (__m256i)four);
}
#else
constexpr std::int32_t kTooMuch = 0;

// The instruction adds two products in 16 bits, which a byte of -128 to 127 times one of -127 to 127 never overflows:
// the first is given by its size, the second by the product's sign.
struct Bytes {
    __m256i bytes, sizes;
};
UNSPOOL_TARGET inline Bytes bytes_of(Ints line) {
    const __m256i bytes = _mm256_xor_si256((__m256i)line, _mm256_set1_epi8(-128));
    return {bytes, _mm256_abs_epi8(bytes)};
}
UNSPOOL_TARGET inline Ints dot(Ints sum, const Bytes& weights, Ints four) {
    const __m256i twos = _mm256_maddubs_epi16(weights.sizes, _mm256_sign_epi8((__m256i)four, weights.bytes));
    return (Ints)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(twos, _mm256_set1_epi16(1)));
}
#endif

// The lower and upper bytes of a table's sixteen numbers.
struct Table {
    __m256i lower, upper;
};
UNSPOOL_TARGET inline Table table_of(const std::uint16_t* numbers) {
    std::uint8_t bytes[2][16];
    for (int i = 0; i < 16; i++) {
        bytes[0][i] = static_cast<std::uint8_t>(numbers[i] & 255);
        bytes[1][i] = static_cast<std::uint8_t>(numbers[i] >> 8);
    }
    return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[0]))),
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[1])))};
}
UNSPOOL_TARGET inline void pairs_of(Ints line, const Table& table, Ints (&pairs)[4]) {
    const __m256i even = _mm256_set1_epi16(255), codes = (__m256i)line;
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const __m256i some = _mm256_and_si256(i ? _mm256_srli_epi16(codes, 4) : codes, _mm256_set1_epi8(15));
        const __m256i lower = _mm256_shuffle_epi8(table.lower, some), upper = _mm256_shuffle_epi8(table.upper, some);
        pairs[i] = (Ints)_mm256_or_si256(_mm256_and_si256(lower, even), _mm256_slli_epi16(upper, 8));
        pairs[2 + i] = (Ints)_mm256_or_si256(_mm256_srli_epi16(lower, 8), _mm256_andnot_si256(even, upper));
    }
}

}  // namespace unspool::UNSPOOL_LEVEL

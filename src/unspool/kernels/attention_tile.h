// Attention for a few rows over a few tokens, from registers: scores, weights, and values by weight.
//
// A row is a query of one head, a tile is up to 12 rows that share a key/value head. Keys and values are first packed,
// so that one line of 64 bytes is the operand of one instruction and a row's number is a broadcast word of 32 bits. A
// row's results are chains of sums in the order of the head's numbers, or of the tokens: the same bits whatever other
// rows there are, and whatever tokens it does not see are gone through beside those that it sees, since a weight of 0
// changes no sum.

#pragma once

#include "simd.h"

#include <algorithm>
#include <cstring>
#include <limits>

#if defined(__x86_64__)

#define UNSPOOL_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace unspool {

constexpr i64 kChunk = 256;              // tokens whose weights are relative to one greatest score
constexpr int kTall = 12;                // rows of a tile
constexpr i64 kMostDim = 256;
constexpr i64 kPitch = kChunk + kLanes;  // words from row to row, of queries and of weights

// ---- Formats ----------------------------------------------------------------------------------------------------

// How numbers are packed and multiplied. A word of a query or key is `kDims` numbers, a word of weights or values
// `kTokens` tokens. Vectors of values are in lines and parts (see simd.h).

// fp32 products of fp32 words. They are the exact products of bf16 numbers too.
template <class T>
struct Single : T {
    static constexpr int kDims = 1, kTokens = 1;

    UNSPOOL_AVX512 static __m512 add(__m512 sum, __m512 line, __m512 word) { return _mm512_fmadd_ps(line, word, sum); }

    UNSPOOL_AVX512 static void pack_query(const typename T::Number* from, i64 dim, float* to) {
        for (i64 i = 0; i < dim; i += kLanes) _mm512_storeu_ps(to + i, T::load(from + i));
    }

    // Sixteen words of sixteen tokens, transposed: those of sixteen or of 32 numbers.
    UNSPOOL_AVX512 static void store_keys(const __m512i (&lines)[kLanes], float* to) {
        for (i64 i = 0; i < kLanes; i++) {
            if constexpr (T::kParts == 2) {
                _mm512_store_si512(to + 2 * i * kLanes, _mm512_slli_epi32(lines[i], 16));
                _mm512_store_si512(to + (2 * i + 1) * kLanes, upper_halves(lines[i]));
            } else {
                _mm512_store_si512(to + i * kLanes, lines[i]);
            }
        }
    }

    // A line of a token's values.
    UNSPOOL_AVX512 static void pack_values(const typename T::Number* from, i64, __mmask16 words, __mmask16, float* to) {
        __m512 parts[T::kParts];
        T::load_line(from, words, parts);
        for (int i = 0; i < T::kParts; i++) _mm512_store_ps(to + i * kLanes, parts[i]);
    }

    // Weights of a group; gives them as they are stored.
    UNSPOOL_AVX512 static __m512 store_weights(float* row, i64 group, __m512 weights) {
        _mm512_store_ps(row + group * kLanes, weights);
        return weights;
    }
};

// Dot products of pairs of bf16 numbers, added in fp32; weights are rounded to bf16.
struct Paired : Bf16 {
    static constexpr int kDims = 2, kTokens = 2;

    UNSPOOL_AVX512_BF16 static __m512 add(__m512 sum, __m512 line, __m512 word) {
        return _mm512_dpbf16_ps(sum, (__m512bh)line, (__m512bh)word);
    }

    static void pack_query(const bf16* from, i64 dim, float* to) {
        std::memcpy(to, from, static_cast<std::size_t>(dim) * sizeof(bf16));
    }

    UNSPOOL_AVX512 static void store_keys(const __m512i (&lines)[kLanes], float* to) {
        for (i64 i = 0; i < kLanes; i++) _mm512_store_si512(to + i * kLanes, lines[i]);
    }

    // A line of two tokens' values, at even and at odd places.
    UNSPOOL_AVX512 static void pack_values(const bf16* from, i64 stride, __mmask16 first, __mmask16 second, float* to) {
        const __m512i a = _mm512_maskz_loadu_epi32(first, from), b = _mm512_maskz_loadu_epi32(second, from + stride);
        const __m512i low = _mm512_set1_epi32(0xffff);
        _mm512_store_si512(to, _mm512_or_si512(_mm512_and_si512(a, low), _mm512_slli_epi32(b, 16)));
        _mm512_store_si512(to + kLanes, _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_andnot_si512(low, b)));
    }

    UNSPOOL_AVX512_BF16 static __m512 store_weights(float* row, i64 group, __m512 weights) {
        const __m256i halves = (__m256i)_mm512_cvtneps_pbh(weights);
        _mm256_store_si256(reinterpret_cast<__m256i*>(row + group * kLanes / 2), halves);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
};

// A vector of values is worked on as fp32 numbers in parts of lines, zeros at its end.
template <class F> constexpr i64 line() { return F::kParts * kLanes; }
template <class F> constexpr i64 lines(i64 dim) { return (dim + line<F>() - 1) / line<F>(); }
template <class F> constexpr i64 padded(i64 dim) { return lines<F>(dim) * line<F>(); }
template <class F> constexpr __mmask16 words(i64 dim, i64 number) {
    return static_cast<__mmask16>((1u << std::min<i64>((dim - number * line<F>()) / F::kParts, kLanes)) - 1);
}
// Words of a key.
template <class F> constexpr i64 key_words(i64 dim) { return padded<F>(dim) / F::kDims; }

// ---- Packing ----------------------------------------------------------------------------------------------------

// Into the second level of the cache: what waits for the memory must not stop the loads from the first.
inline void fetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T1); }

UNSPOOL_AVX512 inline void transpose(__m512i (&x)[kLanes]) {
    __m512i y[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // then quarter q of x[i + j] is column 4 q + j of the rows from i
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i even_low = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
        x[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        x[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        x[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        x[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

// Sixteen tokens' keys to [words][16 tokens]; tokens are `stride` numbers apart. Meanwhile those at `ahead` are fetched.
template <class F>
UNSPOOL_AVX512 void pack_keys(const typename F::Number* keys, i64 stride, i64 dim, const typename F::Number* ahead,
                              float* to) {
    for (i64 i = 0; i < lines<F>(dim); i++, to += kLanes * line<F>() / F::kDims) {
        const __mmask16 there = words<F>(dim, i);
        __m512i x[kLanes];
#pragma GCC unroll 16
        for (int token = 0; token < kLanes; token++) {
            x[token] = _mm512_maskz_loadu_epi32(there, keys + token * stride + i * line<F>());
            fetch(ahead + token * stride + i * line<F>());
        }
        transpose(x);
        F::store_keys(x, to);
    }
}

// Sixteen tokens' values to [16 / F::kTokens][padded dim]; those outside [first, last) become 0, whatever they hold.
template <class F>
UNSPOOL_AVX512 void pack_values(const typename F::Number* values, i64 stride, i64 dim, i64 first, i64 last,
                                const typename F::Number* ahead, float* to) {
    const auto there = [=](i64 token, __mmask16 all) { return token >= first && token < last ? all : __mmask16{0}; };
    for (i64 token = 0; token < kLanes; token += F::kTokens)
        for (i64 i = 0; i < lines<F>(dim); i++, to += line<F>()) {
            const __mmask16 all = words<F>(dim, i);
            const i64 place = token * stride + i * line<F>();
            F::pack_values(values + place, stride, there(token, all), there(token + 1, all), to);
            for (int t = 0; t < F::kTokens; t++) fetch(ahead + place + t * stride);
        }
}

// ---- Scores -----------------------------------------------------------------------------------------------------

// 2 to the power of x, within 2 units in the last place; 0 below -150, NaN of NaN.
UNSPOOL_AVX512 inline __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-160.0f), x);  // of a NaN and a number, the second
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);  // Taylor series, powers of ln 2 by factorials
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// tanh: by the exponential and, near 0, where that loses digits, by the Taylor series.
UNSPOOL_AVX512 inline __m512 tangent(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 grown = _mm512_add_ps(exponential(_mm512_add_ps(x, x)), one);
    const __m512 far = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), grown));
    const __m512 square = _mm512_mul_ps(x, x);
    __m512 near = _mm512_set1_ps(62.0f / 2835);
    near = _mm512_fmadd_ps(near, square, _mm512_set1_ps(-17.0f / 315));
    near = _mm512_fmadd_ps(near, square, _mm512_set1_ps(2.0f / 15));
    near = _mm512_fmadd_ps(near, square, _mm512_set1_ps(-1.0f / 3));
    near = _mm512_mul_ps(_mm512_fmadd_ps(near, square, one), x);
    return _mm512_mask_mov_ps(far, _mm512_cmp_ps_mask(square, _mm512_set1_ps(0.0625f), _CMP_LT_OQ), near);
}

// From products to scores, in powers of two.
struct Scale {
    float factor, limit;  // limit 0: none

    Scale(float scale, float softcap)
        : factor(softcap > 0 ? scale / softcap : scale * kPerE), limit(softcap > 0 ? softcap * kPerE : 0.0f) {}
    UNSPOOL_AVX512 __m512 operator()(__m512 product) const {
        const __m512 x = _mm512_mul_ps(product, _mm512_set1_ps(factor));
        return limit > 0 ? _mm512_mul_ps(tangent(x), _mm512_set1_ps(limit)) : x;
    }

    static constexpr float kPerE = 1.442695041f;
};

// Scores of some rows and groups of sixteen tokens, from `count` words of their keys; a group's take `size` words.
template <class F, int Rows, int Groups>
UNSPOOL_AVX512_BF16 void score(const float* queries, const float* keys, i64 count, i64 size, const Scale& scale,
                               float* scores) {
    __m512 sums[Rows][Groups] = {};
    for (i64 i = 0; i < count; i++, queries++, keys += kLanes) {
        __m512 key[Groups];
#pragma GCC unroll 4
        for (int g = 0; g < Groups; g++) key[g] = _mm512_load_ps(keys + g * size);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; r++) {
            const __m512 word = _mm512_set1_ps(queries[r * kPitch]);
#pragma GCC unroll 4
            for (int g = 0; g < Groups; g++) sums[r][g] = F::add(sums[r][g], key[g], word);
        }
    }
    for (int r = 0; r < Rows; r++)
        for (int g = 0; g < Groups; g++) _mm512_store_ps(scores + r * kPitch + g * kLanes, scale(sums[r][g]));
}

// ---- Weights ----------------------------------------------------------------------------------------------------

struct Sum {
    float greatest, sum;  // of a row's scores; of its weights relative to that
};

// From a row's scores of the groups [from, to) to its weights.
template <class F>
UNSPOOL_AVX512_BF16 Sum weigh(float* row, i64 from, i64 to) {
    __m512 most = _mm512_load_ps(row + from * kLanes);
    for (i64 i = from + 1; i < to; i++) most = _mm512_max_ps(most, _mm512_load_ps(row + i * kLanes));
    const float greatest = _mm512_reduce_max_ps(most);
    __m512 sum = _mm512_setzero_ps();
    for (i64 i = from; i < to; i++) {
        const __m512 score = _mm512_sub_ps(_mm512_load_ps(row + i * kLanes), _mm512_set1_ps(greatest));
        sum = _mm512_add_ps(sum, F::store_weights(row, i, power_of_two(score)));
    }
    return {greatest, _mm512_reduce_add_ps(sum)};
}

// Adds the values of `count` words of tokens by weight to some vectors of the rows' sums, `size` numbers apart.
template <class F, int Rows, int Vectors>
UNSPOOL_AVX512_BF16 void mix(const float* weights, const float* values, i64 count, i64 size, float* mixed) {
    __m512 sums[Rows][Vectors];
#pragma GCC unroll 12
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) sums[r][v] = _mm512_load_ps(mixed + r * size + v * kLanes);
    for (i64 i = 0; i < count; i++, weights++, values += size) {
        __m512 value[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) value[v] = _mm512_load_ps(values + v * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; r++) {
            const __m512 word = _mm512_set1_ps(weights[r * kPitch]);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; v++) sums[r][v] = F::add(sums[r][v], value[v], word);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) _mm512_store_ps(mixed + r * size + v * kLanes, sums[r][v]);
}

// ---- By the number of rows --------------------------------------------------------------------------------------

// Calls `name<F, rows, wide>(...)`.
#define UNSPOOL_BY_ROWS(rows, wide, name, ...)                \
    switch (rows) {                                           \
        case 1: name<F, 1, wide>(__VA_ARGS__); break;         \
        case 2: name<F, 2, wide>(__VA_ARGS__); break;         \
        case 3: name<F, 3, wide>(__VA_ARGS__); break;         \
        case 4: name<F, 4, wide>(__VA_ARGS__); break;         \
        case 5: name<F, 5, wide>(__VA_ARGS__); break;         \
        case 6: name<F, 6, wide>(__VA_ARGS__); break;         \
        case 7: name<F, 7, wide>(__VA_ARGS__); break;         \
        case 8: name<F, 8, wide>(__VA_ARGS__); break;         \
        case 9: name<F, 9, wide>(__VA_ARGS__); break;         \
        case 10: name<F, 10, wide>(__VA_ARGS__); break;       \
        case 11: name<F, 11, wide>(__VA_ARGS__); break;       \
        default: name<F, kTall, wide>(__VA_ARGS__);           \
    }

// Scores of a tile for `groups` packed groups.
template <class F>
void score_tile(i64 rows, const float* queries, const float* keys, i64 groups, i64 dim, const Scale& scale,
                float* scores) {
    const i64 count = dim / F::kDims, size = key_words<F>(dim) * kLanes;
    for (; groups >= 2; groups -= 2, keys += 2 * size, scores += 2 * kLanes)
        UNSPOOL_BY_ROWS(rows, 2, score, queries, keys, count, size, scale, scores)
    if (groups) UNSPOOL_BY_ROWS(rows, 1, score, queries, keys, count, size, scale, scores)
}

// Adds the values of `groups` packed groups by weight to a tile's sums.
template <class F>
void mix_tile(i64 rows, const float* weights, const float* values, i64 groups, i64 dim, float* mixed) {
    const i64 size = padded<F>(dim), count = groups * kLanes / F::kTokens;
    i64 i = 0;
    for (; i + 2 * kLanes <= size; i += 2 * kLanes)
        UNSPOOL_BY_ROWS(rows, 2, mix, weights, values + i, count, size, mixed + i)
    if (i < size) UNSPOOL_BY_ROWS(rows, 1, mix, weights, values + i, count, size, mixed + i)
}

#undef UNSPOOL_BY_ROWS

}  // namespace unspool
#endif

// Attention for a few rows over a few tokens, from registers: scores, weights, and values by weight.
//
// A row is a query of one head, a tile is a few rows that share a key/value head. Keys and values are first packed,
// so that one vector is the operand of one instruction and a row's number is a broadcast word of 32 bits. A
// row's results are chains of sums in the order of the head's numbers, or of the tokens: the same bits whatever other
// rows there are, and whatever tokens it does not see are gone through beside those that it sees, since a weight of 0
// changes no sum.

#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

namespace unspool::UNSPOOL_LEVEL::attention {

constexpr i64 kChunk = 256;              // tokens whose weights are relative to one greatest score
constexpr int kWide = kWidth == 4 ? 4 : 2;           // vectors of a row in a tile, at most
constexpr int kTall = static_cast<int>(kFloatSums / kWide);  // rows of a tile
constexpr i64 kMostDim = 256;
constexpr i64 kPitch = kChunk + kWidth;  // words from row to row, of queries and of weights

// ---- Formats ----------------------------------------------------------------------------------------------------

// How numbers are packed and multiplied. A word of a query or key is `kDims` numbers, a word of weights or values
// `kTokens` tokens. Vectors of values are in lines and parts (see simd.h).

// fp32 products of fp32 words. They are the exact products of bf16 numbers too.
template <class T>
struct Single : T {
    static constexpr int kDims = 1, kTokens = 1;

    UNSPOOL_TARGET static Vec add(Vec sum, Vec line, Vec word) { return fma(line, word, sum); }

    UNSPOOL_TARGET static void pack_query(const typename T::Number* from, i64 dim, float* to) {
        for (i64 i = 0; i < dim; i += kWidth) UNSPOOL_LEVEL::store(to + i, T::load(from + i));
    }

    // Of 32 bits of as many tokens' keys, one of the words.
    UNSPOOL_TARGET static Vec key(Ints bits, int word) {
        if constexpr (T::kParts == 2) return (Vec)(word ? upper_halves(bits) : bits << 16);
        return (Vec)bits;
    }

    // A line of a token's values.
    UNSPOOL_TARGET static void values(const typename T::Number* from, i64, i64 words, i64, Vec (&parts)[T::kParts]) {
        T::load_line(from, words, parts);
    }

    // Weights of a group; gives them as they are stored.
    UNSPOOL_TARGET static Vec store_weights(float* row, i64 group, Vec weights) {
        UNSPOOL_LEVEL::store(row + group * kWidth, weights);
        return weights;
    }
};

#if defined(UNSPOOL_PAIRED)
// Dot products of pairs of bf16 numbers, added in fp32; weights are rounded to bf16.
struct Paired : Bf16 {
    static constexpr int kDims = 2, kTokens = 2;

    UNSPOOL_TARGET static Vec add(Vec sum, Vec line, Vec word) {
        return _mm512_dpbf16_ps(sum, (__m512bh)line, (__m512bh)word);
    }

    static void pack_query(const bf16* from, i64 dim, float* to) {
        std::memcpy(to, from, static_cast<std::size_t>(dim) * sizeof(bf16));
    }

    UNSPOOL_TARGET static Vec key(Ints bits, int) { return (Vec)bits; }

    // A line of two tokens' values, at even and at odd places.
    UNSPOOL_TARGET static void values(const bf16* from, i64 stride, i64 first, i64 second, Vec (&parts)[kParts]) {
        const Ints a = load_ints(from, first), b = load_ints(from + stride, second);
        parts[0] = (Vec)((a & set_ints(0xffff)) | (b << 16));
        parts[1] = (Vec)((a >> 16) | upper_halves(b));
    }

    UNSPOOL_TARGET static Vec store_weights(float* row, i64 group, Vec weights) {
        const __m256i rounded = halves(weights);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + group * kWidth / 2), rounded);
        return widened(rounded);
    }
};
#endif

// A vector of values is worked on as fp32 numbers in parts of lines, zeros at its end.
template <class F> constexpr i64 line() { return F::kParts * kWidth; }
// Words of a key in 32 bits of it.
template <class F> constexpr int together() { return F::kParts / F::kDims; }
template <class F> constexpr i64 lines(i64 dim) { return (dim + line<F>() - 1) / line<F>(); }
template <class F> constexpr i64 padded(i64 dim) { return lines<F>(dim) * line<F>(); }
template <class F> constexpr i64 words(i64 dim, i64 number) {
    return std::min<i64>((dim - number * line<F>()) / F::kParts, kWidth);
}
// Words of a key.
template <class F> constexpr i64 key_words(i64 dim) { return padded<F>(dim) / F::kDims; }

// ---- Packing ----------------------------------------------------------------------------------------------------

// Into the second level of the cache: what waits for the memory must not stop the loads from the first. gcc takes a call
// that is not inlined at once for one without effect.
inline __attribute__((always_inline)) void fetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// As many tokens' keys as a vector has numbers, to [words][tokens]; tokens are `stride` numbers apart. Meanwhile those at `ahead` are fetched.
template <class F>
UNSPOOL_TARGET void pack_keys(const typename F::Number* keys, i64 stride, i64 dim, const typename F::Number* ahead,
                              float* to) {
    for (i64 i = 0; i < lines<F>(dim); i++, to += kWidth * line<F>() / F::kDims) {
        const i64 there = words<F>(dim, i);
        Ints x[kWidth];
#pragma GCC unroll 16
        for (int token = 0; token < kWidth; token++) {
            x[token] = load_ints(keys + token * stride + i * line<F>(), there);
            fetch(ahead + token * stride + i * line<F>());
        }
        transpose(x);
        for (i64 j = 0; j < kWidth; j++)
            for (int word = 0; word < together<F>(); word++)
                store(to + (j * together<F>() + word) * kWidth, F::key(x[j], word));
    }
}

// A group of tokens' values to [kWidth / F::kTokens][padded dim]; those outside [first, last) become 0, whatever they hold.
template <class F>
UNSPOOL_TARGET void pack_values(const typename F::Number* values, i64 stride, i64 dim, i64 first, i64 last,
                                const typename F::Number* ahead, float* to) {
    const auto there = [=](i64 token, i64 all) { return token >= first && token < last ? all : 0; };
    for (i64 token = 0; token < kWidth; token += F::kTokens)
        for (i64 i = 0; i < lines<F>(dim); i++, to += line<F>()) {
            const i64 all = words<F>(dim, i);
            const i64 place = token * stride + i * line<F>();
            Vec parts[F::kParts];
            F::values(values + place, stride, there(token, all), there(token + 1, all), parts);
            for (int part = 0; part < F::kParts; part++) store(to + part * kWidth, parts[part]);
            for (int t = 0; t < F::kTokens; t++) fetch(ahead + place + t * stride);
        }
}

// ---- Scores -----------------------------------------------------------------------------------------------------

// 2 to the power of x, within 2 units in the last place; 0 below -150, NaN of NaN.
UNSPOOL_TARGET inline Vec power_of_two(Vec x) {
    x = max(set(-160.0f), x);
    const Vec n = nearest(x);
    const Vec r = x - n;
    Vec p = set(1.5403530e-4f);  // Taylor series, powers of ln 2 by factorials
    p = fma(p, r, set(1.3333558e-3f));
    p = fma(p, r, set(9.6181291e-3f));
    p = fma(p, r, set(5.5504109e-2f));
    p = fma(p, r, set(2.4022651e-1f));
    p = fma(p, r, set(6.9314718e-1f));
    p = fma(p, r, set(1.0f));
    return times_power(p, n);
}

// tanh: by the exponential and, near 0, where that loses digits, by the Taylor series.
UNSPOOL_TARGET inline Vec tangent(Vec x) {
    const Vec one = set(1.0f);
    const Vec grown = exponential((x + x)) + one;
    const Vec far = one - (set(2.0f) / grown);
    const Vec square = x * x;
    Vec near = set(62.0f / 2835);
    near = fma(near, square, set(-17.0f / 315));
    near = fma(near, square, set(2.0f / 15));
    near = fma(near, square, set(-1.0f / 3));
    near = fma(near, square, one) * x;
    return where_less(square, set(0.0625f), near, far);
}

// From products to scores, in powers of two.
struct Scale {
    float factor, limit;  // limit 0: none

    Scale(float scale, float softcap)
        : factor(softcap > 0 ? scale / softcap : scale * kPerE), limit(softcap > 0 ? softcap * kPerE : 0.0f) {}
    UNSPOOL_TARGET Vec operator()(Vec product) const {
        const Vec x = product * set(factor);
        return limit > 0 ? (tangent(x) * set(limit)) : x;
    }

    static constexpr float kPerE = 1.442695041f;
};

// Scores of some rows and groups of tokens, from `count` words of their keys; a group's take `size` words.
template <class F, int Rows, int Groups>
UNSPOOL_TARGET void score(const float* queries, const float* keys, i64 count, i64 size, const Scale& scale,
                               float* scores) {
    Vec sums[Rows][Groups];
    clear(sums);
    for (i64 i = 0; i < count; i++, queries++, keys += kWidth) {
        Vec key[Groups];
#pragma GCC unroll 4
        for (int g = 0; g < Groups; g++) key[g] = load(keys + g * size);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; r++) {
            const Vec word = set(queries[r * kPitch]);
#pragma GCC unroll 4
            for (int g = 0; g < Groups; g++) sums[r][g] = F::add(sums[r][g], key[g], word);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
        for (int g = 0; g < Groups; g++) store(scores + r * kPitch + g * kWidth, scale(sums[r][g]));
}

// ---- Weights ----------------------------------------------------------------------------------------------------

struct Sum {
    float greatest, sum;  // of a row's scores; of its weights relative to that
};

// From a row's scores of the groups [from, to) to its weights.
template <class F>
UNSPOOL_TARGET Sum weigh(float* row, i64 from, i64 to) {
    Vec most = load(row + from * kWidth);
    for (i64 i = from + 1; i < to; i++) most = max(most, load(row + i * kWidth));
    const float greatest = UNSPOOL_LEVEL::greatest(most);
    Vec sum = Vec{};
    for (i64 i = from; i < to; i++) {
        const Vec score = load(row + i * kWidth) - set(greatest);
        sum = sum + F::store_weights(row, i, power_of_two(score));
    }
    return {greatest, UNSPOOL_LEVEL::sum(sum)};
}

// Adds the values of `count` words of tokens by weight to some vectors of the rows' sums, `size` numbers apart.
template <class F, int Rows, int Vectors>
UNSPOOL_TARGET void mix(const float* weights, const float* values, i64 count, i64 size, float* mixed) {
    Vec sums[Rows][Vectors];
#pragma GCC unroll 12
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) sums[r][v] = load(mixed + r * size + v * kWidth);
    for (i64 i = 0; i < count; i++, weights++, values += size) {
        Vec value[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) value[v] = load(values + v * kWidth);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; r++) {
            const Vec word = set(weights[r * kPitch]);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; v++) sums[r][v] = F::add(sums[r][v], value[v], word);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) store(mixed + r * size + v * kWidth, sums[r][v]);
}

// ---- Few rows, for which nothing is packed, since nobody else would use it ---------------------------------------

// Adds `there` words of 32 bits of a line of a group of tokens' keys, `stride` numbers apart, to the rows' products.
template <class F, int Rows>
UNSPOOL_TARGET inline __attribute__((always_inline)) void score_line(const float* queries, const typename F::Number* keys,
                                                                     i64 stride, i64 there,
                                                                     const typename F::Number* ahead, Vec (&sums)[Rows]) {
    Ints x[kWidth];
#pragma GCC unroll 16
    for (int token = 0; token < kWidth; token++) {
        x[token] = there == kWidth ? load_ints(keys + token * stride) : load_ints(keys + token * stride, there);
        fetch(ahead + token * stride);
    }
    transpose(x);
#pragma GCC unroll 16
    for (int j = 0; j < there; j++)
        for (int word = 0; word < together<F>(); word++) {
            const Vec key = F::key(x[j], word);
#pragma GCC unroll 12
            for (int r = 0; r < Rows; r++)
                sums[r] = F::add(sums[r], key, set(queries[r * kPitch + j * together<F>() + word]));
        }
}

// Scores of some rows for a group of tokens.
template <class F, int Rows>
UNSPOOL_TARGET void score_group(const float* queries, const typename F::Number* keys, i64 stride, i64 dim,
                                const typename F::Number* ahead, const Scale& scale, float* scores) {
    Vec sums[Rows] = {};
    const i64 whole = dim / line<F>() * line<F>(), rest = words<F>(dim, dim / line<F>());
    for (i64 i = 0; i < whole; i += line<F>())
        score_line<F, Rows>(queries + i / F::kDims, keys + i, stride, kWidth, ahead + i, sums);
    if (rest) score_line<F, Rows>(queries + whole / F::kDims, keys + whole, stride, rest, ahead + whole, sums);
    for (int r = 0; r < Rows; r++) store(scores + r * kPitch, scale(sums[r]));
}

// Adds some lines of a group of tokens' values by weight to the rows' sums; tokens outside [first, last) count as 0.
template <class F, int Rows, int Lines>
UNSPOOL_TARGET inline __attribute__((always_inline)) void mix_group(
    const float* weights, const typename F::Number* values, i64 stride, i64 there, i64 first, i64 last,
    const typename F::Number* ahead, Vec (&sums)[Rows][Lines][F::kParts]) {
    for (i64 token = 0; token < kWidth; token += F::kTokens, weights++) {
        Vec value[Lines][F::kParts];
#pragma GCC unroll 2
        for (int i = 0; i < Lines; i++) {
            const i64 place = token * stride + i * line<F>(), next = token + 1;
            F::values(values + place, stride, token >= first && token < last ? there : 0,
                      next >= first && next < last ? there : 0, value[i]);
#pragma GCC unroll 2
            for (int t = 0; t < F::kTokens; t++) fetch(ahead + place + t * stride);
        }
#pragma GCC unroll 12
        for (int r = 0; r < Rows; r++) {
            const Vec word = set(weights[r * kPitch]);
#pragma GCC unroll 4
            for (int v = 0; v < Lines * F::kParts; v++) {
                Vec& sum = sums[r][v / F::kParts][v % F::kParts];
                sum = F::add(sum, value[v / F::kParts][v % F::kParts], word);
            }
        }
    }
}

// Adds some lines of the values of the groups [from, to) by weight to `mixed`; tokens outside [begin, end) count as 0.
// `where(group)` gives a group's values and what to fetch meanwhile. A line that is not whole comes alone.
template <class F, int Rows, int Lines, class Where>
UNSPOOL_TARGET void mix_groups(const float* weights, i64 from, i64 to, i64 begin, i64 end, const Where& where, i64 stride,
                               i64 there, i64 size, float* mixed) {
    Vec sums[Rows][Lines][F::kParts];
#pragma GCC unroll 12
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < Lines * F::kParts; v++) sums[r][v / F::kParts][v % F::kParts] = load(mixed + r * size + v * kWidth);
    for (i64 group = from; group < to; group++, weights += kWidth / F::kTokens) {
        const i64 first = begin - group * kWidth, last = end - group * kWidth;
        const auto [values, ahead] = where(group);
        if (first <= 0 && last >= kWidth && there == kWidth)
            mix_group<F, Rows, Lines>(weights, values, stride, kWidth, 0, kWidth, ahead, sums);
        else
            mix_group<F, Rows, Lines>(weights, values, stride, there, first, last, ahead, sums);
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < Lines * F::kParts; v++)
            store(mixed + r * size + v * kWidth, sums[r][v / F::kParts][v % F::kParts]);
}

// ---- By the number of rows --------------------------------------------------------------------------------------

// Calls `work` with the number of rows as a constant.
template <int Rows = 1, class Work>
void by_rows(i64 rows, const Work& work) {
    if constexpr (Rows < kTall)
        if (rows > Rows) return by_rows<Rows + 1>(rows, work);
    work(std::integral_constant<int, Rows>{});
}

// Scores of a tile for `groups` packed groups.
template <class F>
void score_tile(i64 rows, const float* queries, const float* keys, i64 groups, i64 dim, const Scale& scale,
                float* scores) {
    const i64 count = dim / F::kDims, size = key_words<F>(dim) * kWidth;
    by_rows(rows, [&](auto constant) {
        constexpr int kRows = decltype(constant)::value;
        for (; groups >= kWide; groups -= kWide, keys += kWide * size, scores += kWide * kWidth)
            score<F, kRows, kWide>(queries, keys, count, size, scale, scores);
        for (; groups > 0; groups--, keys += size, scores += kWidth)
            score<F, kRows, 1>(queries, keys, count, size, scale, scores);
    });
}

// Adds the values of `groups` packed groups by weight to a tile's sums.
template <class F>
void mix_tile(i64 rows, const float* weights, const float* values, i64 groups, i64 dim, float* mixed) {
    const i64 size = padded<F>(dim), count = groups * kWidth / F::kTokens;
    by_rows(rows, [&](auto constant) {
        constexpr int kRows = decltype(constant)::value;
        i64 i = 0;
        for (; i + kWide * kWidth <= size; i += kWide * kWidth)
            mix<F, kRows, kWide>(weights, values + i, count, size, mixed + i);
        for (; i < size; i += kWidth) mix<F, kRows, 1>(weights, values + i, count, size, mixed + i);
    });
}

}  // namespace unspool::UNSPOOL_LEVEL::attention

// How fp32 and bf16 arrays become vectors of fp32 and back, on every level.
//
// A level is one set of instructions. Its source names it (UNSPOOL_LEVEL, a namespace), says how its functions are to be
// compiled (UNSPOOL_TARGET) and includes what a vector is (`simd_*.h`), this, and the kernels. Of the functions of those
// headers, only `simd_*.h` knows instructions; `kWidth` is the number of fp32 numbers in a vector. Where an operation
// takes `there`, only so many numbers are touched; what is not read is 0. Of a NaN and a number, `max` and `min` give
// the second, or NaN.

#pragma once

namespace unspool::UNSPOOL_LEVEL {

using bf16 = std::uint16_t;

UNSPOOL_TARGET inline Ints upper_halves(Ints x) { return x & set_ints(0xffff0000u); }

// The nearest bf16 numbers, ties to even, in the upper halves; NaN stays NaN. The lower halves are to be ignored.
UNSPOOL_TARGET inline Ints rounded(Vec x) {
    const Ints bits = (Ints)x, odd = (bits >> 16) & set_ints(1);
    return where_nan(x, bits | set_ints(0x400000), bits + odd + set_ints(0x7fff));
}

// An element type: `load` and `store` numbers in their order. A line is as many bytes as a vector, whose numbers come as
// `kParts` vectors in the order that is cheapest: bf16 as those at even and those at odd places. Of a line, `words` of 32
// bits are read or written.
struct Fp32 {
    using Number = float;
    static constexpr int kParts = 1;
    UNSPOOL_TARGET static Vec load(const float* from, i64 there = kWidth) { return UNSPOOL_LEVEL::load(from, there); }
    UNSPOOL_TARGET static void store(float* to, Vec x, i64 there = kWidth) { UNSPOOL_LEVEL::store(to, x, there); }
    // What `load` would give after `store`.
    UNSPOOL_TARGET static Vec as_stored(Vec x) { return x; }
    UNSPOOL_TARGET static void load_line(const float* from, i64 words, Vec (&parts)[kParts]) { parts[0] = load(from, words); }
    UNSPOOL_TARGET static void store_line(float* to, i64 words, const Vec (&parts)[kParts]) { store(to, parts[0], words); }
};

struct Bf16 {
    using Number = bf16;
    static constexpr int kParts = 2;
    UNSPOOL_TARGET static Vec load(const bf16* from, i64 there = kWidth) { return (Vec)load_bf16(from, there); }
#if defined(UNSPOOL_PAIRED)
    // The processor's own rounding. Numbers too small to be normal become 0, as they do in its products.
    UNSPOOL_TARGET static void store(bf16* to, Vec x, i64 there = kWidth) { store_halves(to, halves(x), there); }
    UNSPOOL_TARGET static Vec as_stored(Vec x) { return widened(halves(x)); }
#else
    UNSPOOL_TARGET static void store(bf16* to, Vec x, i64 there = kWidth) { store_upper(to, rounded(x), there); }
    UNSPOOL_TARGET static Vec as_stored(Vec x) { return (Vec)upper_halves(rounded(x)); }
#endif
    UNSPOOL_TARGET static void load_line(const bf16* from, i64 words, Vec (&parts)[kParts]) {
        const Ints both = load_ints(from, words);
        parts[0] = (Vec)(both << 16);
        parts[1] = (Vec)upper_halves(both);
    }
    UNSPOOL_TARGET static void store_line(bf16* to, i64 words, const Vec (&parts)[kParts]) {
        store_ints(to, (rounded(parts[0]) >> 16) | upper_halves(rounded(parts[1])), words);
    }
};

// Sums of nothing. An initialiser would make gcc fill memory beside the registers.
template <int Rows, int Columns>
UNSPOOL_TARGET inline void clear(Vec (&sums)[Rows][Columns]) {
#pragma GCC unroll 48
    for (int i = 0; i < Rows * Columns; i++) sums[i / Columns][i % Columns] = Vec{};
}

// e to the power of x, within 2 units in the last place; 0 below -104, infinity above 89, NaN of NaN.
UNSPOOL_TARGET inline Vec exponential(Vec x) {
    x = max(set(-120.0f), min(set(120.0f), x));
    const Vec n = nearest(x * set(1.442695041f));
    Vec r = fma_minus(n, set(0.693359375f), x);  // ln 2 in two parts (Cody and Waite, 1980)
    r = fma_minus(n, set(-2.12194440e-4f), r);
    Vec p = set(1.0f / 720);                     // Taylor series for |r| <= ln 2 / 2
    p = fma(p, r, set(1.0f / 120));
    p = fma(p, r, set(1.0f / 24));
    p = fma(p, r, set(1.0f / 6));
    p = fma(p, r, set(0.5f));
    p = fma(p, r, set(1.0f));
    p = fma(p, r, set(1.0f));
    return times_power(p, n);
}

}  // namespace unspool::UNSPOOL_LEVEL

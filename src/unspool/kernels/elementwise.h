// What stands between a decoder's products: norms, the residual sum, rotary turns and the gate of the feed-forward.
// Numbers are bf16 or fp32, arithmetic is fp32, and results are rounded where PyTorch's single operations round them.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace unspool::UNSPOOL_LEVEL::elementwise {
namespace {

constexpr i64 kSerial = 8 << 10;  // up to so many numbers, starting threads costs more than it saves

constexpr i64 rest(i64 count, i64 at) { return std::min(count - at, kWidth); }

// x * weight / sqrt(mean(x^2) + eps), rounded also before the weight. Where there is a branch, x is first added to it.
template <class T>
UNSPOOL_TARGET void norm_row(const typename T::Number* x, typename T::Number* branch, const typename T::Number* weight,
                             i64 width, float eps, typename T::Number* out) {
    Vec squares = Vec{};
    for (i64 i = 0; i < width; i += kWidth) {
        const i64 there = rest(width, i);
        Vec number = T::load(x + i, there);
        if (branch) {
            number = T::as_stored(T::load(branch + i, there) + number);
            T::store(branch + i, number, there);
        }
        squares = fma(number, number, squares);
    }
    const float mean = UNSPOOL_LEVEL::sum(squares) / static_cast<float>(width);
    const Vec factor = set(1.0f / std::sqrt(mean + eps));
    for (i64 i = 0; i < width; i += kWidth) {
        const i64 there = rest(width, i);
        const Vec normal = T::as_stored(T::load((branch ? branch : x) + i, there) * factor);
        T::store(out + i, normal * T::load(weight + i, there), there);
    }
}

template <class T>
void norm(const void* x, void* branch, const void* weight, i64 rows, i64 width, float eps, void* out, int threads) {
    using Number = typename T::Number;
    parallel_for(rows * width > kSerial ? threads : 1, rows, [=](i64 row) {
        norm_row<T>(static_cast<const Number*>(x) + row * width,
                    branch ? static_cast<Number*>(branch) + row * width : nullptr, static_cast<const Number*>(weight),
                    width, eps, static_cast<Number*>(out) + row * width);
    });
}

// The norm of each of a token's first `parts` times `width` numbers, in place.
template <class T>
void norm_parts(void* x, i64 tokens, i64 stride, i64 parts, i64 width, const void* weight, float eps, int threads) {
    using Number = typename T::Number;
    parallel_for(tokens * parts * width > kSerial ? threads : 1, tokens, [=](i64 token) {
        Number* part = static_cast<Number*>(x) + token * stride;
        for (i64 i = 0; i < parts; i++, part += width)
            norm_row<T>(part, nullptr, static_cast<const Number*>(weight), width, eps, part);
    });
}

// branch * factor + x of a span of numbers, to the branch, rounded after each; where there is no x, none is added.
template <class T>
UNSPOOL_TARGET void add_span(const typename T::Number* x, typename T::Number* branch, float factor, i64 count) {
    const Vec all = set(factor);
    for (i64 i = 0; i < count; i += kWidth) {
        const i64 there = rest(count, i);
        Vec number = T::load(branch + i, there);
        if (factor != 1.0f) number = T::as_stored(number * all);
        T::store(branch + i, x ? T::load(x + i, there) + number : number, there);
    }
}

template <class T>
void add(const void* x, void* branch, float factor, i64 rows, i64 width, int threads) {
    using Number = typename T::Number;
    parallel_for(rows * width > kSerial ? threads : 1, rows, [=](i64 row) {
        add_span<T>(x ? static_cast<const Number*>(x) + row * width : nullptr, static_cast<Number*>(branch) + row * width,
                    factor, width);
    });
}

// The place of a row's greatest number, the first of equal ones, and its share: exp(greatest) by the sum of all. -1 where
// the row holds NaN or no number above -infinity.
template <class T>
UNSPOOL_TARGET i64 greatest_of(const typename T::Number* row, i64 width, float* share) {
    const Vec nothing = set(-std::numeric_limits<float>::infinity());
    Vec most = nothing;
    bool nan = false;
    for (i64 i = 0; i < width; i += kWidth) {
        const i64 there = rest(width, i);
        const Vec number = within(0, there, T::load(row + i, there), nothing);
        nan = nan || any_nan(number);
        most = max(most, number);
    }
    const float greatest = UNSPOOL_LEVEL::greatest(most);
    if (share) *share = 0.0f;
    if (nan || !(greatest > -std::numeric_limits<float>::infinity())) return -1;
    i64 place = -1;
    Vec sum = Vec{};
    for (i64 i = 0; i < width; i += kWidth) {
        const i64 there = rest(width, i);
        const Vec number = within(0, there, T::load(row + i, there), nothing);
        if (place < 0)
            for (i64 j = 0; j < there && place < 0; j++)
                if (number[j] == greatest) place = i + j;
        if (share) sum = sum + exponential(number - set(greatest));
        else if (place >= 0) break;
    }
    if (share) *share = 1.0f / UNSPOOL_LEVEL::sum(sum);
    return place;
}

template <class T>
void greatest(const void* x, i64 rows, i64 width, i64* places, float* shares, int threads) {
    using Number = typename T::Number;
    parallel_for(rows * width > kSerial ? threads : 1, rows, [=](i64 row) {
        places[row] = greatest_of<T>(static_cast<const Number*>(x) + row * width, width, shares ? shares + row : nullptr);
    });
}

// silu(gate) * up of one row, which holds the gate and then `up`.
template <class T>
UNSPOOL_TARGET void gate_row(const typename T::Number* row, i64 width, typename T::Number* out) {
    for (i64 i = 0; i < width; i += kWidth) {
        const i64 there = rest(width, i);
        const Vec x = T::load(row + i, there);
        const Vec grown = exponential(Vec{} - x);
        const Vec gate = T::as_stored(x / (set(1.0f) + grown));
        T::store(out + i, gate * T::load(row + width + i, there), there);
    }
}

template <class T>
void gate(const void* x, i64 rows, i64 width, void* out, int threads) {
    using Number = typename T::Number;
    parallel_for(rows * width > kSerial ? threads : 1, rows, [=](i64 row) {
        gate_row<T>(static_cast<const Number*>(x) + row * 2 * width, width, static_cast<Number*>(out) + row * width);
    });
}

// Turns the heads of one token: numbers i and i + width / 2 of a head are a pair.
template <class T>
UNSPOOL_TARGET void turn_token(typename T::Number* x, i64 heads, i64 dim, const typename T::Number* cos,
                               const typename T::Number* sin, i64 width) {
    const i64 half = width / 2;
    for (i64 i = 0; i < half; i += kWidth) {
        const i64 there = rest(half, i);
        const Vec low_cos = T::load(cos + i, there), high_cos = T::load(cos + half + i, there);
        const Vec low_sin = T::load(sin + i, there), high_sin = T::load(sin + half + i, there);
        for (i64 head = 0; head < heads; head++) {
            typename T::Number *low = x + head * dim + i, *high = low + half;
            const Vec a = T::load(low, there), b = T::load(high, there);
            T::store(low, T::as_stored(a * low_cos) + T::as_stored(b * low_sin), there);
            T::store(high, T::as_stored(b * high_cos) + T::as_stored(a * high_sin), there);
        }
    }
}

template <class T>
void turn(void* x, i64 tokens, i64 stride, i64 heads, i64 dim, const void* cos, const void* sin, i64 width, int threads) {
    using Number = typename T::Number;
    parallel_for(tokens * heads * width > kSerial ? threads : 1, tokens, [=](i64 token) {
        turn_token<T>(static_cast<Number*>(x) + token * stride, heads, dim, static_cast<const Number*>(cos) + token * width,
                      static_cast<const Number*>(sin) + token * width, width);
    });
}

}  // namespace

inline void rms_norm(int bytes, const void* x, void* branch, const void* weight, i64 rows, i64 width, float eps, void* out,
                     int threads) {
    (bytes == 2 ? norm<Bf16> : norm<Fp32>)(x, branch, weight, rows, width, eps, out, threads);
}

inline void norm_parts(int bytes, void* x, i64 tokens, i64 stride, i64 parts, i64 width, const void* weight, float eps,
                       int threads) {
    (bytes == 2 ? norm_parts<Bf16> : norm_parts<Fp32>)(x, tokens, stride, parts, width, weight, eps, threads);
}

inline void add(int bytes, const void* x, void* branch, float factor, i64 rows, i64 width, int threads) {
    (bytes == 2 ? add<Bf16> : add<Fp32>)(x, branch, factor, rows, width, threads);
}

inline void greatest(int bytes, const void* x, i64 rows, i64 width, i64* places, float* shares, int threads) {
    (bytes == 2 ? greatest<Bf16> : greatest<Fp32>)(x, rows, width, places, shares, threads);
}

inline void silu_gate(int bytes, const void* x, i64 rows, i64 width, void* out, int threads) {
    (bytes == 2 ? gate<Bf16> : gate<Fp32>)(x, rows, width, out, threads);
}

inline void turn(int bytes, void* x, i64 tokens, i64 stride, i64 heads, i64 dim, const void* cos, const void* sin,
                 i64 width, int threads) {
    (bytes == 2 ? turn<Bf16> : turn<Fp32>)(x, tokens, stride, heads, dim, cos, sin, width, threads);
}

}  // namespace unspool::UNSPOOL_LEVEL::elementwise

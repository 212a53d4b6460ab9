// What stands between a decoder's products: norms, the residual sum, rotary turns and the gate of the feed-forward.
// Numbers are bf16 or fp32, arithmetic is fp32, and results are rounded where PyTorch's single operations round them.

#include "parallel.h"
#include "simd.h"

#include <algorithm>
#include <cmath>

#if defined(__x86_64__)

namespace unspool {
namespace {

constexpr i64 kSerial = 8 << 10;  // up to so many numbers, starting threads costs more than it saves

constexpr __mmask16 rest(i64 count, i64 at) {
    return static_cast<__mmask16>((1u << std::min(count - at, kLanes)) - 1);
}

// x * weight / sqrt(mean(x^2) + eps), rounded also before the weight. Where there is a branch, x is first added to it.
template <class T>
UNSPOOL_AVX512 void norm_row(const typename T::Number* x, typename T::Number* branch, const typename T::Number* weight,
                             i64 width, float eps, typename T::Number* out) {
    __m512 squares = _mm512_setzero_ps();
    for (i64 i = 0; i < width; i += kLanes) {
        const __mmask16 there = rest(width, i);
        __m512 number = T::load(x + i, there);
        if (branch) {
            number = T::as_stored(_mm512_add_ps(T::load(branch + i, there), number));
            T::store(branch + i, number, there);
        }
        squares = _mm512_fmadd_ps(number, number, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
    for (i64 i = 0; i < width; i += kLanes) {
        const __mmask16 there = rest(width, i);
        const __m512 normal = T::as_stored(_mm512_mul_ps(T::load((branch ? branch : x) + i, there), factor));
        T::store(out + i, _mm512_mul_ps(normal, T::load(weight + i, there)), there);
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

// silu(gate) * up of one row, which holds the gate and then `up`.
template <class T>
UNSPOOL_AVX512 void gate_row(const typename T::Number* row, i64 width, typename T::Number* out) {
    for (i64 i = 0; i < width; i += kLanes) {
        const __mmask16 there = rest(width, i);
        const __m512 x = T::load(row + i, there);
        const __m512 grown = exponential(_mm512_sub_ps(_mm512_setzero_ps(), x));
        const __m512 gate = T::as_stored(_mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), grown)));
        T::store(out + i, _mm512_mul_ps(gate, T::load(row + width + i, there)), there);
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
UNSPOOL_AVX512 void turn_token(typename T::Number* x, i64 heads, i64 dim, const typename T::Number* cos,
                               const typename T::Number* sin, i64 width) {
    const i64 half = width / 2;
    for (i64 i = 0; i < half; i += kLanes) {
        const __mmask16 there = rest(half, i);
        const __m512 low_cos = T::load(cos + i, there), high_cos = T::load(cos + half + i, there);
        const __m512 low_sin = T::load(sin + i, there), high_sin = T::load(sin + half + i, there);
        for (i64 head = 0; head < heads; head++) {
            typename T::Number *low = x + head * dim + i, *high = low + half;
            const __m512 a = T::load(low, there), b = T::load(high, there);
            T::store(low, _mm512_add_ps(T::as_stored(_mm512_mul_ps(a, low_cos)), T::as_stored(_mm512_mul_ps(b, low_sin))),
                     there);
            T::store(high,
                     _mm512_add_ps(T::as_stored(_mm512_mul_ps(b, high_cos)), T::as_stored(_mm512_mul_ps(a, high_sin))),
                     there);
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
}  // namespace unspool
#endif

// `bytes` of a number: 2 (bf16) or 4 (fp32).
extern "C" {

// Root mean square norm of `x` [rows, width] to `out`, which may be `x`. Where `branch` [rows, width] is not null, it
// becomes branch + x and its norm is taken.
void unspool_rms_norm(int bytes, const void* x, void* branch, const void* weight, std::int64_t rows, std::int64_t width,
                      float eps, void* out, int threads) {
#if defined(__x86_64__)
    using namespace unspool;
    (bytes == 2 ? norm<Bf16> : norm<Fp32>)(x, branch, weight, rows, width, eps, out, threads);
#endif
}

// silu(gate) * up of `x` [rows, 2 * width] = [gate, up], to `out` [rows, width].
void unspool_silu_gate(int bytes, const void* x, std::int64_t rows, std::int64_t width, void* out, int threads) {
#if defined(__x86_64__)
    using namespace unspool;
    (bytes == 2 ? gate<Bf16> : gate<Fp32>)(x, rows, width, out, threads);
#endif
}

// Rotary turn in place of the first `width` numbers of every head: `x` [tokens, heads, dim], tokens `stride` numbers
// apart; `cos` and `sin` [tokens, width], the first half of the sines negated.
void unspool_turn(int bytes, void* x, std::int64_t tokens, std::int64_t stride, std::int64_t heads, std::int64_t dim,
                  const void* cos, const void* sin, std::int64_t width, int threads) {
#if defined(__x86_64__)
    using namespace unspool;
    (bytes == 2 ? turn<Bf16> : turn<Fp32>)(x, tokens, stride, heads, dim, cos, sin, width, threads);
#endif
}

}  // extern "C"

// Products of a few rows with a bf16 weight as PyTorch keeps it, [outputs, inputs]: for modules whose weights are not
// ours to pack. At a few rows they run at the speed of memory.
//
// A dot-product instruction takes 32 inputs of one output, so a sum's lanes are added at the end. Which lanes, and in
// which order, is the same for any number of rows and threads: a row's results are the same bits alone and in company.

#include "parallel.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the "undefined" operands inside its own intrinsics for ours
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define UNSPOOL_PLAIN __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace unspool {
namespace {

using bf16 = std::uint16_t;

constexpr i64 kLanes = 16;
constexpr i64 kInputs = 32;       // of one instruction
constexpr int kMostRows = 8;      // of a tile
constexpr i64 kSerial = 1 << 16;  // up to so many products, starting threads costs more than it saves

struct Product {
    const bf16* weight;
    const bf16* bias;  // may be null
    bf16* out;
    i64 outputs, inputs;
};

// Outputs of a tile: with its rows, at most 24 sums in registers.
constexpr int wide(int rows) { return rows <= 3 ? 8 : rows == 4 ? 6 : rows <= 6 ? 4 : 3; }

// Lane j of the result is the sum of the lanes of x[j], always in the same order.
UNSPOOL_PLAIN inline __m512 sums_of(const __m512 (&x)[kLanes]) {
    __m512 fours[4];  // within each quarter, one sum for each of four
    for (int i = 0; i < 4; i++) {
        const __m512 *v = x + 4 * i;
        const __m512d a = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1])));
        const __m512d b = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3])));
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 pairs[2];
    for (int i = 0; i < 2; i++) {
        const __m512 a = fours[2 * i], b = fours[2 * i + 1];
        pairs[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(pairs[0], pairs[1], 0x88), _mm512_shuffle_f32x4(pairs[0], pairs[1], 0xdd));
}

// Adds the products of some inputs to the sums.
template <int Rows, int Outputs>
UNSPOOL_PLAIN inline void accumulate(__m512 (&sums)[Rows][Outputs], const bf16* weight, i64 inputs, const bf16* x,
                                    i64 stride, __mmask32 there) {
    __m512bh lines[Outputs];
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; o++) lines[o] = (__m512bh)_mm512_maskz_loadu_epi16(there, weight + o * inputs);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
        const __m512bh some = (__m512bh)_mm512_maskz_loadu_epi16(there, x + r * stride);
#pragma GCC unroll 8
        for (int o = 0; o < Outputs; o++) sums[r][o] = _mm512_dpbf16_ps(sums[r][o], lines[o], some);
    }
}

// Some rows and outputs, all inputs: added up, with the bias, rounded and written.
template <int Rows, int Outputs>
UNSPOOL_PLAIN void tile(const Product& p, i64 output, i64 row, const bf16* x, i64 stride) {
    __m512 sums[Rows][Outputs] = {};
    const bf16* weight = p.weight + output * p.inputs;
    i64 i = 0;
    for (; i + kInputs <= p.inputs; i += kInputs)
        accumulate<Rows, Outputs>(sums, weight + i, p.inputs, x + i, stride, 0xffffffffu);
    if (i < p.inputs)
        accumulate<Rows, Outputs>(sums, weight + i, p.inputs, x + i, stride, (1u << (p.inputs - i)) - 1);
    constexpr int count = Rows * Outputs, parts = (count + kLanes - 1) / kLanes;
    bf16 results[parts * kLanes];
#pragma GCC unroll 2
    for (int part = 0; part < parts; part++) {
        __m512 some[kLanes] = {};
        float bias[kLanes] = {};
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; j++) {
            const int at = part * kLanes + j;
            if (at < count) some[j] = sums[at / Outputs][at % Outputs];
        }
        __m512 total = sums_of(some);
        if (p.bias) {
            for (int j = 0; j < kLanes && part * kLanes + j < count; j++) {
                const std::uint32_t bits = std::uint32_t{p.bias[output + (part * kLanes + j) % Outputs]} << 16;
                __builtin_memcpy(&bias[j], &bits, sizeof bits);
            }
            total = _mm512_add_ps(total, _mm512_loadu_ps(bias));
        }
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(total);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(results + part * kLanes), rounded);
    }
    for (int r = 0; r < Rows; r++)
        __builtin_memcpy(p.out + (row + r) * p.outputs + output, results + r * Outputs, Outputs * sizeof(bf16));
}

using Tile = void (*)(const Product&, i64, i64, const bf16*, i64);

template <int... Rows>
Tile tile_of(i64 rows, bool whole, std::integer_sequence<int, Rows...>) {
    static constexpr Tile wides[] = {tile<Rows + 1, wide(Rows + 1)>...}, narrow[] = {tile<Rows + 1, 1>...};
    return (whole ? wides : narrow)[rows - 1];
}

// Outputs `from` to `to` of all rows, in tiles of one height, which may overlap; all but the first find the weights in the
// cache.
void span(const Product& p, const bf16* x, i64 stride, i64 rows, i64 from, i64 to) {
    const i64 tiles = (rows + kMostRows - 1) / kMostRows, height = (rows + tiles - 1) / tiles;
    const int width = wide(static_cast<int>(height));
    const auto every = std::make_integer_sequence<int, kMostRows>{};
    for (i64 output = from; output < to;) {
        const bool whole = to - output >= width;
        const Tile run = tile_of(height, whole, every);
        for (i64 t = 0; t < tiles; t++) {
            const i64 row = std::min(t * height, rows - height);
            run(p, output, row, x + row * stride, stride);
        }
        output += whole ? width : 1;
    }
}

}  // namespace
}  // namespace unspool
#endif

extern "C" {

// y [rows, outputs] = x [rows, inputs] times the weight [outputs, inputs], plus `bias` [outputs] where it is not null.
// Numbers of a row of x lie together and rows `stride` apart; weight and y are contiguous.
void unspool_plain_bf16([[maybe_unused]] const std::uint16_t* weight, [[maybe_unused]] std::int64_t outputs,
                        [[maybe_unused]] std::int64_t inputs, [[maybe_unused]] const std::uint16_t* x,
                        [[maybe_unused]] std::int64_t stride, [[maybe_unused]] const std::uint16_t* bias,
                        [[maybe_unused]] std::uint16_t* y, [[maybe_unused]] std::int64_t rows,
                        [[maybe_unused]] int threads) {
#if defined(__x86_64__)
    using namespace unspool;
    const Product p{weight, bias, y, outputs, inputs};
    if (rows * outputs * inputs <= kSerial) threads = 1;
    parallel(threads, [&](int thread, int team) {
        span(p, x, stride, rows, outputs * thread / team, outputs * (thread + 1) / team);
    });
#endif
}

}  // extern "C"

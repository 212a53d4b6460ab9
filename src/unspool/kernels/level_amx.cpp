// The kernels for processors with AMX, its bf16 and its int8: products by tiles, from the same packed weights as on
// every other level, whose sixteen lines are just a tile. All else is the level below's.
//
// bf16 products are always by tiles, for one row too, since a tile adds in an order of its own; of bytes every level's
// sums are the same bits, and tiles pay from a few rows on. A number of the result is one chain of operations in the order
// of the inputs, wherever its row stands, so a row's results are the same bits alone and in company.

#if defined(__x86_64__)

#define UNSPOOL_LEVEL amx
#define UNSPOOL_AVX512 "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16"
#if defined(UNSPOOL_EMULATE)
#define UNSPOOL_TARGET __attribute__((target(UNSPOOL_AVX512)))
#else
#define UNSPOOL_TARGET __attribute__((target(UNSPOOL_AVX512 ",amx-tile,amx-bf16,amx-int8")))
#endif

#include "simd_avx512.h"

#include "levels.h"
#include "numbers.h"
#include "products.h"

#include "simd_tiles.h"

#include <cmath>

namespace unspool::amx {
namespace {

using products::Result;

constexpr i64 kTile = 16;        // rows of a tile of activations or sums; lines of one of weights
constexpr i64 kBytes = 64;       // bytes of a tile's row: inputs that one instruction takes
constexpr i64 kMostBlocks = 4;   // of one step's sums
constexpr i64 kFewRows = 8;      // from so many rows of bytes, tiles are faster
constexpr i64 kMostChunk = 256;  // rows that are gone through for each panel of weights
constexpr i64 kLeastChunk = 32;
constexpr i64 kSerial = 1 << 16;

// A weight, as bytes.
struct Lines {
    const u8* lines;
    i64 stride;       // bytes of a block
    i64 count;        // lines of a block
    i64 outputs, blocks;
};

// Sums of up to two tiles of rows and up to four blocks.
template <class Number>
struct alignas(64) Sums {
    Number at[2 * kTile][kMostBlocks * kLanes];
};

// ---- Tiles --------------------------------------------------------------------------------------------------------

// Sums are tiles 0 to 3, activations 4 (and 5), weights the others: two tiles of rows by two blocks, or one by four.
template <int Rows>
tiles::Shape shape_of(i64 count) {
    tiles::Shape shape;
    for (int tile = 0; tile < 8; tile++) shape.set(tile, kTile);
    if (Rows == 1) {
        for (int tile = 0; tile < 5; tile++) shape.set(tile, count);
        return shape;
    }
    for (const int tile : {2, 3, 5}) shape.set(tile, count - kTile);
    return shape;
}

template <bool Integers, int Rows, int Block>
UNSPOOL_TARGET inline void add_block(const u8* lines) {
    constexpr int kWeights = Rows == 2 ? 6 + Block % 2 : 5 + Block % 3;
    tiles::load<kWeights>(lines, kBytes);
    if constexpr (Integers) {
        tiles::dot_bytes<Block, 4, kWeights>();
        if constexpr (Rows == 2) tiles::dot_bytes<2 + Block, 5, kWeights>();
    } else {
        tiles::dot_bf16<Block, 4, kWeights>();
        if constexpr (Rows == 2) tiles::dot_bf16<2 + Block, 5, kWeights>();
    }
}

// Adds the products of the rows' 64 bytes at `x` and sixteen lines of each block.
template <bool Integers, int Rows, int Blocks>
UNSPOOL_TARGET inline void add(const u8* x, i64 x_stride, const u8* lines, i64 stride) {
    tiles::load<4>(x, x_stride);
    if constexpr (Rows == 2) tiles::load<5>(x + kTile * x_stride, x_stride);
    add_block<Integers, Rows, 0>(lines);
    add_block<Integers, Rows, 1>(lines + stride);
    if constexpr (Blocks == 4) {
        add_block<Integers, Rows, 2>(lines + 2 * stride);
        add_block<Integers, Rows, 3>(lines + 3 * stride);
    }
}

template <int Rows, int Blocks>
UNSPOOL_TARGET inline void clear() {
    tiles::zero<0>();
    tiles::zero<1>();
    if constexpr (Rows * Blocks == 4) {
        tiles::zero<2>();
        tiles::zero<3>();
    }
}

template <int Rows, int Blocks, class Number>
UNSPOOL_TARGET inline void keep(Sums<Number>& sums) {
    constexpr i64 kStride = sizeof sums.at[0];
    tiles::store<0>(&sums.at[0][0], kStride);
    tiles::store<1>(&sums.at[0][kLanes], kStride);
    if constexpr (Rows == 2) {
        tiles::store<2>(&sums.at[kTile][0], kStride);
        tiles::store<3>(&sums.at[kTile][kLanes], kStride);
    } else if constexpr (Blocks == 4) {
        tiles::store<2>(&sums.at[0][2 * kLanes], kStride);
        tiles::store<3>(&sums.at[0][3 * kLanes], kStride);
    }
}

// Sums times the outputs' units, plus the bias, rounded.
UNSPOOL_TARGET inline void finish(const Lines& w, const float* units, const Result& to, i64 block, i64 blocks, i64 row, i64 rows,
                                  const Sums<float>& sums) {
    for (i64 b = 0; b < blocks; b++) {
        const i64 first = (block + b) * kLanes, there = std::min(w.outputs - first, kLanes);
        if (there <= 0) return;
        const Vec unit = units ? load(units + first) : set(1.0f);
        const Vec bias = to.bias ? products::numbers(to.bias, to.wide, first, there) : Vec{};
        for (i64 r = 0; r < rows; r++) {
            const Vec sum = load(&sums.at[r][b * kLanes]) * unit + bias;
            const i64 at = (row + r) * w.outputs + first;
            if (to.wide)
                store(static_cast<float*>(to.y) + at, sum, there);
            else  // as the level below rounds
                _mm256_mask_storeu_epi16(static_cast<bf16*>(to.y) + at, lanes(there), (__m256i)_mm512_cvtneps_pbh(sum));
        }
    }
}

// ---- Kinds of weight ----------------------------------------------------------------------------------------------

// Each gives the sums of `rows` rows (two tiles or one) from `row` on and of some blocks.

struct Halves {
    const Lines& w;
    const u8* x;     // bf16 rows
    i64 x_stride;    // bytes
    const u8* rest;  // [rows][64]: what is left of the rows' inputs after whole tiles, then zeros

    template <int Rows, int Blocks>
    UNSPOOL_TARGET void sums(i64 block, i64 row, i64, Sums<float>& out) const {
        const u8* lines = w.lines + block * w.stride;
        const i64 steps = w.count / kTile, left = w.count % kTile;
        clear<Rows, Blocks>();
        for (i64 step = 0; step < steps; step++)
            add<false, Rows, Blocks>(x + row * x_stride + step * kBytes, x_stride, lines + step * kTile * kBytes, w.stride);
        if (left) {
            alignas(64) u8 last[Blocks][kTile * kBytes] = {};
            for (i64 b = 0; b < Blocks; b++)
                std::memcpy(last[b], lines + b * w.stride + steps * kTile * kBytes, static_cast<std::size_t>(left * kBytes));
            add<false, Rows, Blocks>(rest + row * kBytes, kBytes, last[0], sizeof last[0]);
        }
        keep<Rows, Blocks>(out);
    }
};

struct Whole {
    const Lines& w;
    const u8* x;                 // [rows][groups][64]
    const float* scales;         // [rows][groups]
    const std::int32_t* starts;
    i64 groups;

    template <int Rows, int Blocks>
    UNSPOOL_TARGET void sums(i64 block, i64 row, i64 rows, Sums<float>& out) const {
        const u8* lines = w.lines + block * w.stride;
        Sums<std::int32_t> part;
        for (i64 r = 0; r < rows; r++)
            for (i64 b = 0; b < Blocks; b++) store(&out.at[r][b * kLanes], Vec{});
        for (i64 group = 0; group < groups; group++) {
            clear<Rows, Blocks>();
            add<true, Rows, Blocks>(x + (row * groups + group) * kBytes, groups * kBytes, lines + group * kTile * kBytes, w.stride);
            keep<Rows, Blocks>(part);
            for (i64 r = 0; r < rows; r++) {
                const i64 at = (row + r) * groups + group;
                const Vec scale = set(scales[at]);
                const Ints start = set_ints(static_cast<std::uint32_t>(starts[at]));
                for (i64 b = 0; b < Blocks; b++) {
                    float* total = &out.at[r][b * kLanes];
                    store(total, fma(from_integers(load_ints(&part.at[r][b * kLanes]) + start), scale, load(total)));
                }
            }
        }
    }
};

// ---- All rows -----------------------------------------------------------------------------------------------------

// Shapes are loaded where they change: a chunk has at most two.
template <int Rows>
void reshape(i64 count, i64& now) {
    const i64 wanted = Rows == 1 ? count : kTile + count;
    if (now == wanted) return;
    tiles::configure(shape_of<Rows>(count));
    now = wanted;
}

// Rows [first, end) by some blocks: two or four.
template <class Kind>
UNSPOOL_TARGET void some(const Kind& kind, const float* units, const Result& to, i64 block, i64 blocks, i64 first, i64 end,
                         i64& shape) {
    Sums<float> sums;
    for (i64 row = first, rows; row < end; row += rows) {
        rows = std::min(end - row, 2 * kTile);
        if (rows > kTile) {
            reshape<2>(rows, shape);
            for (i64 b = 0; b < blocks; b += 2) {
                kind.template sums<2, 2>(block + b, row, rows, sums);
                finish(kind.w, units, to, block + b, 2, row, rows, sums);
            }
            continue;
        }
        reshape<1>(rows, shape);
        if (blocks == 4)
            kind.template sums<1, 4>(block, row, rows, sums);
        else
            kind.template sums<1, 2>(block, row, rows, sums);
        finish(kind.w, units, to, block, blocks, row, rows, sums);
    }
}

// One thread's part: some of the panels of two blocks, for some chunks of rows.
template <class Kind>
void part(const Kind& kind, const float* units, const Result& to, i64 rows, int thread, int team) {
    const i64 panels = kind.w.blocks / kPanel;
    i64 chunk = kMostChunk;
    while (chunk > kLeastChunk && (rows + chunk - 1) / chunk * panels < 4 * team) chunk /= 2;
    const i64 items = (rows + chunk - 1) / chunk * panels, end = items * (thread + 1) / team;
    i64 shape = 0;
    for (i64 item = items * thread / team, wide; item < end; item += wide) {
        const i64 first = item / panels * chunk, panel = item % panels;
        wide = panel + 1 < panels && item + 1 < end ? 2 : 1;
        some(kind, units, to, panel * kPanel, wide * kPanel, first, std::min(rows, first + chunk), shape);
    }
    tiles::release();
}

void linear(const PackedWeight* weight, const bf16* x, i64 stride, const bf16* bias, bf16* y, i64 rows, int threads) {
    const i64 pairs = weight->inputs / 2, left = pairs % kTile, whole = pairs - left;
    const Lines w{reinterpret_cast<const u8*>(weight->lines), pairs * kBytes, pairs, weight->outputs, blocks_of(weight->outputs)};
    u8* rest = products::scratch<u8>(left ? rows * kBytes : 0);
    for (i64 row = 0; left && row < rows; row++) {
        std::memset(rest + row * kBytes, 0, kBytes);
        std::memcpy(rest + row * kBytes, x + row * stride + 2 * whole, static_cast<std::size_t>(4 * left));
    }
    const Halves kind{w, reinterpret_cast<const u8*>(x), 2 * stride, rest};
    if (rows * w.outputs * pairs <= kSerial) threads = 1;
    parallel(threads, [&](int thread, int team) { part(kind, nullptr, {y, bias, false}, rows, thread, team); });
}

void quantised(const QuantisedWeight* weight, const void* x, i64 stride, const void* bias, void* y, i64 rows, int wide_x,
               int wide_y, int threads) {
    const QuantisedWeight& q = *weight;
    if (q.nibbles || rows < kFewRows)
        return quantised_avx512_bf16(weight, x, stride, bias, y, rows, wide_x, wide_y, threads);
    const i64 groups = q.width() / kByteGroup;
    u8* bytes = products::scratch<u8>(rows * q.width());
    float* scales = products::scratch<float>(rows * groups);
    std::int32_t* starts = products::scratch<std::int32_t>(rows * groups);
    const Lines w{q.lines, q.lines_of_block() * kBytes, q.lines_of_block(), q.outputs, q.blocks()};
    const Whole kind{w, bytes, scales, starts, groups};
    if (rows * w.outputs * groups * kByteGroup <= kSerial) threads = 1;
    parallel(threads, [&](int thread, int team) {
        share_out(rows * groups, thread, team, [&](i64 i) {
            const u8* row = static_cast<const u8*>(x) + i / groups * stride * (wide_x ? 4 : 2);
            std::int32_t sum = 0;
            scales[i] = products::quantise(row, wide_x != 0, i % groups * kByteGroup, q.inputs, bytes + i * kByteGroup, &sum);
            starts[i] = -kTooMuch * sum;
        });
        wait_for_team();
        part(kind, q.units, {y, bias, wide_y != 0}, rows, thread, team);
    });
}

Kernels all() {
    Kernels kernels = avx512_bf16::kernels;
    kernels.linear = linear;
    kernels.quantised = quantised;
    return kernels;
}

}  // namespace

const Kernels kernels = all();

// Whole numbers, whose product is exact: 18 rows, so of both shapes, and inputs that are no whole tiles.
bool right() {
    constexpr i64 kRows = 18, kInputs = 70, kOutputs = 32;
    static bf16 lines[kOutputs * kInputs], x[kRows * kInputs], y[kRows * kOutputs];
    const auto number = [](i64 i) { return static_cast<float>(i * 7 % 11 - 5); };
    const auto half = [](float exact) {
        std::uint32_t bits;
        std::memcpy(&bits, &exact, sizeof bits);
        return static_cast<bf16>(bits >> 16);
    };
    for (i64 o = 0; o < kOutputs; o++)
        for (i64 i = 0; i < kInputs; i++)
            lines[(o / kLanes * (kInputs / 2) + i / 2) * 2 * kLanes + 2 * (o % kLanes) + i % 2] = half(number(3 * o + i));
    for (i64 i = 0; i < kRows * kInputs; i++) x[i] = half(static_cast<float>(i * 5 % 3 - 1));
    const PackedWeight weight{lines, kOutputs, kInputs};
    linear(&weight, x, kInputs, nullptr, y, kRows, 1);
    for (i64 row = 0; row < kRows; row++)
        for (i64 o = 0; o < kOutputs; o++) {
            float sum = 0;
            for (i64 i = 0; i < kInputs; i++) sum += static_cast<float>((row * kInputs + i) * 5 % 3 - 1) * number(3 * o + i);
            if (std::fabs(sum) > 256 || y[row * kOutputs + o] != half(sum)) return false;
        }
    return true;
}

}  // namespace unspool::amx
#endif

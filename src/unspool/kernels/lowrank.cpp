// Products with pairs of low-rank bf16 matrices on processors with AVX-512 BF16: y[r] += (x[r] down^T) up^T, where each
// row r has a pair of its own, or none. One call serves all rows of a step.
//
// Layout of `down` [rank, inputs]: [rank / 16][inputs / 2][16 ranks][2 inputs], as of the weights in linear.cpp; ranks
// are padded with zeros. Of `up` [outputs, rank], [outputs / 16][pairs of ranks][16 outputs][2 ranks], a block of 16
// outputs has only the pairs that are not all zero: in a fused layer, those of the projection that it belongs to.
//
// The inputs are cut into sections of the same length for all rows and threads, and each has four chains of dot
// products; what they give is added up in one order. So a row's results are the same bits alone and in company.

#include "parallel.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>


namespace {

using namespace unspool;

using bf16 = std::uint16_t;

struct LowRank {
    const bf16* down;
    const bf16* up;
    const i64* spans;  // [blocks of outputs][3]: the block's first line in `up`, its first pair of ranks, and its last + 1
    i64 rank, inputs, outputs;
};

}  // namespace

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the "undefined" operands inside its own intrinsics for ours
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define UNSPOOL_LOWRANK __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace {

constexpr i64 kLanes = 16;
constexpr i64 kLine = 2 * kLanes;
constexpr i64 kSection = 128;      // pairs of inputs
constexpr i64 kChains = 4;
constexpr i64 kDownRows = 6;       // rows of a tile: rows x chains of sums stay in registers
constexpr i64 kUpRows = 8;
constexpr i64 kUpBlocks = 8;       // blocks of outputs that a thread does together
constexpr i64 kRowsAtOnce = 96;    // rows that a thread takes through a section together
constexpr i64 kReach = 16;         // lines to fetch ahead of use
constexpr i64 kSerial = 1 << 15;   // up to so many products, starting threads costs more than it saves

struct Call {
    const LowRank* const* pairs;  // null: rows without one
    i64 count;
    const i64* starts;            // [count + 1] where the rows of each begin among
    const i64* places;            // the rows of x and y
    const bf16* x;
    i64 stride;
    bf16* y;
    i64 sections, width;          // of the inputs; blocks of the largest rank
    float* parts;                 // [rows][blocks of ranks][sections][16]
    bf16* inner;                  // [rows][blocks of ranks][16]

    i64 part(i64 row, i64 block, i64 section) const { return ((row * width + block) * sections + section) * kLanes; }
};

struct Span {
    i64 from, to;
};

i64 up_to(i64 count, i64 unit) { return (count + unit - 1) / unit; }

// A thread among those of the call.
struct Member {
    i64 thread, team;
    Span share(i64 count) const { return {count * thread / team, count * (thread + 1) / team}; }
};

UNSPOOL_LOWRANK inline __m512bh broadcast(const bf16* pair) {
    int both;
    std::memcpy(&both, pair, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

inline void fetch(const bf16* line) { _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0); }

// A block of ranks and a section of the inputs, for some rows from `row` on.
template <int Rows>
UNSPOOL_LOWRANK void down_tile(const Call& c, const LowRank& pair, i64 block, i64 section, i64 row) {
    const i64 pairs = pair.inputs / 2, first = section * kSection, count = std::min(kSection, pairs - first);
    const bf16* lines = pair.down + (block * pairs + first) * kLine;
    const bf16* x[Rows];
    for (int r = 0; r < Rows; r++) x[r] = c.x + c.places[row + r] * c.stride + 2 * first;
    __m512 sums[Rows][kChains] = {};
    i64 at = 0;
    for (; at + kChains <= count; at += kChains) {
#pragma GCC unroll 4
        for (int chain = 0; chain < kChains; chain++) {
            const bf16* line = lines + (at + chain) * kLine;
            const __m512bh weights = (__m512bh)_mm512_loadu_si512(line);
            fetch(line + kReach * kLine);
#pragma GCC unroll 6
            for (int r = 0; r < Rows; r++)
                sums[r][chain] = _mm512_dpbf16_ps(sums[r][chain], weights, broadcast(x[r] + 2 * (at + chain)));
        }
    }
#pragma GCC unroll 3
    for (int chain = 0; chain < kChains - 1; chain++) {
        if (at + chain >= count) break;
        const __m512bh weights = (__m512bh)_mm512_loadu_si512(lines + (at + chain) * kLine);
#pragma GCC unroll 6
        for (int r = 0; r < Rows; r++)
            sums[r][chain] = _mm512_dpbf16_ps(sums[r][chain], weights, broadcast(x[r] + 2 * (at + chain)));
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; r++) {
        const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[r][0], sums[r][1]), _mm512_add_ps(sums[r][2], sums[r][3]));
        _mm512_storeu_ps(c.parts + c.part(row + r, block, section), sum);
    }
}

// Blocks of outputs, for some rows from `row` on.
template <int Rows>
UNSPOOL_LOWRANK void up_tile(const Call& c, const LowRank& pair, Span blocks, i64 row) {
    const bf16* inner = c.inner + row * c.width * kLanes;
    const i64 step = c.width * kLanes;
    for (i64 block = blocks.from; block < blocks.to; block++) {
        const i64* span = pair.spans + 3 * block;
        const bf16* line = pair.up + span[0] * kLine;
        __m512 sums[Rows] = {};
        for (i64 at = span[1]; at < span[2]; at++, line += kLine) {
            const __m512bh weights = (__m512bh)_mm512_loadu_si512(line);
            fetch(line + kReach * kLine);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; r++)
                sums[r] = _mm512_dpbf16_ps(sums[r], weights, broadcast(inner + r * step + 2 * at));
        }
        const i64 first = block * kLanes, there = std::min(kLanes, pair.outputs - first);
        const __mmask16 mask = static_cast<__mmask16>((1u << there) - 1);
        for (int r = 0; r < Rows; r++) {
            bf16* y = c.y + c.places[row + r] * pair.outputs + first;
            const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, y)), 16);
            const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(bits), sums[r]);
            _mm256_mask_storeu_epi16(y, mask, (__m256i)_mm512_cvtneps_pbh(sum));
        }
    }
}

using DownTile = void (*)(const Call&, const LowRank&, i64, i64, i64);
using UpTile = void (*)(const Call&, const LowRank&, Span, i64);

template <int... Rows>
DownTile down_tile_of(i64 rows, std::integer_sequence<int, Rows...>) {
    static constexpr DownTile tiles[] = {down_tile<Rows + 1>...};
    return tiles[rows - 1];
}

template <int... Rows>
UpTile up_tile_of(i64 rows, std::integer_sequence<int, Rows...>) {
    static constexpr UpTile tiles[] = {up_tile<Rows + 1>...};
    return tiles[rows - 1];
}

// Calls `work(rows, row)` for tiles of at most `most` of the rows, as even as can be.
template <class Work>
void in_tiles(Span rows, i64 most, Work work) {
    const i64 count = rows.to - rows.from, tiles = up_to(count, most);
    for (i64 t = 0; t < tiles; t++) {
        const i64 from = rows.from + count * t / tiles, to = rows.from + count * (t + 1) / tiles;
        work(to - from, from);
    }
}

// This thread's part of x down^T, as sums of sections.
void down(const Call& c, Member me, i64 units) {
    const Span mine = me.share(units);
    i64 unit = 0;
    for (i64 i = 0; i < c.count && unit < mine.to; i++) {
        if (!c.pairs[i]) continue;
        const LowRank& pair = *c.pairs[i];
        for (i64 row = c.starts[i]; row < c.starts[i + 1]; row += kRowsAtOnce) {
            const Span rows{row, std::min(c.starts[i + 1], row + kRowsAtOnce)};
            const i64 here = up_to(pair.rank, kLanes) * c.sections;
            for (i64 u = std::max<i64>(0, mine.from - unit); u < std::min(here, mine.to - unit); u++)
                in_tiles(rows, kDownRows, [&](i64 count, i64 first) {
                    down_tile_of(count, std::make_integer_sequence<int, kDownRows>{})(c, pair, u / c.sections,
                                                                                     u % c.sections, first);
                });
            unit += here;
        }
    }
}

i64 down_units(const Call& c) {
    i64 units = 0;
    for (i64 i = 0; i < c.count; i++)
        if (c.pairs[i])
            units += up_to(c.starts[i + 1] - c.starts[i], kRowsAtOnce) * up_to(c.pairs[i]->rank, kLanes) * c.sections;
    return units;
}

// This thread's rows of x down^T, rounded.
UNSPOOL_LOWRANK void gather(const Call& c, Member me) {
    const Span mine = me.share(c.starts[c.count]);
    for (i64 i = 0; i < c.count; i++) {
        if (!c.pairs[i]) continue;
        const i64 blocks = up_to(c.pairs[i]->rank, kLanes);
        for (i64 row = std::max(mine.from, c.starts[i]); row < std::min(mine.to, c.starts[i + 1]); row++)
            for (i64 block = 0; block < blocks; block++) {
                __m512 sum = _mm512_loadu_ps(c.parts + c.part(row, block, 0));
                for (i64 section = 1; section < c.sections; section++)
                    sum = _mm512_add_ps(sum, _mm512_loadu_ps(c.parts + c.part(row, block, section)));
                bf16* to = c.inner + (row * c.width + block) * kLanes;
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(sum));
            }
    }
}

// This thread's part of the outputs.
void up(const Call& c, Member me, i64 outputs) {
    const i64 blocks = up_to(outputs, kLanes), here = up_to(blocks, kUpBlocks);
    const Span mine = me.share(c.count * here);
    for (i64 unit = mine.from; unit < mine.to; unit++) {
        const i64 i = unit / here, first = unit % here * kUpBlocks;
        if (!c.pairs[i]) continue;
        const Span span{first, std::min(blocks, first + kUpBlocks)};
        in_tiles({c.starts[i], c.starts[i + 1]}, kUpRows, [&](i64 count, i64 row) {
            up_tile_of(count, std::make_integer_sequence<int, kUpRows>{})(c, *c.pairs[i], span, row);
        });
    }
}

// Memory that a call's threads share, kept by the thread that calls.
template <class Number>
Number* scratch(i64 size) {
    thread_local std::vector<Number> memory;
    if (static_cast<i64>(memory.size()) < size) memory.resize(static_cast<std::size_t>(size));
    return memory.data();
}

}  // namespace
#endif

extern "C" {

// Adds to y [rows, outputs] what the pairs make of x [rows, inputs]. Pair i, which may be null, has the rows at
// `places` from starts[i] to starts[i + 1]; no row is named twice. All pairs have the same inputs, an even number, and
// outputs. Numbers of a row of x lie together and rows `stride` apart; y is contiguous.
void unspool_lowrank([[maybe_unused]] const void* const* pairs, [[maybe_unused]] i64 count,
                     [[maybe_unused]] const i64* starts, [[maybe_unused]] const i64* places,
                     [[maybe_unused]] const bf16* x, [[maybe_unused]] i64 stride, [[maybe_unused]] bf16* y,
                     [[maybe_unused]] int threads) {
#if defined(__x86_64__)
    Call c{reinterpret_cast<const LowRank* const*>(pairs), count, starts, places, x, stride, y, 0, 0, nullptr, nullptr};
    i64 inputs = 0, outputs = 0, products = 0;
    for (i64 i = 0; i < count; i++) {
        if (!c.pairs[i]) continue;
        inputs = c.pairs[i]->inputs;
        outputs = c.pairs[i]->outputs;
        c.width = std::max(c.width, up_to(c.pairs[i]->rank, kLanes));
        products += (starts[i + 1] - starts[i]) * c.pairs[i]->rank * (inputs + outputs);
    }
    if (products == 0) return;
    c.sections = up_to(inputs / 2, kSection);
    c.parts = scratch<float>(c.part(starts[count], 0, 0));
    c.inner = scratch<bf16>(starts[count] * c.width * kLanes);
    const i64 units = down_units(c);
    if (products <= kSerial) threads = 1;
    parallel(threads, [&](int thread, int team) {
        const Member me{thread, team};
        down(c, me, units);
        wait_for_team();
        gather(c, me);
        wait_for_team();
        up(c, me, outputs);
    });
#endif
}

}  // extern "C"

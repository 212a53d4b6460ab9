// How bf16 weights are packed, and products with them on processors with AVX-512 BF16: y = x W^T + bias for any number of
// rows, from one packed copy of the weight. At a few rows they run at the speed of memory, at many at about 95 % of the arithmetic's.
//
// Layout of a packed weight [outputs, inputs]: [blocks][inputs / 2][16 outputs][2 inputs]. One 64-byte line is the
// operand of one dot-product instruction: its lanes are outputs, so nothing is ever summed across lanes, and an
// activation is one 32-bit broadcast. Lines are read in the order in which they lie in memory. Outputs are padded with
// zero weights to an even number of blocks.
//
// One number of the result is one chain of dot products in the order of the inputs, whatever the number of rows and of
// threads: partial sums that have to wait in memory wait there in fp32, which changes nothing. So a row's results are
// the same bits alone and in company.

#include "levels.h"
#include "parallel.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

using namespace unspool;

constexpr i64 kLine = 2 * kLanes;        // weights of a line: two inputs of every output of a block
constexpr i64 kSerial = 1 << 16;         // up to so many products, starting threads costs more than it saves
constexpr i64 kPackedAtOnce = 64;        // lines that are packed at a time

// Where inputs 2 * pair and 2 * pair + 1 of an output stand.
i64 place(i64 output, i64 pair, i64 pairs) {
    return ((output / kLanes) * pairs + pair) * kLine + 2 * (output % kLanes);
}

void copy_pair(bf16* to, const bf16* from) { std::memcpy(to, from, 2 * sizeof(bf16)); }

}  // namespace

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the "undefined" operands inside its own intrinsics for ours
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define UNSPOOL_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace {

// A tile is rows x blocks of sums in registers, at most 24 of the 32. Up to 24 rows are one tile, as wide as fits, and
// weights are read once. More rows are cut into tiles of 8 to 12 rows x 2 blocks, which find the weights in the cache.
constexpr i64 kMostWhole = 24;
constexpr i64 kTall = 12;
constexpr i64 kReach = 32;               // lines to fetch ahead of use
constexpr i64 kPass = 1024;              // pairs of inputs per pass over a panel, whose 128 KiB stay in the L2 cache
constexpr i64 kFewBlocks = 32;           // threads that would have fewer blocks each share them and split the rows,
constexpr i64 kManyRows = 128;           // as long as each has so many
constexpr i64 kActivations = 768 << 10;  // bytes of activations that are worked on at once

struct Product {
    const bf16* weight;
    const bf16* bias;  // may be null
    bf16* out;
    i64 outputs, blocks, pairs;
};

struct Span {
    i64 from, to;
};

// Rows of a tile are interleaved in fours, so that the activations of one step lie together: [pairs][padded rows][2].
constexpr i64 padded(i64 rows) { return rows == 1 ? 1 : (rows + 3) / 4 * 4; }

UNSPOOL_AVX512 void interleave(const bf16* x, i64 stride, i64 rows, i64 pairs, bf16* out) {
    const i64 step = 2 * padded(rows);
    for (i64 row = 0; row < rows; row += 4) {
        const bf16* from[4];  // the last row fills up
        for (i64 i = 0; i < 4; i++) from[i] = x + std::min(row + i, rows - 1) * stride;
        bf16* to = out + 2 * row;
        i64 pair = 0;
        for (; pair + 4 <= pairs; pair += 4, to += 4 * step) {
            __m128 pack[4];
            for (int i = 0; i < 4; i++) pack[i] = _mm_loadu_ps(reinterpret_cast<const float*>(from[i] + 2 * pair));
            _MM_TRANSPOSE4_PS(pack[0], pack[1], pack[2], pack[3]);
            for (int i = 0; i < 4; i++) _mm_storeu_ps(reinterpret_cast<float*>(to + i * step), pack[i]);
        }
        for (; pair < pairs; pair++, to += step)
            for (int i = 0; i < 4; i++) copy_pair(to + 2 * i, from[i] + 2 * pair);
    }
}

UNSPOOL_AVX512 inline __m512i broadcast(const bf16* pair) {
    int both;
    std::memcpy(&both, pair, sizeof both);
    return _mm512_set1_epi32(both);
}

// An initialiser would make gcc fill memory beside the registers.
template <int Rows, int Blocks>
UNSPOOL_AVX512 inline void clear(__m512 (&sums)[Rows][Blocks]) {
#pragma GCC unroll 24
    for (int i = 0; i < Rows * Blocks; i++) sums[i / Blocks][i % Blocks] = _mm512_setzero_ps();
}

// Adds the products of a span of inputs to the sums. Of each pair of inputs, `Fetched` lines at `ahead` are fetched.
template <int Rows, int Blocks, int Fetched>
UNSPOOL_AVX512 inline void accumulate(__m512 (&sums)[Rows][Blocks], const bf16* weight, i64 pairs, const bf16* x,
                                      Span span, const bf16* ahead) {
    for (i64 pair = span.from; pair < span.to; pair++) {
        __m512bh lines[Blocks];
#pragma GCC unroll 4
        for (int b = 0; b < Blocks; b++) lines[b] = (__m512bh)_mm512_loadu_si512(weight + (b * pairs + pair) * kLine);
#pragma GCC unroll 4
        for (int b = 0; b < Fetched; b++)
            _mm_prefetch(reinterpret_cast<const char*>(ahead + (b * pairs + pair) * kLine), _MM_HINT_T0);
#pragma GCC unroll 24
        for (int r = 0; r < Rows; r++) {
            const __m512bh both = (__m512bh)broadcast(x + 2 * (pair * padded(Rows) + r));
#pragma GCC unroll 4
            for (int b = 0; b < Blocks; b++) sums[r][b] = _mm512_dpbf16_ps(sums[r][b], lines[b], both);
        }
    }
}

// Adds the bias, rounds and writes; padded outputs are left out.
template <int Rows, int Blocks>
UNSPOOL_AVX512 inline void finish(const Product& p, i64 block, i64 row, const __m512 (&sums)[Rows][Blocks]) {
    for (int b = 0; b < Blocks; b++) {
        const i64 first = (block + b) * kLanes;
        const i64 there = std::clamp<i64>(p.outputs - first, 0, kLanes);
        const __mmask16 mask = static_cast<__mmask16>((1u << there) - 1);
        const __m512i bits = _mm512_cvtepu16_epi32(p.bias ? _mm256_maskz_loadu_epi16(mask, p.bias + first) : __m256i{});
        const __m512 bias = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
        for (int r = 0; r < Rows; r++) {
            const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_add_ps(sums[r][b], bias));
            _mm256_mask_storeu_epi16(p.out + (row + r) * p.outputs + first, mask, (__m256i)rounded);
        }
    }
}

// All rows and all inputs of a panel. Near the panel's end, the next one is fetched.
template <int Rows, int Blocks>
UNSPOOL_AVX512 void whole_tile(const Product& p, i64 block, i64 row, const bf16* x) {
    __m512 sums[Rows][Blocks];
    clear(sums);
    const bf16* weight = p.weight + block * p.pairs * kLine;
    const i64 reach = std::min(p.pairs, kReach / Blocks);
    const bf16* ahead = weight + reach * kLine;
    accumulate<Rows, Blocks, Blocks>(sums, weight, p.pairs, x, {0, p.pairs - reach}, ahead);
    ahead += (Blocks - 1) * p.pairs * kLine;
    accumulate<Rows, Blocks, Blocks>(sums, weight, p.pairs, x, {p.pairs - reach, p.pairs}, ahead);
    finish(p, block, row, sums);
}

// Some rows and a span of the inputs of a panel; sums that are not complete wait in `kept`. One block is fetched at
// `ahead`, or none where it is null.
template <int Rows>
UNSPOOL_AVX512 void part_tile(const Product& p, i64 block, i64 row, const bf16* x, Span span, const bf16* ahead,
                              float* kept) {
    __m512 sums[Rows][kPanel];
    clear(sums);
    if (span.from)
        for (int i = 0; i < Rows * kPanel; i++) sums[i / kPanel][i % kPanel] = _mm512_loadu_ps(kept + i * kLanes);
    const bf16* weight = p.weight + block * p.pairs * kLine;
    if (ahead)
        accumulate<Rows, kPanel, 1>(sums, weight, p.pairs, x, span, ahead);
    else
        accumulate<Rows, kPanel, 0>(sums, weight, p.pairs, x, span, nullptr);
    if (span.to == p.pairs) return finish(p, block, row, sums);
    for (int i = 0; i < Rows * kPanel; i++) _mm512_storeu_ps(kept + i * kLanes, sums[i / kPanel][i % kPanel]);
}

using WholeTile = void (*)(const Product&, i64, i64, const bf16*);

template <int Blocks, int... Rows>
WholeTile whole_tile_of(i64 rows, std::integer_sequence<int, Rows...>) {
    static constexpr WholeTile tiles[] = {whole_tile<Rows + 1, Blocks>...};
    return tiles[rows - 1];
}

// The widest tile that is no wider than `blocks`, and how wide it is.
std::pair<WholeTile, i64> whole_tile_for(i64 rows, i64 blocks) {
    if (rows <= 6 && blocks >= 4) return {whole_tile_of<4>(rows, std::make_integer_sequence<int, 6>{}), 4};
    if (rows <= 12) return {whole_tile_of<2>(rows, std::make_integer_sequence<int, 12>{}), 2};
    return {whole_tile_of<1>(rows, std::make_integer_sequence<int, 24>{}), 1};
}

using PartTile = void (*)(const Product&, i64, i64, const bf16*, Span, const bf16*, float*);
constexpr PartTile kPartTiles[] = {part_tile<8>, part_tile<9>, part_tile<10>, part_tile<11>, part_tile<12>};

// More than 24 rows in tiles of at most 12, as even as can be: none has fewer than 8.
struct Tiles {
    i64 rows, count;
    explicit Tiles(i64 rows) : rows(rows), count((rows + kTall - 1) / kTall) {}
    i64 begin(i64 tile) const { return rows * tile / count; }
    i64 height(i64 tile) const { return begin(tile + 1) - begin(tile); }
};

// The calling thread's copy of activations, interleaved; it grows to about a megabyte and stays.
bf16* scratch(i64 size) {
    thread_local std::vector<bf16> memory;
    if (static_cast<i64>(memory.size()) < size) memory.resize(static_cast<std::size_t>(size));
    return memory.data();
}

// At most 24 rows, all inputs at once.
void few_rows(const Product& p, const bf16* x, i64 stride, Span rows, Span blocks) {
    const i64 count = rows.to - rows.from;
    x += rows.from * stride;
    if (count > 1) {
        bf16* together = scratch(2 * padded(count) * p.pairs);
        interleave(x, stride, count, p.pairs, together);
        x = together;
    }
    for (i64 block = blocks.from; block < blocks.to;) {
        const auto [tile, wide] = whole_tile_for(count, blocks.to - block);
        tile(p, block, rows.from, x);
        block += wide;
    }
}

// All rows of one panel: pass by pass over its inputs, so that its weights and a tile's activations stay in the caches,
// and meanwhile what the next pass needs is fetched.
void panel(const Product& p, i64 block, i64 row, const bf16* x, const Tiles& tiles) {
    thread_local std::vector<float> waiting;
    if (p.pairs > kPass) waiting.resize(static_cast<std::size_t>(tiles.count * kTall * kPanel * kLanes));
    for (i64 from = 0; from < p.pairs; from += kPass) {
        const Span span{from, std::min(p.pairs, from + kPass)};
        const bf16* weight = p.weight + block * p.pairs * kLine;
        const bf16* next = weight + (span.to < p.pairs ? kPass : kPanel * p.pairs - from) * kLine;
        for (i64 t = 0; t < tiles.count; t++) {
            const bf16* ahead = t < kPanel ? next + t * p.pairs * kLine : nullptr;
            float* kept = waiting.data() + (p.pairs > kPass ? t * kTall * kPanel * kLanes : 0);
            kPartTiles[tiles.height(t) - 8](p, block, row + tiles.begin(t), x + t * 2 * kTall * p.pairs, span, ahead,
                                            kept);
        }
    }
}

// More rows than that, panel by panel.
void many_rows(const Product& p, const bf16* x, i64 stride, Span rows, Span blocks) {
    const Tiles tiles(rows.to - rows.from);
    bf16* together = scratch(2 * tiles.count * kTall * p.pairs);
    for (i64 t = 0; t < tiles.count; t++)
        interleave(x + (rows.from + tiles.begin(t)) * stride, stride, tiles.height(t), p.pairs,
                   together + t * 2 * kTall * p.pairs);
    for (i64 block = blocks.from; block < blocks.to; block += kPanel) panel(p, block, rows.from, together, tiles);
}

// One thread's rows and blocks.
void part(const Product& p, const bf16* x, i64 stride, Span rows, Span blocks) {
    // Activations are read again for every panel, and every weight again for the next rows.
    const i64 most = std::max<i64>(8 * kTall, kActivations / (4 * p.pairs) / kTall * kTall);
    for (i64 row = rows.from, end; row < rows.to; row = end) {
        // a rest that is too small for tiles of 8 joins the rows before it
        end = rows.to - row <= most + kMostWhole ? rows.to : row + most;
        (end - row <= kMostWhole ? few_rows : many_rows)(p, x, stride, {row, end}, blocks);
    }
}

// Part `i` of `n` about equal ones of `count` things that come in units.
Span share(i64 count, i64 unit, i64 i, i64 n) {
    const i64 units = (count + unit - 1) / unit;
    return {std::min(count, units * i / n * unit), std::min(count, units * (i + 1) / n * unit)};
}

// Into how many parts the rows are cut, rather than the outputs: each part reads weights for itself and must be large.
i64 parts_of_rows(i64 rows, i64 blocks, i64 threads) {
    i64 parts = 1;
    while (threads % (2 * parts) == 0 && blocks * parts < kFewBlocks * threads && rows >= 2 * parts * kManyRows)
        parts *= 2;
    return parts;
}

// Four pairs of inputs of four outputs, from rows `stride` apart to lines.
void transpose(const bf16* from, i64 stride, bf16* to) {
    __m128 pack[4];
    for (int i = 0; i < 4; i++) pack[i] = _mm_loadu_ps(reinterpret_cast<const float*>(from + i * stride));
    _MM_TRANSPOSE4_PS(pack[0], pack[1], pack[2], pack[3]);
    for (int i = 0; i < 4; i++) _mm_storeu_ps(reinterpret_cast<float*>(to + i * kLine), pack[i]);
}

}  // namespace

void unspool::linear_avx512_bf16(const PackedWeight* weight, const bf16* x, i64 stride, const bf16* bias, bf16* y,
                                 i64 rows, int threads) {
    const i64 outputs = weight->outputs, pairs = weight->inputs / 2;
    const Product p{weight->lines, bias, y, outputs, blocks_of(outputs), pairs};
    if (rows * outputs * pairs <= kSerial) threads = 1;
    parallel(threads, [&](int thread, int team) {
        const i64 parts = parts_of_rows(rows, p.blocks, team), beside = team / parts;
        part(p, x, stride, share(rows, 1, thread / beside, parts), share(p.blocks, kPanel, thread % beside, beside));
    });
}
#endif

extern "C" {

// Numbers that a packed weight takes.
i64 unspool_linear_bf16_size(i64 outputs, i64 inputs) { return blocks_of(outputs) * kLanes * inputs; }

// Packs rows `first` to `first + count` of the plain weight [outputs, inputs], `inputs` even, into `lines`; who packs the
// last row also writes the zeros after it. `rows` begins with the first of them.
void unspool_linear_bf16_pack(const bf16* rows, bf16* lines, i64 first, i64 count, i64 outputs, i64 inputs,
                              int threads) {
    const i64 pairs = inputs / 2, end = first + count;
    const i64 last = end == outputs ? blocks_of(outputs) : (end + kLanes - 1) / kLanes;
    parallel_for(threads, last - first / kLanes, [=](i64 i) {
        const i64 block = first / kLanes + i;
        const i64 from = std::max(first, block * kLanes), to = std::min(end, (block + 1) * kLanes);
        // A few lines at a time, which stay in the cache while each of the rows adds its pairs.
        for (i64 pair = 0; pair < pairs; pair += kPackedAtOnce) {
            const i64 there = std::min(kPackedAtOnce, pairs - pair);
            bf16* line = lines + (block * pairs + pair) * kLine;
            if (end == outputs && to < (block + 1) * kLanes) {
                const i64 filled = 2 * (std::max(to, block * kLanes) - block * kLanes);
                for (i64 i = 0; i < there; i++) std::fill(line + i * kLine + filled, line + (i + 1) * kLine, bf16{0});
            }
            for (i64 row = from, together; row < to; row += together) {
                together = row % 4 == 0 && to - row >= 4 ? 4 : 1;
                const bf16* source = rows + (row - first) * inputs + 2 * pair;
                bf16* target = line + 2 * (row % kLanes);
                i64 i = 0;
#if defined(__x86_64__)
                for (; together == 4 && i + 4 <= there; i += 4) transpose(source + 2 * i, inputs, target + i * kLine);
#endif
                for (; i < there; i++)
                    for (i64 r = 0; r < together; r++) copy_pair(target + i * kLine + 2 * r, source + r * inputs + 2 * i);
            }
        }
    });
}

// And back: the plain weight [outputs, inputs].
void unspool_linear_bf16_unpack(const PackedWeight* weight, bf16* plain, int threads) {
    const i64 pairs = weight->inputs / 2, blocks = (weight->outputs + kLanes - 1) / kLanes;
    parallel_for(threads, blocks, [=](i64 block) {
        const i64 end = std::min(weight->outputs, (block + 1) * kLanes);
        for (i64 pair = 0; pair < pairs; pair++)
            for (i64 row = block * kLanes; row < end; row++)
                copy_pair(plain + (row * pairs + pair) * 2, weight->lines + place(row, pair, pairs));
    });
}

// Rows of the plain weight: out [count, inputs]. Returns the place of the first index outside [0, outputs), or -1.
i64 unspool_linear_bf16_rows(const PackedWeight* weight, const i64* indexes, i64 count, bf16* out, int threads) {
    const i64 pairs = weight->inputs / 2;
    const i64* wrong = std::find_if(indexes, indexes + count, [=](i64 i) { return i < 0 || i >= weight->outputs; });
    if (wrong != indexes + count) return wrong - indexes;
    // every pair is on a line of its own
    if (count * pairs * kLine <= kSerial) threads = 1;
    parallel_for(threads, count, [=](i64 i) {
        const bf16* from = weight->lines + place(indexes[i], 0, pairs);
        for (i64 pair = 0; pair < pairs; pair++) copy_pair(out + (i * pairs + pair) * 2, from + pair * kLine);
    });
    return -1;
}

}  // extern "C"

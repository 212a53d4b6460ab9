// How quantised weights are packed, and products with them on processors with AVX-512 VNNI and BF16: y = x W^T + bias
// for any number of rows.
//
// Two kinds of weight, both packed so that a 64-byte line holds the same inputs of 16 outputs, in the order of use:
//
//   bytes    a weight is a byte times its output's scale. [blocks][inputs / 4][16 outputs][4 inputs], stored plus 128.
//            Activations become bytes too, with a scale for every 64 of a row; products are sums of integers.
//   nibbles  a weight is an entry of a table of 16 times its group's scale (plus its group's offset).
//            [blocks][inputs / 8][16 outputs][8 inputs]: of a lane's eight nibbles, the lower four are the even inputs
//            and the upper four the odd ones, so one table look-up gives a line of pairs in bf16. Activations are bf16
//            and products exact; only sums are rounded, in fp32.
//
// Inputs are padded with zero activations to whole groups, outputs to whole panels. One number of the result is one
// chain of operations in the order of the inputs, whatever the number of rows and of threads, so a row's results are the
// same bits alone and in company.

#include "levels.h"
#include "parallel.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

using namespace unspool;
constexpr i64 kLine = 64;        // bytes of a line
constexpr i64 kSerial = 1 << 15; // up to so many bytes of weight times rows, starting threads costs more than it saves

// Where the first four bytes of an output stand; those after are a line apart.
i64 lane_of(const QuantisedWeight& w, i64 output) {
    return (output / kLanes) * w.lines_of_block() * kLine + 4 * (output % kLanes);
}

// The place of the first of `indexes` that is none of an output, or -1.
i64 outside(const QuantisedWeight& w, const i64* indexes, i64 count) {
    const i64* wrong = std::find_if(indexes, indexes + count, [&](i64 i) { return i < 0 || i >= w.outputs; });
    return wrong == indexes + count ? -1 : wrong - indexes;
}

// Calls `work(input, count, codes)` for the inputs of an output, as many as a line has of it at a time.
template <class Work>
void each_stripe(const QuantisedWeight& w, i64 output, const Work& work) {
    const u8* from = w.lines + lane_of(w, output);
    const i64 stripe = w.per_line();
    for (i64 input = 0; input < w.inputs; input += stripe, from += kLine) {
        u8 all[8] = {from[0], from[1], from[2], from[3]};
        if (w.nibbles)
            for (int pair = 3; pair >= 0; pair--) {
                all[2 * pair + 1] = from[2 + pair / 2] >> pair % 2 * 4 & 15;
                all[2 * pair] = from[pair / 2] >> pair % 2 * 4 & 15;
            }
        work(input, std::min(stripe, w.inputs - input), all);
    }
}

namespace numbers {

float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Of bf16.
float from_upper(bf16 upper) { return from_bits(static_cast<std::uint32_t>(upper) << 16); }

// To the nearest bf16, of two as near the even one.
bf16 to_upper(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0;
    return static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Of fp16: its exponent moved by multiplication, which is exact also where the number is denormal.
float from_half(fp16 half) {
    const std::uint32_t size = half & 0x7fffu, sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
    if (size >= 0x7c00u) return from_bits(sign | 0x7f800000u | (size & 0x3ffu) << 13);
    return from_bits(sign | 0x3f800000u) * (from_bits(size << 13) * 0x1p112f);
}

}  // namespace numbers
}  // namespace

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the "undefined" operands inside its own intrinsics for ours
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define UNSPOOL_QUANT __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")))

namespace {

// Activations of a tile of rows, interleaved: a step of 4 bytes of each row after the other.
struct Activations {
    i64 groups;
    const u8* steps;            // [steps][rows][4 bytes]
    const float* scales;        // bytes: [groups][rows]; nibbles with offsets: sums of the group
    const std::int32_t* starts; // bytes: [groups][rows], what corrects for the 128 that weights are stored with
};

UNSPOOL_QUANT inline __m512i broadcast(const u8* step) {
    int word;
    std::memcpy(&word, step, sizeof word);
    return _mm512_set1_epi32(word);
}

// Into the first level of the cache (3) or the second (2).
template <int Level>
inline __attribute__((always_inline)) void fetch(const u8* line) { __builtin_prefetch(line, 0, Level); }

// What to fetch from memory meanwhile: so many lines of the next panel with every line of this one.
struct Ahead {
    const u8* line;
    i64 lines;

    void next() {
        for (i64 i = 0; i < lines; i++, line += kLine) fetch<2>(line);
    }
};

// gcc keeps these in registers, and not `__m512i` that is cast inside its intrinsics
using Integers = std::int32_t __attribute__((vector_size(64)));

// An initialiser would make gcc fill memory beside the registers.
template <int Rows, int Blocks>
UNSPOOL_QUANT inline void clear(__m512 (&sums)[Rows][Blocks]) {
#pragma GCC unroll 24
    for (int i = 0; i < Rows * Blocks; i++) sums[i / Blocks][i % Blocks] = _mm512_setzero_ps();
}

// Kinds of weight. `group` adds the products of a group of inputs to the totals. With `kTall` rows and two blocks, or
// `kFlat` and four, what is added up stays in registers: of bytes sums as well as totals.
template <int Rows, int Blocks>
struct Bytes {
    static constexpr int kTall = 6, kFlat = 3;

    UNSPOOL_QUANT static void group(const QuantisedWeight&, const u8* lines, i64 stride, i64 group,
                                    const Activations& x, __m512 (&totals)[Rows][Blocks], i64, Ahead& ahead) {
        Integers sums[Rows][Blocks];
        const std::int32_t* starts = x.starts + group * Rows;
#pragma GCC unroll 24
        for (int i = 0; i < Rows * Blocks; i++) sums[i / Blocks][i % Blocks] = (Integers)_mm512_set1_epi32(starts[i / Blocks]);
        const u8* from = lines + group * (kByteGroup / 4) * kLine;
        const u8* steps = x.steps + group * kByteGroup * Rows;
        for (i64 step = 0; step < kByteGroup / 4; step++, from += kLine) {
            __m512i line[Blocks];
#pragma GCC unroll 4
            for (int b = 0; b < Blocks; b++) {
                line[b] = _mm512_loadu_si512(from + b * stride);
            }
            ahead.next();
#pragma GCC unroll 12
            for (int r = 0; r < Rows; r++, steps += 4) {
                const __m512i four = broadcast(steps);
#pragma GCC unroll 4
                for (int b = 0; b < Blocks; b++)
                    sums[r][b] = (Integers)_mm512_dpbusd_epi32((__m512i)sums[r][b], line[b], four);
            }
        }
        const float* scales = x.scales + group * Rows;
#pragma GCC unroll 24
        for (int i = 0; i < Rows * Blocks; i++) {
            const int r = i / Blocks, b = i % Blocks;
            const __m512 sum = _mm512_cvtepi32_ps((__m512i)sums[r][b]);
            totals[r][b] = _mm512_fmadd_ps(sum, _mm512_set1_ps(scales[r]), totals[r][b]);
        }
    }
};

template <int Rows, int Blocks>
struct Nibbles {
    static constexpr int kTall = 12, kFlat = 5;

    UNSPOOL_QUANT static void group(const QuantisedWeight& w, const u8* lines, i64 stride, i64 group,
                                    const Activations& x, __m512 (&totals)[Rows][Blocks], i64 block, Ahead& ahead) {
        const __m512i table = _mm512_loadu_si512(w.table);
        const i64 count = w.group / 8, groups = w.width() / w.group;
        __m512 sums[Rows][Blocks];
        clear(sums);
        const u8* from = lines + group * count * kLine;
        const u8* steps = x.steps + group * w.group * 2 * Rows;
        for (i64 step = 0; step < count; step++, from += kLine) {
            __m512i line[Blocks];
#pragma GCC unroll 4
            for (int b = 0; b < Blocks; b++) {
                line[b] = _mm512_loadu_si512(from + b * stride);
            }
            ahead.next();
#pragma GCC unroll 4
            for (int pair = 0; pair < 4; pair++) {
                __m512bh weights[Blocks];
#pragma GCC unroll 4
                for (int b = 0; b < Blocks; b++) {
                    // the index is a word's lowest five bits, of which the table ignores the fifth
                    weights[b] = (__m512bh)_mm512_permutexvar_epi16(line[b], table);
                    line[b] = _mm512_srli_epi16(line[b], 4);
                }
#pragma GCC unroll 12
                for (int r = 0; r < Rows; r++, steps += 4) {
                    const __m512bh both = (__m512bh)broadcast(steps);
#pragma GCC unroll 4
                    for (int b = 0; b < Blocks; b++) sums[r][b] = _mm512_dpbf16_ps(sums[r][b], weights[b], both);
                }
            }
        }
#pragma GCC unroll 4
        for (int b = 0; b < Blocks; b++) {
            const i64 at = ((block + b) * groups + group) * kLanes;
            const __m512 scale = half(w.scales + at);
#pragma GCC unroll 12
            for (int r = 0; r < Rows; r++) totals[r][b] = _mm512_fmadd_ps(sums[r][b], scale, totals[r][b]);
            if (!w.offsets) continue;
            const __m512 offset = half(w.offsets + at);
#pragma GCC unroll 12
            for (int r = 0; r < Rows; r++)
                totals[r][b] = _mm512_fmadd_ps(_mm512_set1_ps(x.scales[group * Rows + r]), offset, totals[r][b]);
        }
    }

    UNSPOOL_QUANT static __m512 half(const fp16* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
};

struct Result {
    void* y;
    const void* bias;  // may be null
    bool wide;         // fp32 rather than bf16
};

template <int Rows, int Blocks>
UNSPOOL_QUANT inline void finish(const QuantisedWeight& w, const Result& to, i64 block, i64 row,
                                 const __m512 (&totals)[Rows][Blocks]) {
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; b++) {
        const i64 first = (block + b) * kLanes;
        const i64 there = std::clamp<i64>(w.outputs - first, 0, kLanes);
        if (!there) return;
        const __mmask16 mask = static_cast<__mmask16>((1u << there) - 1);
        const __m512 unit = _mm512_loadu_ps(w.units + first);
        __m512 bias = _mm512_setzero_ps();
        if (to.bias && to.wide) bias = _mm512_maskz_loadu_ps(mask, static_cast<const float*>(to.bias) + first);
        if (to.bias && !to.wide) {
            const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const bf16*>(to.bias) + first);
            bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        }
#pragma GCC unroll 12
        for (int r = 0; r < Rows; r++) {
            const __m512 sum = _mm512_add_ps(_mm512_mul_ps(totals[r][b], unit), bias);
            const i64 at = (row + r) * w.outputs + first;
            if (to.wide)
                _mm512_mask_storeu_ps(static_cast<float*>(to.y) + at, mask, sum);
            else
                _mm256_mask_storeu_epi16(static_cast<bf16*>(to.y) + at, mask, (__m256i)_mm512_cvtneps_pbh(sum));
        }
    }
}

template <template <int, int> class Kind, int Rows, int Blocks>
UNSPOOL_QUANT void tile(const QuantisedWeight& w, const Result& to, i64 block, i64 row, const Activations& x,
                        Ahead ahead) {
    __m512 totals[Rows][Blocks];
    clear(totals);
    const i64 stride = x.groups * w.group / w.per_line() * kLine;
    const u8* lines = w.lines + block * stride;
    for (i64 group = 0; group < x.groups; group++)
        Kind<Rows, Blocks>::group(w, lines, stride, group, x, totals, block, ahead);
    finish(w, to, block, row, totals);
}

using Tile = void (*)(const QuantisedWeight&, const Result&, i64, i64, const Activations&, Ahead);

template <template <int, int> class Kind, int Blocks, int... Rows>
Tile tile_of(i64 rows, std::integer_sequence<int, Rows...>) {
    static constexpr Tile tiles[] = {tile<Kind, Rows + 1, Blocks>...};
    return tiles[rows - 1];
}

// The widest tile for so many rows that is no wider than `blocks`, and how wide it is.
template <template <int, int> class Kind>
std::pair<Tile, i64> tile_for(i64 rows, i64 blocks) {
    constexpr int kTall = Kind<1, 1>::kTall, kFlat = Kind<1, 1>::kFlat;
    if (rows <= kFlat && blocks >= 4) return {tile_of<Kind, 4>(rows, std::make_integer_sequence<int, kFlat>{}), 4};
    return {tile_of<Kind, 2>(rows, std::make_integer_sequence<int, kTall>{}), 2};
}

// Rows in tiles as even as can be.
struct Tiles {
    i64 rows, count;
    Tiles(i64 rows, i64 tall) : rows(rows), count((rows + tall - 1) / tall) {}
    i64 begin(i64 tile) const { return rows * tile / count; }
    i64 height(i64 tile) const { return begin(tile + 1) - begin(tile); }
};

// Sixteen activations of either dtype.
UNSPOOL_QUANT inline __m512 activations(const void* x, bool wide, i64 at, i64 end) {
    const i64 there = std::clamp<i64>(end - at, 0, kLanes);
    const __mmask16 mask = static_cast<__mmask16>((1u << there) - 1);
    if (wide) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + at);
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const bf16*>(x) + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// A group of 64 activations as bytes; gives their scale. Where one of them is not finite, the scale is not either.
UNSPOOL_QUANT inline float quantise(const void* x, bool wide, i64 at, i64 end, u8* out, std::int32_t* sum) {
    __m512 parts[4], most = _mm512_setzero_ps();
    __mmask16 wrong = 0;
    for (int i = 0; i < 4; i++) {
        parts[i] = activations(x, wide, at + i * kLanes, end);
        wrong |= _mm512_cmp_ps_mask(parts[i], parts[i], _CMP_UNORD_Q);
        most = _mm512_max_ps(most, _mm512_abs_ps(parts[i]));
    }
    const float largest = wrong ? __builtin_nanf("") : _mm512_reduce_max_ps(most);
    // below the smallest normal number the inverse would be infinite
    const float inverse = largest > 1e-36f ? 127.0f / largest : 0.0f;
    __m512i added = _mm512_setzero_si512();
    for (int i = 0; i < 4; i++) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(parts[i], _mm512_set1_ps(inverse)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * kLanes), _mm512_cvtsepi32_epi8(whole));
        added = _mm512_add_epi32(added, whole);
    }
    *sum = _mm512_reduce_add_epi32(added);
    return largest / 127.0f;
}

// Memory that a call's threads share, kept by the thread that calls.
template <class Number>
Number* scratch(i64 size) {
    thread_local std::vector<Number> memory;
    if (static_cast<i64>(memory.size()) < size) memory.resize(static_cast<std::size_t>(size));
    return memory.data();
}

struct Call {
    const QuantisedWeight& w;
    const QuantisedWeight* next;  // see `coming`
    const void* x;
    i64 stride;      // between rows of x, in numbers
    bool wide;       // x is fp32 rather than bf16
    Result to;
    Tiles tiles;
    i64 groups, row_bytes;
    u8* steps;
    float* scales;
    std::int32_t* starts;

    Activations of(i64 tile) const {
        const i64 row = tiles.begin(tile);
        return {groups, steps + row * row_bytes, scales + row * groups, starts + row * groups};
    }
};

// Puts one row of x where its tile reads it.
UNSPOOL_QUANT void prepare(const Call& c, i64 row) {
    const QuantisedWeight& w = c.w;
    i64 t = row * c.tiles.count / c.tiles.rows;
    while (c.tiles.begin(t) > row) t--;
    while (c.tiles.begin(t + 1) <= row) t++;
    const i64 begin = c.tiles.begin(t), rows = c.tiles.height(t), place = row - begin;
    u8* to = c.steps + begin * c.row_bytes + 4 * place;
    float* scales = c.scales + begin * c.groups + place;
    std::int32_t* starts = c.starts + begin * c.groups + place;
    const u8* x = static_cast<const u8*>(c.x) + row * c.stride * (c.wide ? 4 : 2);
    alignas(64) u8 part[2 * kByteGroup];
    if (!w.nibbles) {
        for (i64 group = 0; group < c.groups; group++) {
            std::int32_t sum = 0;
            scales[group * rows] = quantise(x, c.wide, group * kByteGroup, w.inputs, part, &sum);
            starts[group * rows] = -128 * sum;
            for (i64 i = 0; i < kByteGroup; i += 4, to += 4 * rows) std::memcpy(to, part + i, 4);
        }
        return;
    }
    for (i64 group = 0; group < c.groups; group++) {
        __m512 sum = _mm512_setzero_ps();
        for (i64 at = group * w.group; at < (group + 1) * w.group; at += 2 * kLanes) {
            for (i64 i = 0; i < 2; i++) {
                const __m512 numbers = activations(x, false, at + i * kLanes, w.inputs);
                sum = _mm512_add_ps(sum, numbers);
                _mm256_store_si256(reinterpret_cast<__m256i*>(part + 32 * i), (__m256i)_mm512_cvtneps_pbh(numbers));
            }
            for (i64 i = 0; i < kLine; i += 4, to += 4 * rows) std::memcpy(to, part + i, 4);
        }
        scales[group * rows] = _mm512_reduce_add_ps(sum);
    }
}

// A thread's blocks.
struct Part {
    i64 from, to;
    Part(const QuantisedWeight& w, int thread, int team)
        : from(w.blocks() / kPanel * thread / team * kPanel), to(w.blocks() / kPanel * (thread + 1) / team * kPanel) {}
};

// A thread's blocks, a panel of them at a time for all rows; with one tile of few rows, two panels. Meanwhile the next
// panel is fetched, of which several tiles fetch a block each, and at the end the first of the next weight.
template <template <int, int> class Kind>
void panels(const Call& c, int thread, int team) {
    const i64 lines = c.w.lines_of_block();
    const Part part(c.w, thread, team);
    for (i64 block = part.from, width = 0; block < part.to; block += width)
        for (i64 t = 0; t < c.tiles.count; t++) {
            const auto [tile, wide] = tile_for<Kind>(c.tiles.height(t), part.to - block);
            const i64 left = part.to - block - wide;
            Ahead ahead{c.w.lines + (block + wide + t) * lines * kLine, 0};
            if (c.tiles.count > 1) {
                ahead.lines = left > 0 && t < kPanel;
            } else if (left > 0) {
                ahead.lines = tile_for<Kind>(c.tiles.rows, left).second;
            } else if (c.next) {
                const Part after(*c.next, thread, team);
                const i64 all = std::min(wide, after.to - after.from) * c.next->lines_of_block();
                ahead = {c.next->lines + after.from * c.next->lines_of_block() * kLine, (all + lines - 1) / lines};
            }
            tile(c.w, c.to, block, c.tiles.begin(t), c.of(t), ahead);
            width = wide;
        }
}

}  // namespace

void unspool::quantised_avx512_bf16(const QuantisedWeight* weight, const void* x, i64 stride, const void* bias, void* y,
                                    i64 rows, int wide_x, int wide_y, int threads) {
    if (rows == 0) return;
    const QuantisedWeight& w = *weight;
    const i64 groups = w.width() / w.group, row_bytes = w.width() * (w.nibbles ? 2 : 1);
    const i64 tall = w.nibbles ? Nibbles<1, 1>::kTall : Bytes<1, 1>::kTall;
    const Call c{w, coming, x, stride, wide_x != 0, {y, bias, wide_y != 0}, Tiles(rows, tall), groups, row_bytes,
                 scratch<u8>(rows * row_bytes), scratch<float>(rows * groups), scratch<std::int32_t>(rows * groups)};
    if (rows * w.blocks() * w.lines_of_block() * kLine <= kSerial) threads = 1;
    parallel(threads, [&](int thread, int team) {
        share_out(rows, thread, team, [&](i64 row) { prepare(c, row); });
        wait_for_team();
        (w.nibbles ? panels<Nibbles> : panels<Bytes>)(c, thread, team);
    });
}
#endif

thread_local const QuantisedWeight* unspool::coming = nullptr;

extern "C" {

// Blocks of a weight of so many outputs, padded ones included.
i64 unspool_quantised_blocks(i64 outputs) { return blocks_of(outputs); }

// Packs rows `first` to `first + count` of the codes [outputs, inputs], a byte each. Lines are zero before.
void unspool_quantised_pack(const QuantisedWeight* weight, const u8* codes, i64 first, i64 count, int threads) {
    const QuantisedWeight& w = *weight;
    u8* lines = const_cast<u8*>(w.lines);
    const i64 end = first + count, stripe = w.per_line();
    parallel_for(threads, (end + kLanes - 1) / kLanes - first / kLanes, [=, &w](i64 i) {
        const i64 block = first / kLanes + i;
        for (i64 row = std::max(first, block * kLanes); row < std::min(end, (block + 1) * kLanes); row++) {
            const u8* from = codes + (row - first) * w.inputs;
            u8* to = lines + lane_of(w, row);
            for (i64 input = 0; input < w.inputs; input += stripe, to += kLine) {
                u8 eight[8] = {};
                std::memcpy(eight, from + input, static_cast<std::size_t>(std::min(stripe, w.inputs - input)));
                if (!w.nibbles) {
                    std::memcpy(to, eight, 4);
                    continue;
                }
                to[0] = static_cast<u8>(eight[0] | eight[2] << 4);
                to[1] = static_cast<u8>(eight[4] | eight[6] << 4);
                to[2] = static_cast<u8>(eight[1] | eight[3] << 4);
                to[3] = static_cast<u8>(eight[5] | eight[7] << 4);
            }
        }
    });
}

// And back: codes [count, inputs] of the rows at `indexes`. Returns the place of the first index outside [0, outputs),
// or -1.
i64 unspool_quantised_codes(const QuantisedWeight* weight, const i64* indexes, i64 count, u8* codes, int threads) {
    const QuantisedWeight& w = *weight;
    const i64 wrong = outside(w, indexes, count);
    if (wrong >= 0) return wrong;
    if (count * w.inputs <= kSerial) threads = 1;
    parallel_for(threads, count, [=, &w](i64 i) {
        each_stripe(w, indexes[i], [&](i64 input, i64 there, const u8* some) {
            std::memcpy(codes + i * w.inputs + input, some, static_cast<std::size_t>(there));
        });
    });
    return -1;
}

// The weights themselves, to `out` [count, inputs], fp32 if `wide`, else bf16.
i64 unspool_quantised_rows(const QuantisedWeight* weight, const i64* indexes, i64 count, void* out, int wide,
                           int threads) {
    const QuantisedWeight& w = *weight;
    const i64 wrong = outside(w, indexes, count);
    if (wrong >= 0) return wrong;
    if (count * w.inputs <= kSerial) threads = 1;
    parallel_for(threads, count, [=, &w](i64 i) {
        const i64 row = indexes[i];
        const float unit = w.units[row];
        each_stripe(w, row, [&](i64 input, i64 there, const u8* some) {
            const i64 group = (row / kLanes * (w.width() / w.group) + input / w.group) * kLanes + row % kLanes;
            const float scale = w.nibbles ? numbers::from_half(w.scales[group]) * unit : unit;
            const float offset = w.offsets ? numbers::from_half(w.offsets[group]) * unit : 0.0f;
            for (i64 j = 0; j < there; j++) {
                float value = w.nibbles ? numbers::from_upper(w.table[some[j]]) : static_cast<float>(some[j] - 128);
                value *= scale;
                if (w.offsets) value += offset;
                if (wide)
                    static_cast<float*>(out)[i * w.inputs + input + j] = value;
                else
                    static_cast<bf16*>(out)[i * w.inputs + input + j] = numbers::to_upper(value);
            }
        });
    });
    return -1;
}

}  // extern "C"

// Products with weights whose numbers are widened to fp32 in registers, or are bytes: y = x W^T + bias for any number of
// rows. Layouts are those of linear.cpp and quantised.cpp; products with bf16 weights, and with nibbles' table entries,
// are exact and summed in fp32.
//
// Activations are prepared once for all threads, tile by tile of rows. One number of the result is one chain of operations
// in the order of the inputs, whatever the number of rows and of threads, so a row's results are the same bits alone and
// in company.

#pragma once

#include "layout.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace unspool::UNSPOOL_LEVEL::products {
namespace {

constexpr i64 kLine = 64;                 // bytes of a line
constexpr int kSplit = kLanes / kWidth;   // vectors of a line
constexpr i64 kTall = 12;                 // rows of a tile, at most
constexpr i64 kReach = 24;                // lines to fetch ahead of use
constexpr i64 kActivations = 1 << 20;     // bytes of activations that are worked on at once
constexpr i64 kSerial = 1 << 15;          // up to so many bytes of weight times rows, threads do not pay

struct Weight {
    const u8* lines;
    const float* units;  // of outputs; null where there are none
    const fp16 *scales, *offsets;
    const bf16* table;
    i64 outputs, inputs, width;  // width: padded inputs
    i64 group, groups;
    i64 stride;                  // bytes of a block
    i64 blocks;
};

// Prepared rows of a tile: floats [width][rows] or bytes [width / 4][rows][4].
struct Steps {
    const void* numbers;
    const float* scales;         // [groups][rows]: of bytes; sums of a group where weights have offsets
    const std::int32_t* starts;  // [groups][rows]: bytes only
};

UNSPOOL_TARGET inline Ints word(const u8* from) {
    std::uint32_t four;
    std::memcpy(&four, from, sizeof four);
    return set_ints(four);
}

inline void fetch(const u8* line) { __builtin_prefetch(line, 0, 3); }

// Adds the products of a line of pairs of bf16 weights with two inputs of every row.
template <int Rows, int Vectors>
UNSPOOL_TARGET inline void add_pairs(const Ints (&pairs)[Vectors], const float* x, Vec (&sums)[Rows][Vectors]) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        Vec weights[Vectors];
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; v++) weights[v] = (Vec)(i ? upper_halves(pairs[v]) : pairs[v] << 16);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; r++) {
            const Vec number = set(x[i * Rows + r]);
#pragma GCC unroll 16
            for (int v = 0; v < Vectors; v++) sums[r][v] = fma(weights[v], number, sums[r][v]);
        }
    }
}

// Kinds of weight: `group` adds the products of a group of inputs to the totals, from a block's `lines` on.

struct Halves {
    static constexpr i64 kSums = kFloatSums;
    static constexpr bool kBytes = false;

    template <int Rows, int Vectors>
    UNSPOOL_TARGET static void group(const Weight& w, const u8* lines, i64, i64, const Steps& steps,
                                     Vec (&totals)[Rows][Vectors]) {
        const float* x = static_cast<const float*>(steps.numbers);
        for (i64 input = 0; input < w.width; input += 2, x += 2 * Rows, lines += kLine) {
            Ints pairs[Vectors];
#pragma GCC unroll 16
            for (int v = 0; v < Vectors; v++) {
                const u8* from = lines + v / kSplit * w.stride;
                pairs[v] = load_ints(from + v % kSplit * 4 * kWidth);
                if (v % kSplit == 0) fetch(from + kReach * kLine);
            }
            add_pairs(pairs, x, totals);
        }
    }
};

struct Nibbles {
    static constexpr i64 kSums = kNibbleSums;
    static constexpr bool kBytes = false;

    template <int Rows, int Vectors>
    UNSPOOL_TARGET static void group(const Weight& w, const u8* lines, i64 block, i64 group, const Steps& steps,
                                     Vec (&totals)[Rows][Vectors]) {
        const Table table = table_of(w.table);
        const float* x = static_cast<const float*>(steps.numbers) + group * w.group * Rows;
        Vec sums[Rows][Vectors];
        clear(sums);
        lines += group * (w.group / 8) * kLine;
        for (i64 input = 0; input < w.group; input += 8, x += 8 * Rows, lines += kLine) {
            Ints pairs[4][Vectors];
#pragma GCC unroll 16
            for (int v = 0; v < Vectors; v++) {
                const u8* from = lines + v / kSplit * w.stride;
                Ints four[4];
                pairs_of(load_ints(from + v % kSplit * 4 * kWidth), table, four);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) pairs[i][v] = four[i];
                if (v % kSplit == 0) fetch(from + kReach * kLine);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) add_pairs(pairs[i], x + 2 * i * Rows, sums);
        }
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; v++) {
            const i64 at = ((block + v / kSplit) * w.groups + group) * kLanes + v % kSplit * kWidth;
            const Vec scale = load_fp16(w.scales + at);
#pragma GCC unroll 12
            for (int r = 0; r < Rows; r++) totals[r][v] = fma(sums[r][v], scale, totals[r][v]);
            if (!w.offsets) continue;
            const Vec offset = load_fp16(w.offsets + at);
#pragma GCC unroll 12
            for (int r = 0; r < Rows; r++)
                totals[r][v] = fma(set(steps.scales[group * Rows + r]), offset, totals[r][v]);
        }
    }
};

struct Whole {
    static constexpr i64 kSums = kByteSums;
    static constexpr bool kBytes = true;

    template <int Rows, int Vectors>
    UNSPOOL_TARGET static void group(const Weight& w, const u8* lines, i64, i64 group, const Steps& steps,
                                     Vec (&totals)[Rows][Vectors]) {
        const u8* x = static_cast<const u8*>(steps.numbers) + group * kByteGroup * Rows;
        Ints sums[Rows][Vectors];
#pragma GCC unroll 12
        for (int r = 0; r < Rows; r++)
#pragma GCC unroll 16
            for (int v = 0; v < Vectors; v++)
                sums[r][v] = set_ints(static_cast<std::uint32_t>(steps.starts[group * Rows + r]));
        lines += group * (kByteGroup / 4) * kLine;
        for (i64 input = 0; input < kByteGroup; input += 4, x += 4 * Rows, lines += kLine) {
#pragma GCC unroll 16
            for (int v = 0; v < Vectors; v++) {
                const u8* from = lines + v / kSplit * w.stride;
                const Bytes weights = bytes_of(load_ints(from + v % kSplit * 4 * kWidth));
                if (v % kSplit == 0) fetch(from + kReach * kLine);
#pragma GCC unroll 12
                for (int r = 0; r < Rows; r++) sums[r][v] = dot(sums[r][v], weights, word(x + 4 * r));
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < Rows; r++) {
            const Vec scale = set(steps.scales[group * Rows + r]);
#pragma GCC unroll 16
            for (int v = 0; v < Vectors; v++) totals[r][v] = fma(from_integers(sums[r][v]), scale, totals[r][v]);
        }
    }
};

struct Result {
    void* y;
    const void* bias;  // may be null
    bool wide;         // fp32 rather than bf16
};

UNSPOOL_TARGET inline Vec numbers(const void* from, bool wide, i64 at, i64 there) {
    return wide ? Fp32::load(static_cast<const float*>(from) + at, there)
                : Bf16::load(static_cast<const bf16*>(from) + at, there);
}

template <int Rows, int Vectors>
UNSPOOL_TARGET inline void finish(const Weight& w, const Result& to, i64 block, i64 row, const Vec (&totals)[Rows][Vectors]) {
    for (int v = 0; v < Vectors; v++) {
        const i64 first = block * kLanes + v * kWidth, there = std::min<i64>(w.outputs - first, kWidth);
        if (there <= 0) return;
        const Vec unit = w.units ? load(w.units + first) : set(1.0f);
        const Vec bias = to.bias ? numbers(to.bias, to.wide, first, there) : Vec{};
        for (int r = 0; r < Rows; r++) {
            const Vec sum = totals[r][v] * unit + bias;
            const i64 at = (row + r) * w.outputs + first;
            if (to.wide)
                Fp32::store(static_cast<float*>(to.y) + at, sum, there);
            else
                Bf16::store(static_cast<bf16*>(to.y) + at, sum, there);
        }
    }
}

template <class Kind, int Rows, int Blocks>
UNSPOOL_TARGET void tile(const Weight& w, const Result& to, i64 block, i64 row, const Steps& steps) {
    Vec totals[Rows][Blocks * kSplit];
    clear(totals);
    for (i64 group = 0; group < w.groups; group++)
        Kind::group(w, w.lines + block * w.stride, block, group, steps, totals);
    finish(w, to, block, row, totals);
}

using Tile = void (*)(const Weight&, const Result&, i64, i64, const Steps&);

// Whether the sums of a tile stay in registers.
template <class Kind>
constexpr bool holds(i64 rows, i64 blocks) { return rows * blocks * kSplit <= Kind::kSums; }

template <class Kind, int Blocks, int Rows>
constexpr Tile tile_if_it_holds() {
    if constexpr (holds<Kind>(Rows, Blocks)) return tile<Kind, Rows, Blocks>;
    return nullptr;
}

template <class Kind, int Blocks, int... Rows>
constexpr Tile tile_of(i64 rows, std::integer_sequence<int, Rows...>) {
    constexpr Tile tiles[] = {tile_if_it_holds<Kind, Blocks, Rows + 1>()...};
    return tiles[rows - 1];
}

// The widest tile for so many rows that is no wider than `blocks`, and how wide it is.
template <class Kind>
std::pair<Tile, i64> tile_for(i64 rows, i64 blocks) {
    constexpr std::make_integer_sequence<int, kTall> all;
    if (blocks >= 4 && holds<Kind>(rows, 4)) return {tile_of<Kind, 4>(rows, all), 4};
    if (holds<Kind>(rows, 2)) return {tile_of<Kind, 2>(rows, all), 2};
    return {tile_of<Kind, 1>(rows, all), 1};
}

// Rows in tiles as even as can be.
struct Tiles {
    i64 rows, count;
    Tiles(i64 rows, i64 tall) : rows(rows), count((rows + tall - 1) / tall) {}
    i64 begin(i64 tile) const { return rows * tile / count; }
    i64 height(i64 tile) const { return begin(tile + 1) - begin(tile); }
    i64 of(i64 row) const {
        i64 tile = row * count / rows;
        while (begin(tile) > row) tile--;
        while (begin(tile + 1) <= row) tile++;
        return tile;
    }
};

// A group of 64 activations as bytes; gives their scale. Where one of them is not finite, the scale is not either.
UNSPOOL_TARGET inline float quantise(const void* x, bool wide, i64 at, i64 end, u8* out, std::int32_t* sum) {
    Vec most = Vec{};
    bool wrong = false;
    for (i64 i = 0; i < kByteGroup && at + i < end; i += kWidth) {
        const Vec part = numbers(x, wide, at + i, std::min(end - at - i, kWidth));
        wrong |= any_nan(part);
        most = max(most, absolute(part));
    }
    const float largest = wrong ? __builtin_nanf("") : UNSPOOL_LEVEL::greatest(most);
    // below the smallest normal number the inverse would be infinite
    const float inverse = largest > 1e-36f ? 127.0f / largest : 0.0f;
    Ints added = {};
    for (i64 i = 0; i < kByteGroup; i += kWidth) {
        const i64 there = std::clamp<i64>(end - at - i, 0, kWidth);
        const Ints whole = there ? to_integers(numbers(x, wide, at + i, there) * set(inverse)) : Ints{};
        store_bytes(out + i, whole);
        added += whole;
    }
    *sum = sum_integers(added);
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
    const Weight& w;
    const void* x;
    i64 stride;  // between rows of x, in numbers
    bool wide;   // x is fp32 rather than bf16
    Result to;
    void* numbers;
    float* scales;
    std::int32_t* starts;
};

// Puts a row of x where its tile reads it: `place` of `rows`.
UNSPOOL_TARGET inline void prepare_bytes(const Call& c, const void* x, i64 place, i64 rows, u8* to, float* scales,
                                         std::int32_t* starts) {
    alignas(64) u8 part[kByteGroup];
    to += 4 * place;
    for (i64 group = 0; group < c.w.groups; group++) {
        std::int32_t sum = 0;
        scales[group * rows + place] = quantise(x, c.wide, group * kByteGroup, c.w.inputs, part, &sum);
        starts[group * rows + place] = -kTooMuch * sum;
        for (i64 i = 0; i < kByteGroup; i += 4, to += 4 * rows) std::memcpy(to, part + i, 4);
    }
}

UNSPOOL_TARGET inline void prepare_floats(const Call& c, const void* x, i64 place, i64 rows, float* to, float* scales) {
    const Weight& w = c.w;
    float part[kWidth];
    to += place;
    for (i64 group = 0; group < w.groups; group++) {
        Vec sum = Vec{};
        const i64 end = (group + 1) * w.group;
        for (i64 at = group * w.group; at < end; at += kWidth) {
            const i64 there = std::clamp<i64>(w.inputs - at, 0, kWidth), count = std::min(end - at, kWidth);
            const Vec some = there ? products::numbers(x, c.wide, at, there) : Vec{};
            sum = sum + some;
            store(part, some);
            for (i64 i = 0; i < count; i++, to += rows) *to = part[i];
        }
        if (w.offsets) scales[group * rows + place] = UNSPOOL_LEVEL::sum(sum);
    }
}

template <class Kind>
void run_rows(const Call& c, i64 first, i64 count, int thread, int team) {
    const Weight& w = c.w;
    const Tiles tiles(count, std::min<i64>(kTall, Kind::kSums / kSplit));
    const i64 size = w.width * (Kind::kBytes ? 1 : 4);  // bytes of a prepared row
    u8* numbers = static_cast<u8*>(c.numbers);
    share_out(count, thread, team, [&](i64 i) {
        const i64 t = tiles.of(i), begin = tiles.begin(t), rows = tiles.height(t);
        const u8* x = static_cast<const u8*>(c.x) + (first + i) * c.stride * (c.wide ? 4 : 2);
        float* scales = c.scales + begin * w.groups;
        if constexpr (Kind::kBytes)
            prepare_bytes(c, x, i - begin, rows, numbers + begin * size, scales, c.starts + begin * w.groups);
        else
            prepare_floats(c, x, i - begin, rows, reinterpret_cast<float*>(numbers + begin * size), scales);
    });
    wait_for_team();
    const i64 units = w.blocks / kPanel;
    const i64 from = units * thread / team * kPanel, to = units * (thread + 1) / team * kPanel;
    const i64 most = tile_for<Kind>(tiles.height(0), to - from).second;  // the tiles of a panel are as wide
    for (i64 block = from, width = 0; block < to; block += width) {
        width = std::min(to - block, std::max(most, kPanel));
        for (i64 t = 0; t < tiles.count; t++) {
            const i64 begin = tiles.begin(t), rows = tiles.height(t);
            const Steps steps{numbers + begin * size, c.scales + begin * w.groups, c.starts + begin * w.groups};
            for (i64 done = 0, wide = 0; done < width; done += wide) {
                const auto [tile, blocks] = tile_for<Kind>(rows, width - done);
                tile(w, c.to, block + done, first + begin, steps);
                wide = blocks;
            }
        }
    }
}

// All rows, so many at a time that what is prepared of them stays in the cache.
template <class Kind>
void run(const Weight& w, const void* x, i64 stride, bool wide, const Result& to, i64 rows, int threads) {
    if (rows == 0) return;
    const i64 size = w.width * (Kind::kBytes ? 1 : 4);
    const i64 parts = (rows - 1) / std::max(8 * kTall, kActivations / size) + 1, most = (rows + parts - 1) / parts;
    const Call c{w,  x, stride, wide, to, scratch<u8>(most * size), scratch<float>(most * w.groups),
                 scratch<std::int32_t>(most * w.groups)};
    if (rows * w.blocks * w.stride <= kSerial) threads = 1;
    parallel(threads, [&](int thread, int team) {
        for (i64 part = 0; part < parts; part++) {
            if (part) wait_for_team();  // for those that still read what is prepared
            const i64 first = rows * part / parts;
            run_rows<Kind>(c, first, rows * (part + 1) / parts - first, thread, team);
        }
    });
}

}  // namespace

inline void linear(const PackedWeight* weight, const bf16* x, i64 stride, const bf16* bias, bf16* y, i64 rows, int threads) {
    const i64 inputs = weight->inputs;
    const Weight w{reinterpret_cast<const u8*>(weight->lines), nullptr, nullptr, nullptr, nullptr, weight->outputs, inputs,
                   inputs, inputs, 1, inputs / 2 * kLine, blocks_of(weight->outputs)};
    run<Halves>(w, x, stride, false, {y, bias, false}, rows, threads);
}

inline void quantised(const QuantisedWeight* weight, const void* x, i64 stride, const void* bias, void* y, i64 rows,
                      int wide_x, int wide_y, int threads) {
    const QuantisedWeight& q = *weight;
    const Weight w{q.lines,  q.units, q.scales, q.offsets, q.table, q.outputs, q.inputs, q.width(), q.group,
                   q.width() / q.group, q.lines_of_block() * kLine, q.blocks()};
    (q.nibbles ? run<Nibbles> : run<Whole>)(w, x, stride, wide_x != 0, {y, bias, wide_y != 0}, rows, threads);
}

}  // namespace unspool::UNSPOOL_LEVEL::products

// Quantises rows of a weight: numbers become codes of eight or four bits and a scale for every group of inputs. What
// each format means is in `weights/quant`, which does the same with PyTorch.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace unspool::UNSPOOL_LEVEL::encoding {
namespace {

using u8 = std::uint8_t;

enum Kind { kBytes = 0, kEven = 1, kTable = 2 };

constexpr float kTried[] = {1.0f, 0.93f, 0.86f};  // as in `weights/quant/int4.py`

struct Table {
    const float* bounds;  // [15], ascending: a number above i of them has code order[i]
    const u8* order;      // [16]
};

UNSPOOL_TARGET inline void widen(const void* from, bool wide, i64 count, float* to) {
    if (wide) {
        std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
        return;
    }
    const std::uint16_t* halves = static_cast<const std::uint16_t*>(from);
#pragma omp simd
    for (i64 i = 0; i < count; i++) {
        const std::uint32_t bits = static_cast<std::uint32_t>(halves[i]) << 16;
        std::memcpy(to + i, &bits, sizeof bits);
    }
}

UNSPOOL_TARGET inline float largest(const float* x, i64 count) {
    float most = 0;
#pragma omp simd reduction(max : most)
    for (i64 i = 0; i < count; i++) most = std::max(most, std::fabs(x[i]));
    return most;
}

// Codes of 128 plus the nearest of -127 to 127 steps.
UNSPOOL_TARGET inline float bytes(const float* x, i64 count, u8* codes) {
    const float scale = largest(x, count) / 127.0f, by = scale > 0 ? scale : 1.0f;
#pragma omp simd
    for (i64 i = 0; i < count; i++) codes[i] = static_cast<u8>(static_cast<int>(std::rint(x[i] / by)) + 128);
    return scale;
}

// Codes of 8 plus the nearest of -8 to 7 steps, with the scale of least squared error of a few.
UNSPOOL_TARGET inline float even(const float* x, i64 count, u8* codes) {
    const float most = largest(x, count);
    float signed_most = 0;
    for (i64 i = 0; i < count && signed_most == 0; i++) signed_most = std::fabs(x[i]) == most ? x[i] : 0;
    float best = INFINITY, kept = 0;
    for (const float part : kTried) {
        const float scale = signed_most / -8.0f * part, by = scale != 0 ? scale : 1.0f;
        float error = 0;
#pragma omp simd reduction(+ : error)
        for (i64 i = 0; i < count; i++) {
            const float off = x[i] - std::min(7.0f, std::max(-8.0f, std::rint(x[i] / by))) * scale;
            error += off * off;
        }
        if (error < best) best = error, kept = scale;
    }
    const float by = kept != 0 ? kept : 1.0f;
#pragma omp simd
    for (i64 i = 0; i < count; i++)
        codes[i] = static_cast<u8>(static_cast<int>(std::min(7.0f, std::max(-8.0f, std::rint(x[i] / by)))) + 8);
    return kept;
}

// Codes of the nearest numbers of a table, times the largest weight.
UNSPOOL_TARGET inline float table(const float* x, i64 count, const Table& t, u8* codes) {
    const float scale = largest(x, count), by = scale > 0 ? scale : 1.0f;
    float bounds[15];
    std::copy(t.bounds, t.bounds + 15, bounds);
    for (i64 at = 0; at < count; at += 64) {
        const i64 there = std::min<i64>(64, count - at);
        std::int32_t places[64];
#pragma omp simd
        for (i64 i = 0; i < there; i++) {
            const float part = x[at + i] / by;
            std::int32_t place = 0;
#pragma GCC unroll 15
            for (int b = 0; b < 15; b++) place += part > bounds[b];
            places[i] = place;
        }
        for (i64 i = 0; i < there; i++) codes[at + i] = t.order[places[i]];
    }
    return scale;
}

}  // namespace

inline void encode(const void* rows, int wide, i64 count, i64 inputs, i64 group, int kind, const float* bounds,
                    const u8* order, u8* codes, float* scales) {
    thread_local std::vector<float> memory;
    memory.resize(static_cast<std::size_t>(inputs));
    float* x = memory.data();
    const i64 groups = (inputs + group - 1) / group, size = wide ? 4 : 2;
    for (i64 row = 0; row < count; row++) {
        widen(static_cast<const u8*>(rows) + row * inputs * size, wide != 0, inputs, x);
        for (i64 g = 0; g < groups; g++) {
            const i64 at = g * group, there = std::min(group, inputs - at);
            u8* to = codes + row * inputs + at;
            float& scale = scales[row * groups + g];
            if (kind == kBytes) scale = bytes(x + at, there, to);
            if (kind == kEven) scale = even(x + at, there, to);
            if (kind == kTable) scale = table(x + at, there, {bounds, order}, to);
        }
    }
}

}  // namespace unspool::UNSPOOL_LEVEL::encoding

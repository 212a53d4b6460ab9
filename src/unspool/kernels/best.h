// The best of many scores: which they are, or all others filled.
//
// A row is looked at in up to 1024 stretches. The `count`-th greatest of the stretches' greatest is a score that at least
// `count` reach; only stretches that reach it are looked at again.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

namespace unspool::UNSPOOL_LEVEL::sorting {
namespace {

constexpr i64 kStretches = 1024;
constexpr i64 kStep = 64;         // stretches are of whole steps
constexpr i64 kRoom = 4096;       // candidates; at most half of them are asked for
constexpr i64 kSerial = 16 << 10;  // up to so many numbers, threads do not pay

// A score and its place: the greater score is the greater number, and of equals the first; 0 and -0 are equal.
using Key = std::uint64_t;

inline Key key_of(float score, i64 place) {
    score += 0.0f;
    std::uint32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<Key>(bits) << 32 | (0xffffffffu - static_cast<std::uint32_t>(place));
}
inline i64 place_of(Key key) { return static_cast<i64>(0xffffffffu - static_cast<std::uint32_t>(key)); }

// The `count` best of a row that has so many, in no order; false where there may be a NaN.
UNSPOOL_TARGET bool find(const float* row, i64 width, i64 count, Key (&found)[kRoom]) {
    float tops[kStretches], sorted[kStretches];
    const i64 stretch = (width + kStretches * kStep - 1) / (kStretches * kStep) * kStep;
    i64 stretches = 0;
    Vec total = Vec{};  // NaN if any score is, or they are infinite both ways
    for (i64 begin = 0; begin < width; begin += stretch) {
        const i64 end = std::min(begin + stretch, width);
        Vec top = load(row + begin, std::min(end - begin, kWidth));
        if (end - begin < kWidth) top = within(0, end - begin, top, set(-std::numeric_limits<float>::infinity()));
        i64 i = begin;
        for (; i + kWidth <= end; i += kWidth) {
            const Vec x = load(row + i);
            top = max(top, x);
            total = total + x;
        }
        float greatest = UNSPOOL_LEVEL::greatest(top);
        for (; i < end; i++) {
            greatest = std::max(greatest, row[i]);
            total = total + set(row[i]);
        }
        tops[stretches++] = greatest;
    }
    if (any_nan(total)) return false;
    float least = -std::numeric_limits<float>::infinity();
    if (stretches >= count) {
        std::copy(tops, tops + stretches, sorted);
        std::nth_element(sorted, sorted + count - 1, sorted + stretches, std::greater<>());
        least = sorted[count - 1];
    }
    i64 some = 0;
    for (i64 s = 0; s < stretches; s++) {
        if (tops[s] < least) continue;
        const i64 end = std::min((s + 1) * stretch, width);
        for (i64 begin = s * stretch; begin < end; begin += kWidth) {
            const i64 there = std::min(end - begin, kWidth);
            if (there == kWidth && !any_not_below(load(row + begin), set(least))) continue;
            for (i64 i = begin; i < begin + there; i++)
                if (row[i] >= least) found[some++] = key_of(row[i], i);
            if (some <= kRoom - kWidth) continue;
            std::nth_element(found, found + count - 1, found + some, std::greater<>());
            some = count;
            // what comes later has to be greater
            least = std::nextafter(row[place_of(found[count - 1])], std::numeric_limits<float>::infinity());
        }
    }
    std::nth_element(found, found + count - 1, found + some, std::greater<>());
    return true;
}

UNSPOOL_TARGET bool keep_row(const float* row, i64 width, i64 count, float filler, float* out) {
    Key found[kRoom];
    if (!find(row, width, count, found)) return false;
    const float least = row[place_of(found[count - 1])];
    for (i64 i = 0; i < width; i += kWidth) {
        const i64 there = std::min(width - i, kWidth);
        const Vec x = load(row + i, there);
        store(out + i, where_less(x, set(least), set(filler), x), there);
    }
    return true;
}

bool best_row(const float* row, i64 width, i64 count, float* values, i64* places) {
    Key found[kRoom];
    if (!find(row, width, count, found)) return false;
    std::sort(found, found + count, std::greater<>());
    for (i64 i = 0; i < count; i++) {
        places[i] = place_of(found[i]);
        values[i] = row[places[i]];
    }
    return true;
}

template <class Work>
int each_row(i64 rows, i64 width, int threads, const Work& work) {
    std::atomic<int> strange{0};
    parallel_for(rows * width > kSerial ? threads : 1, rows, [&](i64 row) {
        if (!work(row)) strange = 1;
    });
    return strange;
}

int keep_best(const float* scores, i64 rows, i64 width, i64 count, float filler, float* out, int threads) {
    return each_row(rows, width, threads, [=](i64 row) {
        return keep_row(scores + row * width, width, count, filler, out + row * width);
    });
}

int best(const float* scores, i64 rows, i64 width, i64 count, float* values, i64* places, int threads) {
    return each_row(rows, width, threads, [=](i64 row) {
        return best_row(scores + row * width, width, count, values + row * count, places + row * count);
    });
}

}  // namespace
}  // namespace unspool::UNSPOOL_LEVEL::sorting

// Draws: which number of a row of probabilities wins as the largest of p / e, with the exponential noise e that torch's
// CPU generator would give each, which is not made for all: few can win.
//
// The generator is mt19937 (Matsumoto and Nishimura, 1998): 32-bit words x[n] = x[n - 227] ^ twist(x[n - 624], x[n - 623]),
// tempered when they are read. A noise takes two words, of which the lower 53 bits are u times 2^53, and is -log(1 - u).
// That is at least u, which is at least what the first word has of it: p over that is a bound of p / e.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace unspool::UNSPOOL_LEVEL::drawing {
namespace {

using u32 = std::uint32_t;

constexpr i64 kWords = 624;              // of the generator's state
constexpr i64 kPairs = kWords / 2;
constexpr i64 kBehind = 320;             // pairs kept of the past: a state and more, of whole vectors
constexpr i64 kAhead = 2048;             // pairs made at a time
constexpr u32 kUpper = 0x1fffff;         // bits of the first word that u has
constexpr float kUnit = 1.0f / 0x200000;  // what the lowest of them is of u
constexpr i64 kSerial = 16 << 10;         // up to so many numbers, threads do not pay

// What `torch.Generator.get_state` gives begins with this. Of the words, `next` were read, or all and `next` is 0; `left`
// is one more than are left.
struct State {
    std::uint64_t seed;
    std::int32_t left, seeded;
    std::uint64_t next;
    std::uint64_t words[kWords];
};

inline u32 twist(u32 upper, u32 lower) {
    return (((upper & 0x80000000u) | (lower & 0x7fffffffu)) >> 1) ^ (lower & 1 ? 0x9908b0dfu : 0);
}
UNSPOOL_TARGET inline Ints twist(Ints upper, Ints lower) {
    const Ints both = (upper & set_ints(0x80000000u)) | (lower & set_ints(0x7fffffffu));
    return (both >> 1) ^ ((set_ints(0) - (lower & set_ints(1))) & set_ints(0x9908b0dfu));
}

inline u32 tempered(u32 x) {
    x ^= x >> 11;
    x ^= x << 7 & 0x9d2c5680u;
    x ^= x << 15 & 0xefc60000u;
    return x ^ x >> 18;
}
UNSPOOL_TARGET inline Ints tempered(Ints x) {
    x ^= x >> 11;
    x ^= (x << 7) & set_ints(0x9d2c5680u);
    x ^= (x << 15) & set_ints(0xefc60000u);
    return x ^ (x >> 18);
}

// The words from a generator's place on, as pairs: the first and the second words of the numbers. Counted from the start
// of the state that it began with, pair m has the words odd + 2 m and the next.
class Stream {
public:
    // After `read` words, 1 to all, of a state.
    template <class Word>
    Stream(const Word* words, i64 read) : odd_(read % 2), at_(kBehind - kPairs + read / 2) {
        u32 x[kWords + 1];
        for (i64 i = 0; i < kWords; i++) x[i] = static_cast<u32>(words[i]);
        x[kWords] = x[kWords - 227] ^ twist(x[0], x[1]);
        for (i64 i = 0; i < kPairs; i++) {
            first_[kBehind - kPairs + i] = x[odd_ + 2 * i];
            second_[kBehind - kPairs + i] = x[odd_ + 2 * i + 1];
        }
    }

    // Gives the words of the next `count` numbers to `look(first, second, numbers)`, in parts.
    template <class Look>
    UNSPOOL_TARGET void read(i64 count, const Look& look) {
        while (count > 0) {
            if (at_ == end_) go_on();
            const i64 some = std::min(count, end_ - at_);
            look(first_ + at_, second_ + at_, some);
            at_ += some;
            count -= some;
        }
    }

    // Sets the state to where the generator now stands, if it is the one that the stream began with.
    UNSPOOL_TARGET void leave(State& state) {
        const i64 next = odd_ + 2 * (begin_ + at_), block = (next - 1) / kWords * kWords;
        const i64 last = (block + kWords - 1 - odd_) / 2;
        if (begin_ + end_ <= last) go_on();
        for (i64 i = 0; block > 0 && i < kWords; i++) {
            const i64 word = block + i - odd_;
            state.words[i] = (word % 2 ? second_ : first_)[word / 2 - begin_];
        }
        state.next = static_cast<std::uint64_t>(next - block);
        state.left = static_cast<std::int32_t>(kWords + 1 - (next - block));
    }

private:
    // Makes pairs after those that are there, of which the last ones are kept.
    UNSPOOL_TARGET void go_on() {
        const i64 gone = end_ - kBehind;
        if (gone > 0) {
            std::copy(first_ + gone, first_ + end_, first_);
            std::copy(second_ + gone, second_ + end_, second_);
        }
        begin_ += gone;
        at_ -= gone;
        end_ = kBehind + kAhead;
        for (i64 i = kBehind; i < end_; i += kWidth) {
            const Ints first = load_ints(first_ + i - 312), second = load_ints(second_ + i - 312);
            store_ints(first_ + i, load_ints(second_ + i - 114) ^ twist(first, second));
            store_ints(second_ + i, load_ints(first_ + i - 113) ^ twist(second, load_ints(first_ + i - 311)));
        }
    }

    i64 odd_, at_, end_ = kBehind, begin_ = kPairs - kBehind;  // the next pair, how many, which pair is at 0
    alignas(64) u32 first_[kBehind + kAhead + kWidth];
    alignas(64) u32 second_[kBehind + kAhead + kWidth];
};

inline float noise(u32 first, u32 second) {
    const std::uint64_t both = static_cast<std::uint64_t>(tempered(first) & kUpper) << 32 | tempered(second);
    return static_cast<float>(-std::log1p(-(static_cast<double>(both) * 0x1p-53)));
}

// The largest ratio so far, the first of equals; NaN where a number is none.
struct Best {
    float ratio = 0;
    i64 place = 0;
};

UNSPOOL_TARGET void look(const float* p, const u32* first, const u32* second, i64 count, i64 from, Best& best) {
    const Vec least = set(std::numeric_limits<float>::denorm_min()), unit = set(kUnit);
    for (i64 i = 0; i < count && !std::isnan(best.ratio); i += kWidth) {
        const i64 there = std::min(count - i, kWidth);
        const Vec numbers = there < kWidth ? load(p + i, there) : load(p + i);
        if (!any_not_below(numbers, least)) continue;  // filters leave long stretches of 0
        const Vec bounds = from_integers(tempered(load_ints(first + i)) & set_ints(kUpper)) * unit * set(best.ratio);
        if (!any_not_below(numbers, bounds)) continue;
        for (i64 j = i; j < i + there; j++) {
            if (p[j] < static_cast<float>(tempered(first[j]) & kUpper) * kUnit * best.ratio) continue;
            const float ratio = p[j] / noise(first[j], second[j]);
            if (ratio > best.ratio || std::isnan(ratio)) best = {ratio, from + j};
        }
    }
}

// The winner of a row, the numbers of whose noise are the stream's next; -1 where no ratio is a positive number.
UNSPOOL_TARGET void draw_row(Stream& stream, const float* p, i64 vocab, i64* token, float* ratio) {
    Best best;
    i64 done = 0;
    stream.read(vocab, [&](const u32* first, const u32* second, i64 count) {
        look(p + done, first, second, count, done, best);
        done += count;
    });
    *token = std::isfinite(best.ratio) && best.ratio > 0 ? best.place : -1;
    *ratio = best.ratio;
}

UNSPOOL_TARGET int draw(void* generator, const float* probs, i64 vocab, const i64* places, i64 rows, i64* tokens,
                        float* ratios) {
    State& state = *static_cast<State*>(generator);
    const i64 read = kWords + 1 - state.left;
    const bool known = state.seeded == 1 && read >= 1 && read <= kWords &&
                       (state.next == static_cast<std::uint64_t>(read) || (read == kWords && state.next == 0));
    if (!known) return 1;
    Stream stream(state.words, read);
    for (i64 row = 0; row < rows; row++) {
        const i64 place = places ? places[row] : row;
        if (place >= 0) draw_row(stream, probs + place * vocab, vocab, tokens + place, ratios + place);
        else stream.read(vocab, [](const u32*, const u32*, i64) {});
    }
    stream.leave(state);
    return 0;
}

void draw_seeded(const float* probs, i64 rows, i64 vocab, const std::uint32_t* seeds, i64* tokens, float* ratios,
                 int threads) {
    parallel_for(rows * vocab > kSerial ? threads : 1, rows, [=](i64 row) {
        u32 words[kWords] = {seeds[row]};
        for (u32 i = 1; i < kWords; i++) words[i] = 1812433253u * (words[i - 1] ^ words[i - 1] >> 30) + i;
        Stream stream(words, kWords);
        draw_row(stream, probs + row * vocab, vocab, tokens + row, ratios + row);
    });
}

}  // namespace
}  // namespace unspool::UNSPOOL_LEVEL::drawing

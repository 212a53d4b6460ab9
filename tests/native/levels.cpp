// Runs the kernels of one level without Python, so that another processor's can be tried in an emulator. Writes what they
// give to standard output as fp32 numbers, and fails where a row's results depend on its company or on threads.
//
// The same call again must find all its memory from before.
//
// usage: levels NAME [cut]
//
// With `cut`, a result of the small operations has one number less room than it needs, which sanitizers must see.

#include "levels.h"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <vector>

extern "C" {
int unspool_levels();
const char* unspool_level_name(int level);
const char* unspool_level_lacks(int level);
void unspool_choose(int level);
std::int64_t unspool_linear_bf16_size(std::int64_t outputs, std::int64_t inputs);
void unspool_linear_bf16_pack(const unspool::bf16*, unspool::bf16*, std::int64_t, std::int64_t, std::int64_t, std::int64_t, int);
void unspool_quantised_pack(const unspool::QuantisedWeight*, const unspool::u8*, std::int64_t, std::int64_t, int);
}

using namespace unspool;

static std::atomic<i64> taken = 0;  // pieces of memory

void* operator new(std::size_t size) {
    taken++;
    void* memory = std::malloc(size);
    if (!memory) throw std::bad_alloc();
    return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

std::uint64_t state = 1;
bool cut = false;

// About even between -1 and 1.
float draw() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<std::int32_t>(state >> 32)) / 2147483648.0f;
}

bf16 half(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<bf16>(bits >> 16);
}

float single(bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}
float single(float x) { return x; }

template <class Number>
std::vector<Number> draws(i64 count) {
    std::vector<Number> out;
    for (i64 i = 0; i < count; i++) {
        if constexpr (sizeof(Number) == 2)
            out.push_back(half(draw()));
        else
            out.push_back(draw());
    }
    return out;
}

template <class Number>
void print(const std::vector<Number>& numbers) {
    for (const Number x : numbers) {
        const float wide = single(x);
        std::fwrite(&wide, 4, 1, stdout);
    }
}

template <class Number>
void expect_same(const std::vector<Number>& a, const std::vector<Number>& b, const char* what) {
    if (a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(Number)) == 0) return;
    std::fprintf(stderr, "%s: other bits alone than in company\n", what);
    std::exit(1);
}

template <class Run>
void expect_no_memory(const char* what, const Run& run) {
    run();
    const i64 before = taken;
    run();
    if (taken == before) return;
    std::fprintf(stderr, "%s: takes memory again\n", what);
    std::exit(1);
}

// All rows at once on three threads, and each alone on one; `run(first, rows, out, threads)`.
template <class Run>
void each_alone(const char* what, i64 rows, i64 outputs, const Run& run) {
    std::vector<bf16> together(static_cast<std::size_t>(rows * outputs)), alone(together);
    run(0, rows, together.data(), 3);
    for (i64 row = 0; row < rows; row++) run(row, 1, alone.data() + row * outputs, 1);
    expect_same(together, alone, what);
    print(together);
    for (const i64 count : {i64{1}, i64{16}, rows}) expect_no_memory(what, [&] { run(0, count, alone.data(), 1); });
}

void products() {
    for (const i64 inputs : {70, 576, 1100}) {
        const i64 outputs = 75, rows = 37;
        const auto weight = draws<bf16>(outputs * inputs), x = draws<bf16>(rows * inputs), bias = draws<bf16>(outputs);
        std::vector<bf16> lines(static_cast<std::size_t>(unspool_linear_bf16_size(outputs, inputs)));
        unspool_linear_bf16_pack(weight.data(), lines.data(), 0, outputs, outputs, inputs, 2);
        const PackedWeight packed{lines.data(), outputs, inputs};
        each_alone("bf16", rows, outputs, [&](i64 first, i64 count, bf16* out, int threads) {
            chosen->linear(&packed, x.data() + first * inputs, inputs, bias.data(), out, count, threads);
        });
        for (const i64 group : {64, 32, 128}) {
            const bool nibbles = group != 64 || inputs != 576;
            QuantisedWeight w{};
            w.outputs = outputs, w.inputs = inputs, w.group = group, w.nibbles = nibbles;
            const i64 groups = w.width() / group, padded = w.blocks() * kLanes;
            std::vector<u8> codes, packed_lines(static_cast<std::size_t>(padded * w.width() / (nibbles ? 2 : 1)));
            for (i64 i = 0; i < outputs * inputs; i++) codes.push_back(static_cast<u8>((draw() + 1) * (nibbles ? 7.99f : 127.9f)));
            std::vector<fp16> scales, offsets;  // between 0.5 and 1 in fp16
            for (i64 i = 0; i < padded * groups; i++) {
                scales.push_back(static_cast<fp16>(0x3800 + static_cast<int>((draw() + 1) * 500)));
                offsets.push_back(static_cast<fp16>(0xb800 + static_cast<int>((draw() + 1) * 500)));
            }
            auto units = draws<float>(padded);
            auto table = draws<bf16>(16);
            table.insert(table.end(), table.begin(), table.begin() + 16);
            w.lines = packed_lines.data(), w.units = units.data();
            if (nibbles) w.scales = scales.data(), w.table = table.data();
            if (group == 128) w.offsets = offsets.data();
            unspool_quantised_pack(&w, codes.data(), 0, outputs, 2);
            each_alone(nibbles ? "nibbles" : "bytes", rows, outputs, [&](i64 first, i64 count, bf16* out, int threads) {
                chosen->quantised(&w, x.data() + first * inputs, inputs, bias.data(), out, count, 0, 0, threads);
            });
        }
    }
}

// Of plain rows, and of rows with equal ones, with NaN, and with nothing above -infinity.
template <class Number>
void greatest() {
    const int bytes = sizeof(Number);
    const i64 rows = 5, width = 2005;
    const auto number = [](float wide) {
        if constexpr (sizeof(Number) == 2) return half(wide);
        else return wide;
    };
    const float nothing = -std::numeric_limits<float>::infinity();
    auto x = draws<Number>(rows * width);
    for (const i64 i : {2000, 701, 1999}) x[static_cast<std::size_t>(width + i)] = number(3.0f);
    x[static_cast<std::size_t>(2 * width + 1000)] = number(std::numeric_limits<float>::quiet_NaN());
    for (i64 i = 0; i < width; i++) x[static_cast<std::size_t>(3 * width + i)] = number(nothing);
    std::vector<i64> places(rows), alone(rows), plain(rows);
    std::vector<float> shares(rows);
    chosen->greatest(bytes, x.data(), rows, width, places.data(), shares.data(), 3);
    chosen->greatest(bytes, x.data(), rows, width, plain.data(), nullptr, 2);
    expect_same(places, plain, "greatest without shares");
    for (i64 row = 0; row < rows; row++) {
        float share = 0;
        chosen->greatest(bytes, x.data() + row * width, 1, width, alone.data() + row, &share, 1);
        expect_same(std::vector<float>{shares[static_cast<std::size_t>(row)]}, {share}, "shares");
    }
    expect_same(places, alone, "greatest");
    if (places[1] != 701 || places[2] != -1 || places[3] != -1) std::exit(1);
    print(std::vector<float>(places.begin(), places.end()));
    print(shares);
}

template <class Number>
void between() {
    const int bytes = sizeof(Number);
    for (const i64 width : {5, 64, 77}) {
        const i64 rows = 6;
        auto x = draws<Number>(rows * 2 * width), branch = draws<Number>(rows * width);
        const auto weight = draws<Number>(2 * width), cos = draws<Number>(rows * 2 * width), sin = draws<Number>(rows * 2 * width);
        std::vector<Number> out(static_cast<std::size_t>(rows * width - cut));
        chosen->silu_gate(bytes, x.data(), rows, width, out.data(), 2);
        print(out);
        chosen->rms_norm(bytes, x.data(), branch.data(), weight.data(), rows, width, 1e-5f, out.data(), 2);
        print(out);
        print(branch);
        chosen->turn(bytes, x.data(), rows, 2 * width, 1, 2 * width, cos.data(), sin.data(), 2 * width, 1);
        print(x);
        chosen->norm_parts(bytes, x.data(), rows, 2 * width, 2, width, weight.data(), 1e-5f, 2);
        print(x);
        for (const float factor : {1.0f, 0.22f}) {
            chosen->add(bytes, x.data(), branch.data(), factor, rows, width, 2);
            print(branch);
        }
        chosen->add(bytes, nullptr, branch.data(), 0.22f, rows, width, 2);
        print(branch);
    }
    greatest<Number>();
    std::vector<u8> codes(4 * 100);
    std::vector<float> scales(4 * 4);
    const auto rows = draws<Number>(4 * 100);
    chosen->encode(rows.data(), bytes == 4, 4, 100, 100, 0, nullptr, nullptr, codes.data(), scales.data());
    print(std::vector<float>(codes.begin(), codes.end()));
    print(std::vector<float>(scales.begin(), scales.begin() + 4));
}

template <class Number>
void attention() {
    for (const int dim : {64, 80, 16}) {
        const int heads = 6, kv_heads = 2, window = dim == 80 ? 100 : 0;
        const i64 slots = 60 * 16, lengths[3] = {300, 40, 270}, feeds[3] = {1, 40, 30};
        std::vector<i64> tables;
        for (i64 i = 0; i < 57; i++) tables.push_back((i * 7) % 60);
        auto keys = draws<Number>(slots * kv_heads * dim), values = draws<Number>(slots * kv_heads * dim);
        const i64 tokens = 71;
        const auto q = draws<Number>(tokens * heads * dim), k = draws<Number>(tokens * kv_heads * dim);
        const auto v = draws<Number>(tokens * kv_heads * dim);
        std::vector<Number> together(q.size()), alone(q.size());
        const auto run = [&](const std::vector<i64>& plan, i64 first, Number* out, int threads) {
            chosen->attend(plan.data(), tables.data(), sizeof(Number), heads, kv_heads, dim, q.data() + first * heads * dim,
                           heads * dim, k.data() + first * kv_heads * dim, kv_heads * dim, v.data() + first * kv_heads * dim,
                           kv_heads * dim, keys.data(), values.data(), out, 0.3f, dim == 16 ? 5.0f : 0.0f, threads);
        };
        std::vector<i64> plan{3, 16, window};
        i64 first = 0;
        for (int row = 0; row < 3; row++) {
            plan.insert(plan.end(), {lengths[row], feeds[row], first, row * 19});
            run({1, 16, window, lengths[row], feeds[row], 0, row * 19}, first, alone.data() + first * heads * dim, 1);
            first += feeds[row];
        }
        run(plan, 0, together.data(), 3);
        expect_same(together, alone, "attention");
        print(together);
        expect_no_memory("attention", [&] { run(plan, 0, alone.data(), 1); });
    }
}

void choices() {
    const i64 rows = 5, vocab = 3003, best = 40;
    auto scores = draws<float>(rows * vocab), probs = scores;
    for (float& p : probs) p = p > 0 ? p : 0;
    std::vector<std::uint32_t> words(1264, 0);  // a generator's state
    for (std::size_t i = 6; i < 1254; i += 2) words[i] = static_cast<std::uint32_t>((draw() + 1) * 2147483520.0f);
    words[2] = 624, words[3] = 1, words[4] = 1;  // one of its words was read
    std::vector<i64> tokens(rows), alone(rows), places(rows * best), order{4, -1, 0, 2, 3, 1};
    std::vector<float> ratios(rows), kept(scores), values(rows * best);
    if (chosen->draw(words.data(), probs.data(), vocab, order.data(), 6, tokens.data(), ratios.data())) std::exit(1);
    print(ratios);
    print(std::vector<float>(tokens.begin(), tokens.end()));
    for (const std::uint32_t word : words) print(std::vector<float>{static_cast<float>(word >> 16), static_cast<float>(word & 65535)});
    chosen->draw_seeded(probs.data(), rows, vocab, words.data() + 100, tokens.data(), ratios.data(), 3);
    for (i64 row = 0; row < rows; row++)
        chosen->draw_seeded(probs.data() + row * vocab, 1, vocab, words.data() + 100 + row, alone.data() + row, ratios.data() + row, 1);
    expect_same(tokens, alone, "draws");
    print(ratios);
    print(std::vector<float>(tokens.begin(), tokens.end()));
    if (chosen->keep_best(scores.data(), rows, vocab, best, -2.0f, kept.data(), 3)) std::exit(1);
    if (chosen->best(scores.data(), rows, vocab, best, values.data(), places.data(), 3)) std::exit(1);
    print(kept);
    print(values);
    print(std::vector<float>(places.begin(), places.end()));
}

}  // namespace

int main(int count, char** names) {
    cut = count > 2;
    for (int level = 0; level < unspool_levels(); level++) {
        if (std::string(names[1]) != unspool_level_name(level)) continue;
        if (*unspool_level_lacks(level)) {
            std::fprintf(stderr, "this machine lacks %s\n", unspool_level_lacks(level));
            return 2;
        }
        unspool_choose(level);
        products();
        between<float>();
        between<bf16>();
        attention<float>();
        attention<bf16>();
        choices();
        return 0;
    }
    std::fprintf(stderr, "no level %s\n", names[1]);
    return 3;
}

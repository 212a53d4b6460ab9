// Runs a program; see program.h.

#include "program.h"

#include "levels.h"
#include "parallel.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" unspool::i64 unspool_linear_bf16_rows(const unspool::PackedWeight* weight, const unspool::i64* indexes,
                                                 unspool::i64 count, unspool::bf16* out, int threads);
extern "C" unspool::i64 unspool_quantised_rows(const unspool::QuantisedWeight* weight, const unspool::i64* indexes,
                                               unspool::i64 count, void* out, int wide, int threads);
extern "C" void unspool_lowrank(const void* const* pairs, unspool::i64 count, const unspool::i64* starts,
                                const unspool::i64* places, const unspool::bf16* x, unspool::i64 stride,
                                unspool::bf16* y, int threads);

namespace {

using namespace unspool;

struct Machine {
    const Step& s;
    int bytes, threads;

    explicit Machine(const Step& step)
        : s(step), bytes(static_cast<int>(step.bytes)), threads(static_cast<int>(step.threads)) {}

    const void* read(i64 place) const { return place < 0 ? s.input : s.buffers + place * s.tokens * s.bytes; }
    void* write(i64 place) const { return s.buffers + place * s.tokens * s.bytes; }

    // Low-rank pairs change what a product gave.
    void adapt(const Operation& o) const {
        if (!s.pairs || !s.pairs[o.number]) return;
        unspool_lowrank(s.pairs[o.number], s.pair_count, s.starts, s.places, static_cast<const bf16*>(read(o.from)),
                        o.width, static_cast<bf16*>(write(o.to)), threads);
    }

    // Queries, keys and values of a token lie one after the other.
    int attend(const Operation& o) const {
        const i64 dim = o.width, heads = o.parts, kv_heads = o.stride, group = o.other;
        const i64 stride = (heads + 2 * kv_heads) * dim;
        const u8* q = static_cast<const u8*>(read(o.from));
        const u8 *k = q + heads * dim * s.bytes, *v = k + kv_heads * dim * s.bytes;
        return chosen->attend(s.plans[2 * group], s.plans[2 * group + 1], bytes, static_cast<int>(heads),
                              static_cast<int>(kv_heads), static_cast<int>(dim), q, stride, k, stride, v, stride,
                              s.pools[2 * o.number], s.pools[2 * o.number + 1], write(o.to), o.first, o.second, threads);
    }

    // All of them. Returns 0, or 1 where memory ran out.
    int run(const Operation* operations, i64 count) const {
        int failed = 0;
        for (i64 i = 0; i < count && !failed; i++) {
            if (operations[i].kind == Kind::quantised) {
                const Operation* end = operations + count;
                const Operation* next =
                    std::find_if(operations + i + 1, end, [](const Operation& o) { return o.kind == Kind::quantised; });
                coming = next == end ? nullptr : static_cast<const QuantisedWeight*>(next->weight);
            }
            failed = run(operations[i]);
        }
        coming = nullptr;
        return failed;
    }

    int run(const Operation& o) const {
        switch (o.kind) {
            case Kind::norm:  // `from` [width] by `weight`; `first` is epsilon
                chosen->rms_norm(bytes, read(o.from), nullptr, o.weight, s.tokens, o.width, o.first, write(o.to), threads);
                return 0;
            case Kind::add_norm:  // the same of `from` + `other`, which becomes the sum
                chosen->rms_norm(bytes, read(o.from), write(o.other), o.weight, s.tokens, o.width, o.first, write(o.to),
                                 threads);
                return 0;
            case Kind::norm_parts:  // in place, of `parts` times `width` numbers from number `number` of a token on
                chosen->norm_parts(bytes, static_cast<u8*>(write(o.to)) + o.number * s.bytes, s.tokens, o.stride, o.parts,
                                   o.width, o.weight, o.first, threads);
                return 0;
            case Kind::turn:  // in place, of `parts` heads of `width` numbers
                chosen->turn(bytes, write(o.to), s.tokens, o.stride, o.parts, o.width, s.cos, s.sin, s.turned, threads);
                return 0;
            case Kind::attend:
                return attend(o);
            case Kind::product:  // of `width` inputs
                chosen->linear(static_cast<const PackedWeight*>(o.weight), static_cast<const bf16*>(read(o.from)), o.width,
                               static_cast<const bf16*>(o.bias), static_cast<bf16*>(write(o.to)), s.tokens, threads);
                adapt(o);
                return 0;
            case Kind::quantised: {
                const int wide = bytes == 4;
                chosen->quantised(static_cast<const QuantisedWeight*>(o.weight), read(o.from), o.width, o.bias,
                                  write(o.to), s.tokens, wide, wide, threads);
                adapt(o);
                return 0;
            }
            case Kind::gate:  // of twice `width` numbers
                chosen->silu_gate(bytes, read(o.from), s.tokens, o.width, write(o.to), threads);
                return 0;
            case Kind::add:  // `to` times `first`, plus `from` where `parts` is not 0
                chosen->add(bytes, o.parts ? read(o.from) : nullptr, write(o.to), o.first, s.tokens, o.width, threads);
                return 0;
        }
        return 0;
    }
};

// Decoding without anyone who asks between the steps.
struct Continuing {
    const Machine machine;
    const Operation* operations;
    i64 count;
    const Continuation& c;

    // The rows' tokens and positions, as a step takes them; false where there are none such.
    bool feed(const i64* tokens) const {
        const int threads = machine.threads;
        for (i64 row = 0; row < c.rows; row++) {
            if (tokens[row] < 0 || tokens[row] >= c.vocab) return false;
            if (c.cos && (c.positions[row] < 0 || c.positions[row] >= c.known)) return false;
        }
        if (c.form == 1)
            unspool_quantised_rows(static_cast<const QuantisedWeight*>(c.embedding), tokens, c.rows, c.input,
                                   machine.bytes == 4, threads);
        if (c.form == 0)
            unspool_linear_bf16_rows(static_cast<const PackedWeight*>(c.embedding), tokens, c.rows,
                                     static_cast<bf16*>(c.input), threads);
        const i64 whole = c.hidden * machine.bytes;
        for (i64 row = 0; row < c.rows && c.form == 2; row++)
            std::memcpy(static_cast<u8*>(c.input) + row * whole, static_cast<const u8*>(c.embedding) + tokens[row] * whole,
                        static_cast<std::size_t>(whole));
        const i64 width = machine.s.turned * machine.bytes;
        for (i64 row = 0; row < c.rows && c.cos; row++) {
            std::memcpy(static_cast<u8*>(c.turned_cos) + row * width, c.cos + c.positions[row] * width,
                        static_cast<std::size_t>(width));
            std::memcpy(static_cast<u8*>(c.turned_sin) + row * width, c.sin + c.positions[row] * width,
                        static_cast<std::size_t>(width));
        }
        return true;
    }

    // All operations of one step. Returns 0, -1 where memory ran out, or -2 where a token or a position is none.
    i64 once(const i64* tokens) const {
        return !feed(tokens) ? -2 : machine.run(operations, count) ? -1 : 0;
    }

    // Whether a row's token of a step is given.
    bool given(i64 step, i64 row) const { return step < c.steps && c.given[step * c.rows + row] >= 0; }

    // Rows that go on after a step's choice, of those that still went on before it.
    i64 going(std::vector<bool>& ended, i64 step) const {
        i64 left = 0;
        for (i64 row = 0; row < c.rows; row++) {
            if (given(step + 1, row)) {
                left++;
                continue;
            }
            const i64 token = c.chosen[step * c.rows + row];
            const bool end = std::find(c.ends, c.ends + c.end_count, token) != c.ends + c.end_count;
            const bool unsure = c.confidence > 0 && c.shares[step * c.rows + row] < c.confidence;
            const auto place = static_cast<std::size_t>(row);
            ended[place] = ended[place] || token < 0 || end || unsure || step + 1 >= c.limits[row];
            left += !ended[place];
        }
        return left;
    }

    // How many steps it took, or what `once` says.
    i64 run() const {
        if (!c.chosen) {
            const i64 failed = once(c.given);
            return failed ? failed : 1;
        }
        std::vector<bool> ended(static_cast<std::size_t>(c.rows));
        std::vector<i64> fed(static_cast<std::size_t>(c.rows));
        for (i64 step = 0; step < c.steps; step++) {
            const i64 first = step * c.rows;
            for (i64 row = 0; row < c.rows; row++)
                fed[static_cast<std::size_t>(row)] =
                    given(step, row) ? c.given[first + row] : std::max<i64>(c.chosen[first - c.rows + row], 0);
            if (const i64 failed = once(fed.data())) return failed;
            unspool::chosen->greatest(machine.bytes, machine.read(c.logits), c.rows, c.vocab, c.chosen + first,
                                       c.confidence > 0 ? c.shares + first : nullptr, machine.threads);
            for (i64 row = 0; row < c.rows; row++) {
                c.positions[row]++;
                for (i64 group = 0; group < c.groups; group++) c.plans[group][3 + 4 * row]++;
            }
            if (2 * going(ended, step) < c.rows) return step + 1;
        }
        return c.steps;
    }
};

}  // namespace

extern "C" {

// Runs `count` operations of a step. Returns 0, or 1 where memory ran out.
int unspool_run(const unspool::Operation* operations, i64 count, const unspool::Step* step) {
    struct Run {
        const Machine machine;
        const unspool::Operation* operations;
        i64 count;
        int failed;
    } run{Machine(*step), operations, count, 0};
    with_team(
        run.machine.threads,
        [](void* data) {
            Run& run = *static_cast<Run*>(data);
            run.failed = run.machine.run(run.operations, run.count);
        },
        &run);
    return run.failed;
}

// Runs `count` operations for each step of a continuation. `step` is that of each of them, with the continuation's input,
// cosines and sines. Returns how many steps there were, -1 where memory ran out, or -2
// where a token or a position is none.
i64 unspool_continue(const unspool::Operation* operations, i64 count, const unspool::Step* step,
                     const unspool::Continuation* continuation) {
    struct Run {
        const Continuing continuing;
        i64 steps;
    } run{{Machine(*step), operations, count, *continuation}, 0};
    with_team(
        run.continuing.machine.threads,
        [](void* data) { static_cast<Run*>(data)->steps = static_cast<Run*>(data)->continuing.run(); }, &run);
    return run.steps;
}

}  // extern "C"

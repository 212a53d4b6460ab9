// Runs a program; see program.h.

#include "program.h"

#include "levels.h"
#include "parallel.h"

#include <cstdint>

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
            for (i64 i = 0; i < run.count && !run.failed; i++) run.failed = run.machine.run(run.operations[i]);
        },
        &run);
    return run.failed;
}

}  // extern "C"

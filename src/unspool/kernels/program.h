// A decoder's step as a list of operations, so that one call runs all layers: at a few rows the calls from Python would
// cost as much as the numbers. program.cpp runs it; program.py writes it.

#pragma once

#include "layout.h"

namespace unspool {

enum class Kind : i64 { norm, add_norm, norm_parts, turn, attend, product, quantised, gate, add };

// One operation. `from`, `to` and `other` are buffers: how many numbers of each token lie before them, or -1 for the
// step's input. What the rest means depends on the kind; program.cpp says it.
struct Operation {
    Kind kind;
    i64 from, to, other;
    const void *weight, *bias;
    i64 width, parts, stride, number;
    float first, second;
};

// What differs from step to step.
struct Step {
    i64 tokens, bytes;                // of the step; of a number
    const void* input;                // [tokens, hidden]
    u8* buffers;                      // one after the other, each [tokens, its width]
    const void *cos, *sin;            // [tokens, turned]
    i64 turned;
    const i64* const* plans;          // of each group of layers: plan and tables, see attention.h
    void* const* pools;               // of each layer: keys and values
    const void* const* const* pairs;  // of each product: its low-rank pairs, or null; null where there are none at all
    i64 pair_count;
    const i64 *starts, *places;       // which rows have which pair, see lowrank.cpp
    i64 threads;
};

// Steps in which every row feeds one token: a given one or, when it has no more, the likeliest after the one before.
struct Continuation {
    const void* embedding;  // by `form`: 0 PackedWeight, 1 QuantisedWeight, 2 numbers [vocab, hidden]
    i64 form, hidden;
    i64 logits, vocab;      // their buffer and width
    const u8 *cos, *sin;    // [known, turned]; null where nothing is turned
    i64 known;              // positions
    i64 rows, steps;        // of steps, at most so many
    const i64* given;       // [steps, rows]: tokens to feed, -1 for what the step before chose; none in the first step
    i64* chosen;            // [steps, rows]; -1 where there is nothing to choose. Null: one step, for its logits
    i64* positions;         // [rows], of the next tokens; counted on
    i64* const* plans;      // of each group of layers, whose rows' lengths are counted on too
    i64 groups;
    const i64* limits;      // [rows], steps that each row takes at most
    const i64* ends;        // tokens that end a row
    i64 end_count;
    float confidence;       // a row ends with the first token of less probability; 0: never
    float* shares;          // [steps, rows]: the probabilities of what was chosen; with `confidence` only
    void* input;            // [rows, hidden]
    void *turned_cos, *turned_sin;  // [rows, turned]
};

}  // namespace unspool

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

}  // namespace unspool

// How weights are packed, on every level: the same inputs of sixteen outputs lie together on a line of 64 bytes, and lines
// in the order of use. See linear.cpp and quantised.cpp, which pack them.

#pragma once

#include <cstdint>

namespace unspool {

using bf16 = std::uint16_t;
using fp16 = std::uint16_t;
using u8 = std::uint8_t;
using i64 = std::int64_t;

constexpr i64 kLanes = 16;      // outputs of a block
constexpr i64 kPanel = 2;       // blocks of a panel; a weight has a whole number of panels
constexpr i64 kByteGroup = 64;  // activations of a row that share a scale, where weights are bytes

constexpr i64 blocks_of(i64 outputs) { return (outputs + kPanel * kLanes - 1) / (kPanel * kLanes) * kPanel; }

struct PackedWeight {
    const bf16* lines;
    i64 outputs, inputs;
};

struct QuantisedWeight {
    const u8* lines;
    const float* units;   // [outputs, padded]: factor of all that belongs to an output
    const fp16* scales;   // nibbles: [blocks][groups][16]; else null
    const fp16* offsets;  // nibbles: the same, or null
    const bf16* table;    // nibbles: 32 numbers, the 16 twice
    i64 outputs, inputs;
    i64 group;            // inputs that share a scale, a multiple of 32; of bytes, 64 activations that do
    i64 nibbles;          // 0 or 1

    i64 per_line() const { return nibbles ? 8 : 4; }
    i64 width() const { return (inputs + group - 1) / group * group; }
    i64 lines_of_block() const { return width() / per_line(); }
    i64 blocks() const { return blocks_of(outputs); }
};

}  // namespace unspool

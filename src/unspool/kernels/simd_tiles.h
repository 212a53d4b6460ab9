// The processor's tiles (AMX): eight registers of up to sixteen rows of 64 bytes. A test computes them in plain C++ where
// UNSPOOL_EMULATE is set.
//
// The instructions are written out: compilers' own functions for them do not say which memory they read and write.

#pragma once

#include <cstdint>
#include <cstring>

namespace unspool::tiles {

// What every tile holds: rows and bytes of a row.
struct alignas(64) Shape {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};

    void set(int tile, std::int64_t count) {
        bytes[tile] = 64;
        rows[tile] = static_cast<std::uint8_t>(count);
    }
};
static_assert(sizeof(Shape) == 64);

#if !defined(UNSPOOL_EMULATE)

inline void configure(const Shape& shape) { asm volatile("ldtilecfg %0" : : "m"(shape)); }
inline void release() { asm volatile("tilerelease" : : : "memory"); }

template <int T>
inline void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T>
inline void load(const void* from, std::int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T>
inline void store(void* to, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(T), "r"(to), "r"(stride) : "memory");
}
// Sum += rows of `A` times columns of `B`: pairs of bf16.
template <int Sum, int A, int B>
inline void dot_bf16() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(A), "i"(B)); }
// The same of signed bytes in `A` and unsigned ones in `B`, four at a time.
template <int Sum, int A, int B>
inline void dot_bytes() { asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(A), "i"(B)); }

#else

struct Tile {
    std::uint8_t rows[16][64];
};
inline thread_local Tile registers[8];
inline thread_local Shape shape_now;
inline thread_local bool configured = false;

inline void configure(const Shape& shape) {
    shape_now = shape;
    std::memset(registers, 0, sizeof registers);
    configured = true;
}
inline void release() { configured = false; }
inline int rows_of(int tile) { return configured ? shape_now.rows[tile] : (__builtin_trap(), 0); }

template <int T>
void zero() { std::memset(&registers[T], 0, sizeof(Tile)); }
template <int T>
void load(const void* from, std::int64_t stride) {
    zero<T>();
    for (int row = 0; row < rows_of(T); row++)
        std::memcpy(registers[T].rows[row], static_cast<const char*>(from) + row * stride, shape_now.bytes[T]);
}
template <int T>
void store(void* to, std::int64_t stride) {
    for (int row = 0; row < rows_of(T); row++)
        std::memcpy(static_cast<char*>(to) + row * stride, registers[T].rows[row], shape_now.bytes[T]);
}

inline float widened(const std::uint8_t* from) {
    std::uint16_t half;
    std::memcpy(&half, from, 2);
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}

// Sums of even and of odd products over the tile, which are then added together and to what was there.
template <int Sum, int A, int B>
void dot_bf16() {
    for (int row = 0; row < rows_of(Sum); row++)
        for (int column = 0; column < 16; column++) {
            float parts[2] = {}, sum;
            for (int k = 0; k < rows_of(B); k++)
                for (int i = 0; i < 2; i++)
                    parts[i] = __builtin_fmaf(widened(registers[A].rows[row] + 4 * k + 2 * i),
                                              widened(registers[B].rows[k] + 4 * column + 2 * i), parts[i]);
            std::uint8_t* at = registers[Sum].rows[row] + 4 * column;
            std::memcpy(&sum, at, 4);
            sum += parts[0] + parts[1];
            std::memcpy(at, &sum, 4);
        }
}
template <int Sum, int A, int B>
void dot_bytes() {
    for (int row = 0; row < rows_of(Sum); row++)
        for (int column = 0; column < 16; column++) {
            std::int32_t sum;
            std::uint8_t* at = registers[Sum].rows[row] + 4 * column;
            std::memcpy(&sum, at, 4);
            for (int k = 0; k < rows_of(B); k++)
                for (int i = 0; i < 4; i++)
                    sum += static_cast<std::int8_t>(registers[A].rows[row][4 * k + i]) *
                           registers[B].rows[k][4 * column + i];
            std::memcpy(at, &sum, 4);
        }
}

#endif

}  // namespace unspool::tiles

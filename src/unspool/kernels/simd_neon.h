// Vectors of four numbers, for 64-bit ARM (Advanced SIMD, and its dot product where the level has it). See simd.h.

#pragma once

#include "parallel.h"

#include <arm_neon.h>

#include <algorithm>

namespace unspool::UNSPOOL_LEVEL {

constexpr i64 kWidth = 4;
constexpr i64 kFloatSums = 24, kByteSums = 16, kNibbleSums = 16;

using Vec = float32x4_t;
using Ints = uint32x4_t;

UNSPOOL_TARGET inline Ints lanes(i64 there) {
    const std::uint32_t up[4] = {0, 1, 2, 3};
    return vcltq_u32(vld1q_u32(up), vdupq_n_u32(static_cast<std::uint32_t>(there)));
}

UNSPOOL_TARGET inline Vec set(float x) { return vdupq_n_f32(x); }
UNSPOOL_TARGET inline Ints set_ints(std::uint32_t x) { return vdupq_n_u32(x); }
UNSPOOL_TARGET inline Ints load_ints(const void* from) { return vreinterpretq_u32_u8(vld1q_u8(static_cast<const std::uint8_t*>(from))); }
UNSPOOL_TARGET inline Ints load_ints(const void* from, i64 there) {
    if (there >= kWidth) return load_ints(from);
    std::uint8_t some[16] = {};
    std::copy_n(static_cast<const std::uint8_t*>(from), 4 * there, some);
    return load_ints(some);
}
UNSPOOL_TARGET inline void store_ints(void* to, Ints x) { vst1q_u8(static_cast<std::uint8_t*>(to), vreinterpretq_u8_u32(x)); }
UNSPOOL_TARGET inline void store_ints(void* to, Ints x, i64 there) {
    if (there >= kWidth) return store_ints(to, x);
    std::uint8_t some[16];
    store_ints(some, x);
    std::copy_n(some, 4 * there, static_cast<std::uint8_t*>(to));
}
UNSPOOL_TARGET inline Vec load(const float* from) { return vld1q_f32(from); }
UNSPOOL_TARGET inline Vec load(const float* from, i64 there) { return vreinterpretq_f32_u32(load_ints(from, there)); }
UNSPOOL_TARGET inline void store(float* to, Vec x) { vst1q_f32(to, x); }
UNSPOOL_TARGET inline void store(float* to, Vec x, i64 there) { store_ints(to, vreinterpretq_u32_f32(x), there); }

UNSPOOL_TARGET inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
UNSPOOL_TARGET inline Vec fma_minus(Vec a, Vec b, Vec c) { return vfmsq_f32(c, a, b); }
UNSPOOL_TARGET inline Vec max(Vec a, Vec b) { return vmaxq_f32(a, b); }
UNSPOOL_TARGET inline Vec min(Vec a, Vec b) { return vminq_f32(a, b); }
UNSPOOL_TARGET inline Vec absolute(Vec x) { return vabsq_f32(x); }
UNSPOOL_TARGET inline Vec nearest(Vec x) { return vrndnq_f32(x); }
// In two steps, since the power may be past the range of floats where the result is not.
UNSPOOL_TARGET inline Vec times_power(Vec x, Vec n) {
    const int32x4_t all = vcvtnq_s32_f32(n), half = vshrq_n_s32(all, 1), bias = vdupq_n_s32(127);
    const int32x4_t rest = vsubq_s32(all, half);
    const Vec first = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23));
    const Vec second = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, bias), 23));
    return vmulq_f32(vmulq_f32(x, first), second);
}
UNSPOOL_TARGET inline float sum(Vec x) { return vaddvq_f32(x); }
UNSPOOL_TARGET inline float greatest(Vec x) { return vmaxvq_f32(x); }

UNSPOOL_TARGET inline Ints where_nan(Vec x, Ints then, Ints otherwise) { return vbslq_u32(vceqq_f32(x, x), otherwise, then); }
UNSPOOL_TARGET inline bool any_nan(Vec x) { return vminvq_u32(vceqq_f32(x, x)) == 0; }
UNSPOOL_TARGET inline bool any_not_below(Vec a, Vec b) { return vminvq_u32(vcltq_f32(a, b)) == 0; }
UNSPOOL_TARGET inline Vec where_less(Vec a, Vec b, Vec then, Vec otherwise) { return vbslq_f32(vcltq_f32(a, b), then, otherwise); }
UNSPOOL_TARGET inline Vec within(i64 low, i64 high, Vec x, Vec otherwise) {
    return vbslq_f32(vbicq_u32(lanes(high), lanes(low)), x, otherwise);
}

UNSPOOL_TARGET inline Ints load_bf16(const std::uint16_t* from, i64 there) {
    std::uint16_t some[4] = {};
    if (there < kWidth) from = (std::copy(from, from + there, some), some);
    return vshll_n_u16(vld1_u16(from), 16);
}
UNSPOOL_TARGET inline void store_upper(std::uint16_t* to, Ints x, i64 there) {
    const uint16x4_t halves = vshrn_n_u32(x, 16);
    if (there >= kWidth) return vst1_u16(to, halves);
    std::uint16_t some[4];
    vst1_u16(some, halves);
    std::copy(some, some + there, to);
}
UNSPOOL_TARGET inline Vec load_fp16(const std::uint16_t* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
}

UNSPOOL_TARGET inline Vec from_integers(Ints x) { return vcvtq_f32_s32(vreinterpretq_s32_u32(x)); }
UNSPOOL_TARGET inline Ints to_integers(Vec x) { return vreinterpretq_u32_s32(vcvtnq_s32_f32(x)); }
UNSPOOL_TARGET inline std::int32_t sum_integers(Ints x) { return vaddvq_s32(vreinterpretq_s32_u32(x)); }
UNSPOOL_TARGET inline void store_bytes(std::uint8_t* to, Ints x) {
    const int16x4_t halves = vqmovn_s32(vreinterpretq_s32_u32(x));
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(halves, halves));
    vst1_lane_u32(reinterpret_cast<std::uint32_t*>(to), vreinterpret_u32_s8(bytes), 0);
}

UNSPOOL_TARGET inline void transpose(Ints (&x)[kWidth]) {
    const uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(x[0], x[1])), b = vreinterpretq_u64_u32(vtrn2q_u32(x[0], x[1]));
    const uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(x[2], x[3])), d = vreinterpretq_u64_u32(vtrn2q_u32(x[2], x[3]));
    x[0] = vreinterpretq_u32_u64(vtrn1q_u64(a, c));
    x[1] = vreinterpretq_u32_u64(vtrn1q_u64(b, d));
    x[2] = vreinterpretq_u32_u64(vtrn2q_u64(a, c));
    x[3] = vreinterpretq_u32_u64(vtrn2q_u64(b, d));
}

// ---- Weights in bytes and in nibbles ------------------------------------------------------------------------------

constexpr std::int32_t kTooMuch = 0;

struct Bytes {
    int8x16_t bytes;
};
UNSPOOL_TARGET inline Bytes bytes_of(Ints line) {
    return {vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_u32(line), vdupq_n_u8(128)))};
}
UNSPOOL_TARGET inline Ints dot(Ints sum, Bytes weights, Ints four) {
    const int8x16_t x = vreinterpretq_s8_u32(four);
#if defined(UNSPOOL_DOTPROD)
    return vreinterpretq_u32_s32(vdotq_s32(vreinterpretq_s32_u32(sum), weights.bytes, x));
#else
    // two products of -128 to 127 and -127 to 127 fit 16 bits
    const int16x8_t low = vmull_s8(vget_low_s8(weights.bytes), vget_low_s8(x)), high = vmull_high_s8(weights.bytes, x);
    return vreinterpretq_u32_s32(vpadalq_s16(vreinterpretq_s32_u32(sum), vpaddq_s16(low, high)));
#endif
}

// The lower and upper bytes of a table's sixteen numbers.
struct Table {
    uint8x16_t lower, upper;
};
UNSPOOL_TARGET inline Table table_of(const std::uint16_t* numbers) {
    const uint8x16_t a = vreinterpretq_u8_u16(vld1q_u16(numbers)), b = vreinterpretq_u8_u16(vld1q_u16(numbers + 8));
    return {vuzp1q_u8(a, b), vuzp2q_u8(a, b)};
}
UNSPOOL_TARGET inline void pairs_of(Ints line, const Table& table, Ints (&pairs)[4]) {
    const uint8x16_t codes = vreinterpretq_u8_u32(line), some[2] = {vandq_u8(codes, vdupq_n_u8(15)), vshrq_n_u8(codes, 4)};
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const uint8x16_t lower = vqtbl1q_u8(table.lower, some[i]), upper = vqtbl1q_u8(table.upper, some[i]);
        pairs[i] = vreinterpretq_u32_u8(vtrn1q_u8(lower, upper));
        pairs[2 + i] = vreinterpretq_u32_u8(vtrn2q_u8(lower, upper));
    }
}

}  // namespace unspool::UNSPOOL_LEVEL

// The kernels' C interface, by the level in use. `bytes` of a number: 2 (bf16) or 4 (fp32).

#include "levels.h"

using namespace unspool;

extern "C" {

// Root mean square norm of `x` [rows, width] to `out`, which may be `x`. Where `branch` [rows, width] is not null, it
// becomes branch + x and its norm is taken.
void unspool_rms_norm(int bytes, const void* x, void* branch, const void* weight, i64 rows, i64 width, float eps,
                      void* out, int threads) {
    chosen->rms_norm(bytes, x, branch, weight, rows, width, eps, out, threads);
}

// Root mean square norm in place of parts of tokens that are `stride` numbers apart: of each, the first `parts` times
// `width` numbers, by one weight [width].
void unspool_norm_parts(int bytes, void* x, i64 tokens, i64 stride, i64 parts, i64 width, const void* weight, float eps,
                        int threads) {
    chosen->norm_parts(bytes, x, tokens, stride, parts, width, weight, eps, threads);
}

// The place of the greatest number of each row of `x` [rows, width], the first of equal ones, or -1 where a row holds NaN
// or nothing above -infinity. `shares` [rows], where not null, gets exp(greatest) by the sum over the row.
void unspool_greatest(int bytes, const void* x, i64 rows, i64 width, i64* places, float* shares, int threads) {
    chosen->greatest(bytes, x, rows, width, places, shares, threads);
}

// silu(gate) * up of `x` [rows, 2 * width] = [gate, up], to `out` [rows, width].
void unspool_silu_gate(int bytes, const void* x, i64 rows, i64 width, void* out, int threads) {
    chosen->silu_gate(bytes, x, rows, width, out, threads);
}

// Rotary turn in place of the first `width` numbers of every head: `x` [tokens, heads, dim], tokens `stride` numbers
// apart; `cos` and `sin` [tokens, width], the first half of the sines negated.
void unspool_turn(int bytes, void* x, i64 tokens, i64 stride, i64 heads, i64 dim, const void* cos, const void* sin,
                  i64 width, int threads) {
    chosen->turn(bytes, x, tokens, stride, heads, dim, cos, sin, width, threads);
}

// Stores the new tokens of every row and answers their queries. `plan` is [rows, block size, window or 0, then per row:
// length, feed, first, table]. Keys and values are [slots, kv_heads, dim]; q, k and v are [tokens, their heads, dim],
// tokens `*_stride` numbers apart; `out` is [tokens, heads * dim]. Returns 0, or 1 where memory ran out.
int unspool_attend(const i64* plan, const i64* tables, int bytes, int heads, int kv_heads, int dim, const void* q,
                   i64 q_stride, const void* k, i64 k_stride, const void* v, i64 v_stride, void* keys, void* values,
                   void* out, float scale, float softcap, int threads) {
    return chosen->attend(plan, tables, bytes, heads, kv_heads, dim, q, q_stride, k, k_stride, v, v_stride, keys, values,
                          out, scale, softcap, threads);
}

// Quantises `rows` [count, inputs], fp32 if `wide`, else bf16: codes [count, inputs], scales [count, groups]. `bounds` and
// `order` are null unless `kind` is 2.
void unspool_encode(const void* rows, int wide, i64 count, i64 inputs, i64 group, int kind, const float* bounds,
                    const u8* order, u8* codes, float* scales) {
    chosen->encode(rows, wide, count, inputs, group, kind, bounds, order, codes, scales);
}

// y [rows, outputs] = x [rows, inputs] times the weight, plus `bias` [outputs] where it is not null. Numbers of a row
// of x lie together and rows `stride` apart; y is contiguous.
void unspool_linear_bf16(const PackedWeight* weight, const bf16* x, i64 stride, const bf16* bias, bf16* y, i64 rows,
                         int threads) {
    chosen->linear(weight, x, stride, bias, y, rows, threads);
}

// The same with a quantised weight. x is fp32 if `wide_x` (which needs a weight of bytes), else bf16; y and bias are fp32
// if `wide_y`, else bf16.
void unspool_quantised(const QuantisedWeight* weight, const void* x, i64 stride, const void* bias, void* y, i64 rows,
                       int wide_x, int wide_y, int threads) {
    chosen->quantised(weight, x, stride, bias, y, rows, wide_x, wide_y, threads);
}

// Draws a token for each row of `probs` [.., vocab] (not negative) by noise of torch's CPU generator, whose state, as
// `Generator.get_state` gives it, goes on by `rows` times `vocab` numbers: row i of them is for row places[i] of `probs`, or
// for none if that is below 0, or for row i if `places` is null. A token is the place of the first largest p / e, and -1
// where that ratio is 0, infinite or NaN. Returns 0, or 1 where the state is none that a generator could be in.
int unspool_draw(void* generator, const float* probs, i64 vocab, const i64* places, i64 rows, i64* tokens, float* ratios) {
    return chosen->draw(generator, probs, vocab, places, rows, tokens, ratios);
}

// The same with a new generator for each row of `probs` [rows, vocab], with the lower half of its seed.
void unspool_draw_seeded(const float* probs, i64 rows, i64 vocab, const std::uint32_t* seeds, i64* tokens, float* ratios,
                         int threads) {
    chosen->draw_seeded(probs, rows, vocab, seeds, tokens, ratios, threads);
}

// `scores` [rows, width] to `out` with `filler` for those that are below the `count`-th greatest of their row. Returns 1, and nothing is to be read, where there may be a NaN.
int unspool_keep_best(const float* scores, i64 rows, i64 width, i64 count, float filler, float* out, int threads) {
    return chosen->keep_best(scores, rows, width, count, filler, out, threads);
}

// The `count` greatest of each row, the greatest first and of equals the first: `values` and their `places` [rows, count].
// Returns 1, and nothing is to be read, where there may be a NaN.
int unspool_best(const float* scores, i64 rows, i64 width, i64 count, float* values, i64* places, int threads) {
    return chosen->best(scores, rows, width, count, values, places, threads);
}

}  // extern "C"

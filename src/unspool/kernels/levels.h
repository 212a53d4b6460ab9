// What a level, one set of a processor's instructions, has to offer.

#pragma once

#include "layout.h"

namespace unspool {

// The kernels of a level; entries.cpp says what each does.
struct Kernels {
    void (*rms_norm)(int bytes, const void* x, void* branch, const void* weight, i64 rows, i64 width, float eps,
                     void* out, int threads);
    void (*norm_parts)(int bytes, void* x, i64 tokens, i64 stride, i64 parts, i64 width, const void* weight, float eps,
                       int threads);
    void (*add)(int bytes, const void* x, void* branch, float factor, i64 rows, i64 width, int threads);
    void (*greatest)(int bytes, const void* x, i64 rows, i64 width, i64* places, float* shares, int threads);
    void (*silu_gate)(int bytes, const void* x, i64 rows, i64 width, void* out, int threads);
    void (*turn)(int bytes, void* x, i64 tokens, i64 stride, i64 heads, i64 dim, const void* cos, const void* sin,
                 i64 width, int threads);
    int (*attend)(const i64* plan, const i64* tables, int bytes, int heads, int kv_heads, int dim, const void* q,
                  i64 q_stride, const void* k, i64 k_stride, const void* v, i64 v_stride, void* keys, void* values,
                  void* out, float scale, float softcap, int threads);
    void (*encode)(const void* rows, int wide, i64 count, i64 inputs, i64 group, int kind, const float* bounds,
                   const u8* order, u8* codes, float* scales);
    void (*linear)(const PackedWeight* weight, const bf16* x, i64 stride, const bf16* bias, bf16* y, i64 rows,
                   int threads);
    void (*quantised)(const QuantisedWeight* weight, const void* x, i64 stride, const void* bias, void* y, i64 rows,
                      int wide_x, int wide_y, int threads);
    int (*draw)(void* generator, const float* probs, i64 vocab, const i64* places, i64 rows, i64* tokens, float* ratios);
    void (*draw_seeded)(const float* probs, i64 rows, i64 vocab, const std::uint32_t* seeds, i64* tokens, float* ratios,
                        int threads);
    int (*keep_best)(const float* scores, i64 rows, i64 width, i64 count, float filler, float* out, int threads);
    int (*best)(const float* scores, i64 rows, i64 width, i64 count, float* values, i64* places, int threads);
};

namespace avx2 { extern const Kernels kernels; }
namespace avx2_vnni { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }
namespace amx {
extern const Kernels kernels;
bool right();  // whether the tiles give a product that is known
}
namespace neon { extern const Kernels kernels; }
namespace dotprod { extern const Kernels kernels; }

// The level in use; chosen once, before any kernel runs.
extern const Kernels* chosen;

// The weight of the product after the one that this thread is about to call, or null: its beginning may be fetched from
// memory meanwhile.
extern thread_local const QuantisedWeight* coming;

// Products by AVX-512 VNNI and BF16 (linear.cpp, quantised.cpp).
void linear_avx512_bf16(const PackedWeight* weight, const bf16* x, i64 stride, const bf16* bias, bf16* y, i64 rows,
                        int threads);
void quantised_avx512_bf16(const QuantisedWeight* weight, const void* x, i64 stride, const void* bias, void* y, i64 rows,
                           int wide_x, int wide_y, int threads);

}  // namespace unspool

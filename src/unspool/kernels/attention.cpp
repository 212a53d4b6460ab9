// Attention over paged pools of keys and values, bf16 or fp32, for rows with one query each, computed in fp32.
//
// First every row's new key and value is written to its slot. Then a row's past is cut into chunks of 256 tokens by
// position, a chunk is answered for each head by itself, and a row's chunks are put together in their order. Nothing of
// this depends on the other rows or on the number of threads, so a row's results are the same bits alone and in company.
// A chunk's keys, then its values, are read once, in their order, for all heads.

#include "simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <omp.h>

namespace unspool {
namespace {

constexpr i64 kChunk = 256;        // tokens
constexpr int kMostHeads = 4;      // query heads worked on at once
constexpr int kMostParts = 4;      // sixteens of a value vector worked on at once
constexpr i64 kMostSpan = 32;      // query heads of one thread's work
constexpr i64 kAhead = 1;          // groups of sixteen tokens to fetch ahead of use
constexpr i64 kSerial = 64 << 10;  // up to so many bytes read, starting threads costs more than it saves

// One row, as Python lays it out.
struct Row {
    i64 length;  // its tokens with the new one
    i64 run;     // slot of its first token where its blocks are consecutive, else -1
    i64 table;   // else the place of its block numbers in `Step::tables`
};

struct Step {
    const Row* rows;
    const i64* tables;
    i64 count, block, window;
    i64 heads, kv_heads, dim;
    const void *q, *k, *v;
    i64 q_stride, k_stride, v_stride;  // from row to row
    void *keys, *values, *out;
    float scale, softcap;  // softcap 0: none

    i64 fold() const { return heads / kv_heads; }
    i64 stride() const { return kv_heads * dim; }
    i64 slot(const Row& row, i64 position) const {
        if (row.run >= 0) return row.run + position;
        return tables[row.table + position / block] * block + position % block;
    }
    // The oldest position that a row's new token sees.
    i64 oldest(const Row& row) const { return window ? std::max<i64>(0, row.length - window) : 0; }
};

// Tokens [from, to) of a row. They are worked on in groups of sixteen by position, each within one block.
struct Chunk {
    const Row* row;
    i64 from, to;
    float* parts;  // [heads][padded dim + 2]: mixed values, greatest score, sum of weights; null where it is the only one

    i64 begin() const { return from / kLanes * kLanes; }
    i64 groups() const { return (to - begin() + kLanes - 1) / kLanes; }
    i64 position(i64 group) const { return begin() + group * kLanes; }
    // Which tokens of a group are the chunk's: those of [first, last).
    i64 first(i64 group) const { return std::max<i64>(from - position(group), 0); }
    i64 last(i64 group) const { return std::min<i64>(to - position(group), kLanes); }
};

struct Sum {
    float greatest, sum;  // score of a head's tokens; their weights relative to it
};

// Query heads [first, first + count) of a chunk, whole groups that share a key/value head, and a thread's memory for
// them.
struct Span {
    i64 first, count;
    float* queries;  // [count][padded dim]
    float* weights;  // [count][kChunk], first the scores of the tokens
    float* mixed;    // [count][padded dim], sums of values by weight
    Sum* sums;       // [count]
};

// A head vector is worked on as fp32 numbers in parts of lines (see simd.h), zeros at its end.
template <class T> constexpr i64 line() { return T::kParts * kLanes; }
template <class T> constexpr i64 lines(i64 dim) { return (dim + line<T>() - 1) / line<T>(); }
template <class T> constexpr i64 padded(i64 dim) { return lines<T>(dim) * line<T>(); }
template <class T> constexpr __mmask16 words(i64 dim, i64 number) {
    return static_cast<__mmask16>((1u << std::min<i64>((dim - number * line<T>()) / T::kParts, kLanes)) - 1);
}

// Calls `name<T, heads>(...)`, with at most kMostHeads heads.
#define UNSPOOL_BY_HEADS(heads, name, ...)                        \
    switch (heads) {                                              \
        case 1: name<T, 1>(__VA_ARGS__); break;                   \
        case 2: name<T, 2>(__VA_ARGS__); break;                   \
        case 3: name<T, 3>(__VA_ARGS__); break;                   \
        default: name<T, kMostHeads>(__VA_ARGS__);                \
    }

// ---- Scores -----------------------------------------------------------------------------------------------------

// Sums of the lanes of each of four vectors, in fours: every 128 bits of the result hold a part of all four sums.
UNSPOOL_AVX512 inline __m512 fold_four(const __m512 (&x)[4]) {
    const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}

// And of four such results: sixteen sums.
UNSPOOL_AVX512 inline __m512 fold_sixteen(const __m512 (&x)[4]) {
    const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x88), _mm512_shuffle_f32x4(x[0], x[1], 0xdd));
    const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(x[2], x[3], 0x88), _mm512_shuffle_f32x4(x[2], x[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

// cap * tanh(x / cap): by the exponential and, near 0, where that loses digits, by the Taylor series.
UNSPOOL_AVX512 inline __m512 capped(__m512 x, float cap) {
    const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(1.0f / cap)), one = _mm512_set1_ps(1.0f);
    const __m512 grown = _mm512_add_ps(exponential(_mm512_add_ps(y, y)), one);
    const __m512 far = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), grown));
    const __m512 square = _mm512_mul_ps(y, y);
    __m512 near = _mm512_set1_ps(62.0f / 2835);
    near = _mm512_fmadd_ps(near, square, _mm512_set1_ps(-17.0f / 315));
    near = _mm512_fmadd_ps(near, square, _mm512_set1_ps(2.0f / 15));
    near = _mm512_fmadd_ps(near, square, _mm512_set1_ps(-1.0f / 3));
    near = _mm512_mul_ps(_mm512_fmadd_ps(near, square, one), y);
    const __mmask16 small = _mm512_cmp_ps_mask(square, _mm512_set1_ps(0.0625f), _CMP_LT_OQ);
    return _mm512_mul_ps(_mm512_set1_ps(cap), _mm512_mask_mov_ps(far, small, near));
}

// A query times the scale, in parts of lines.
template <class T>
UNSPOOL_AVX512 void split_query(const Step& step, const typename T::Number* from, float* to) {
    for (i64 i = 0; i < lines<T>(step.dim); i++) {
        __m512 parts[T::kParts];
        T::load_line(from + i * line<T>(), words<T>(step.dim, i), parts);
        for (int part = 0; part < T::kParts; part++, to += kLanes)
            _mm512_store_ps(to, _mm512_mul_ps(parts[part], _mm512_set1_ps(step.scale)));
    }
}

// Scores of one group for some heads of a span that share its `keys`; -infinity for tokens that are not the chunk's.
template <class T, int Heads>
UNSPOOL_AVX512 void score(const Step& step, const Span& span, i64 head, const typename T::Number* keys, i64 group,
                          __mmask16 there, const typename T::Number* ahead) {
    const i64 count = lines<T>(step.dim);
    const float* q = span.queries + head * padded<T>(step.dim);
    __m512 folded[Heads][4];
#pragma GCC unroll 4
    for (int four = 0; four < 4; four++) {
        __m512 sums[Heads][4] = {};
        for (i64 i = 0; i < count; i++) {
            __m512 key[4][T::kParts];
#pragma GCC unroll 4
            for (int token = 0; token < 4; token++)
                T::load_line(keys + (4 * four + token) * step.stride() + i * line<T>(), words<T>(step.dim, i), key[token]);
#pragma GCC unroll 4
            for (int token = 0; token < 4; token++)
                __builtin_prefetch(ahead + (4 * four + token) * step.stride() + i * line<T>());
#pragma GCC unroll 4
            for (int h = 0; h < Heads; h++)
#pragma GCC unroll 2
                for (int part = 0; part < T::kParts; part++) {
                    const __m512 query = _mm512_load_ps(q + (h * count + i) * line<T>() + part * kLanes);
#pragma GCC unroll 4
                    for (int token = 0; token < 4; token++)
                        sums[h][token] = _mm512_fmadd_ps(query, key[token][part], sums[h][token]);
                }
        }
#pragma GCC unroll 4
        for (int h = 0; h < Heads; h++) folded[h][four] = fold_four(sums[h]);
    }
#pragma GCC unroll 4
    for (int h = 0; h < Heads; h++) {
        __m512 x = fold_sixteen(folded[h]);
        if (step.softcap > 0) x = capped(x, step.softcap);
        const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        _mm512_store_ps(span.weights + (head + h) * kChunk + group * kLanes, _mm512_mask_mov_ps(nothing, there, x));
    }
}

// ---- Values by weight -------------------------------------------------------------------------------------------

// From the scores of some groups to weights relative to the greatest score.
UNSPOOL_AVX512 Sum weigh(float* weights, i64 groups) {
    __m512 most = _mm512_load_ps(weights);
    for (i64 i = 1; i < groups; i++) most = _mm512_max_ps(most, _mm512_load_ps(weights + i * kLanes));
    const float greatest = _mm512_reduce_max_ps(most);
    __m512 sum = _mm512_setzero_ps();
    for (i64 i = 0; i < groups; i++, weights += kLanes) {
        const __m512 weight = exponential(_mm512_sub_ps(_mm512_load_ps(weights), _mm512_set1_ps(greatest)));
        _mm512_store_ps(weights, weight);
        sum = _mm512_add_ps(sum, weight);
    }
    return {greatest, _mm512_reduce_add_ps(sum)};
}

// Adds `count` tokens' values by weight to the sums of some heads that share them, for some lines of the head vectors.
template <class T, int Heads, int Lines>
UNSPOOL_AVX512 inline void mix_lines(const Step& step, const typename T::Number* values, const float* weights, i64 count,
                                     i64 first, float* mixed, const typename T::Number* ahead) {
    constexpr int kParts = Lines * T::kParts;
    const i64 size = padded<T>(step.dim);
    mixed += first * line<T>();
    values += first * line<T>();
    ahead += first * line<T>();
    __m512 sums[Heads][kParts];
#pragma GCC unroll 4
    for (int h = 0; h < Heads; h++)
#pragma GCC unroll 4
        for (int i = 0; i < kParts; i++) sums[h][i] = _mm512_load_ps(mixed + h * size + i * kLanes);
    for (i64 token = 0; token < count; token++, values += step.stride(), ahead += step.stride()) {
#pragma GCC unroll 4
        for (int i = 0; i < Lines; i++) __builtin_prefetch(ahead + i * line<T>());
        __m512 value[Lines][T::kParts];
#pragma GCC unroll 4
        for (int i = 0; i < Lines; i++) T::load_line(values + i * line<T>(), words<T>(step.dim, first + i), value[i]);
#pragma GCC unroll 4
        for (int h = 0; h < Heads; h++) {
            const __m512 weight = _mm512_set1_ps(weights[h * kChunk + token]);
#pragma GCC unroll 4
            for (int i = 0; i < kParts; i++)
                sums[h][i] = _mm512_fmadd_ps(weight, value[i / T::kParts][i % T::kParts], sums[h][i]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < Heads; h++)
#pragma GCC unroll 4
        for (int i = 0; i < kParts; i++) _mm512_store_ps(mixed + h * size + i * kLanes, sums[h][i]);
}

// The same for whole vectors of one group. What is not the chunk's may be anything, NaN too: it is not touched.
template <class T, int Heads>
UNSPOOL_AVX512 void mix(const Step& step, const Chunk& chunk, const Span& span, i64 head, const typename T::Number* values,
                        i64 group, const typename T::Number* ahead) {
    constexpr int kLines = kMostParts / T::kParts;
    const i64 first = chunk.first(group), count = chunk.last(group) - first;
    const float* weights = span.weights + head * kChunk + group * kLanes + first;
    float* mixed = span.mixed + head * padded<T>(step.dim);
    values += first * step.stride();
    i64 i = 0;
    for (; i + kLines <= lines<T>(step.dim); i += kLines)
        mix_lines<T, Heads, kLines>(step, values, weights, count, i, mixed, ahead);
    for (; i < lines<T>(step.dim); i++) mix_lines<T, Heads, 1>(step, values, weights, count, i, mixed, ahead);
}

// The answer of a head to its row's query: its mixed values by the sum of their weights.
template <class T>
UNSPOOL_AVX512 void answer(const Step& step, const Row& row, i64 head, const float* mixed, float sum) {
    auto* out = static_cast<typename T::Number*>(step.out) + ((&row - step.rows) * step.heads + head) * step.dim;
    for (i64 i = 0; i < lines<T>(step.dim); i++) {
        __m512 parts[T::kParts];
        for (int part = 0; part < T::kParts; part++, mixed += kLanes)
            parts[part] = _mm512_mul_ps(_mm512_loadu_ps(mixed), _mm512_set1_ps(1.0f / sum));
        T::store_line(out + i * line<T>(), words<T>(step.dim, i), parts);
    }
}

// ---- One chunk --------------------------------------------------------------------------------------------------

// What to fetch while a group is worked on: the group `ahead` of the keys or, past their end, of the values.
template <class T>
const typename T::Number* fetched(const Step& step, const Chunk& chunk, const typename T::Number* keys,
                                  const typename T::Number* values, i64 ahead) {
    const i64 groups = chunk.groups();
    ahead = std::min(ahead, 2 * groups - 1);
    return (ahead < groups ? keys : values) + step.slot(*chunk.row, chunk.position(ahead % groups)) * step.stride();
}

template <class T>
void answer_chunk(const Step& step, const Chunk& chunk, const Span& span) {
    using Number = typename T::Number;
    const i64 size = padded<T>(step.dim), fold = step.fold(), groups = chunk.groups();
    const auto* queries = static_cast<const Number*>(step.q) + (chunk.row - step.rows) * step.q_stride + span.first * step.dim;
    const auto* keys = static_cast<const Number*>(step.keys) + span.first / fold * step.dim;
    const auto* values = static_cast<const Number*>(step.values) + span.first / fold * step.dim;

    for (i64 head = 0; head < span.count; head++)
        split_query<T>(step, queries + head * step.dim, span.queries + head * size);
    for (i64 group = 0; group < groups; group++) {
        const auto there = static_cast<__mmask16>((1u << chunk.last(group)) - (1u << chunk.first(group)));
        const auto* ahead = fetched<T>(step, chunk, keys, values, group + kAhead);
        const auto* key = keys + step.slot(*chunk.row, chunk.position(group)) * step.stride();
        for (i64 head = 0, at = 0; head < span.count; head += fold, at += step.dim) {
            for (i64 i = 0; i < fold; i += kMostHeads)
                UNSPOOL_BY_HEADS(fold - i, score, step, span, head + i, key + at, group, there, ahead + at)
        }
    }

    for (i64 head = 0; head < span.count; head++) span.sums[head] = weigh(span.weights + head * kChunk, groups);

    std::fill(span.mixed, span.mixed + span.count * size, 0.0f);
    for (i64 group = 0; group < groups; group++) {
        const auto* ahead = fetched<T>(step, chunk, keys, values, groups + group + kAhead);
        const auto* value = values + step.slot(*chunk.row, chunk.position(group)) * step.stride();
        for (i64 head = 0, at = 0; head < span.count; head += fold, at += step.dim) {
            for (i64 i = 0; i < fold; i += kMostHeads)
                UNSPOOL_BY_HEADS(fold - i, mix, step, chunk, span, head + i, value + at, group, ahead + at)
        }
    }

    for (i64 head = 0; head < span.count; head++) {
        const float* mixed = span.mixed + head * size;
        if (!chunk.parts) {
            answer<T>(step, *chunk.row, span.first + head, mixed, span.sums[head].sum);
            continue;
        }
        float* part = chunk.parts + (span.first + head) * (size + 2);
        std::copy(mixed, mixed + size, part);
        part[size] = span.sums[head].greatest;
        part[size + 1] = span.sums[head].sum;
    }
}

// The chunks of one row, in their order, for one head. The first one's part becomes the whole.
template <class T>
UNSPOOL_AVX512 void combine(const Step& step, const Chunk* chunks, i64 count, i64 head) {
    const i64 size = padded<T>(step.dim), place = head * (size + 2);
    float* whole = chunks[0].parts + place;
    float greatest = whole[size];
    for (i64 i = 1; i < count; i++) greatest = std::max(greatest, chunks[i].parts[place + size]);
    float sum = 0;
    for (i64 i = 0; i < count; i++) {
        const float* part = chunks[i].parts + place;
        const float weight = std::exp(part[size] - greatest);
        sum += weight * part[size + 1];
        for (i64 j = 0; j < size; j += kLanes) {
            const __m512 before = i ? _mm512_loadu_ps(whole + j) : _mm512_setzero_ps();
            _mm512_storeu_ps(whole + j, _mm512_fmadd_ps(_mm512_set1_ps(weight), _mm512_loadu_ps(part + j), before));
        }
    }
    answer<T>(step, *chunks->row, head, whole, sum);
}

// ---- All of a step ----------------------------------------------------------------------------------------------

template <class T>
void write(const Step& step, i64 number) {
    using Number = typename T::Number;
    const Row& row = step.rows[number];
    const i64 place = step.slot(row, row.length - 1) * step.stride();
    const auto bytes = static_cast<std::size_t>(step.stride()) * sizeof(Number);
    std::memcpy(static_cast<Number*>(step.keys) + place, static_cast<const Number*>(step.k) + number * step.k_stride, bytes);
    std::memcpy(static_cast<Number*>(step.values) + place, static_cast<const Number*>(step.v) + number * step.v_stride,
                bytes);
}

// The work of a step and memory for it, which stays with the calling thread for its next call.
struct Work {
    std::vector<Chunk> chunks;
    std::vector<Chunk*> several;  // of each row with several chunks, the first
    std::vector<float> parts, spans;
    i64 tokens;                   // read
};

template <class T>
void cut(const Step& step, Work& work) {
    work.chunks.clear();
    work.tokens = 0;
    for (const Row* row = step.rows; row < step.rows + step.count; row++) {
        for (i64 from = step.oldest(*row), to; from < row->length; from = to) {
            to = std::min(row->length, (from / kChunk + 1) * kChunk);
            work.chunks.push_back({row, from, to, nullptr});
            work.tokens += to - from;
        }
    }
    const i64 size = step.heads * (padded<T>(step.dim) + 2);
    work.several.clear();
    work.parts.resize(work.chunks.size() * static_cast<std::size_t>(size));
    for (std::size_t i = 0, first = 0; i < work.chunks.size(); i++) {
        if (work.chunks[i].row != work.chunks[first].row) first = i;
        const bool more = i + 1 < work.chunks.size() && work.chunks[i + 1].row == work.chunks[i].row;
        if (i == first && !more) continue;
        if (i == first) work.several.push_back(&work.chunks[i]);
        work.chunks[i].parts = work.parts.data() + static_cast<i64>(i) * size;
    }
}

template <class T>
void run(const Step& step, Work& work, int threads) {
    cut<T>(step, work);
    const i64 chunks = std::ssize(work.chunks), several = std::ssize(work.several);
    if (2 * work.tokens * step.stride() * static_cast<i64>(sizeof(typename T::Number)) <= kSerial) threads = 1;

    // A chunk's heads stay together, for reading in order, unless there are few chunks for the threads.
    const i64 fold = step.fold(), size = padded<T>(step.dim);
    const i64 together = std::max<i64>(1, std::min(chunks * step.kv_heads / (4 * threads), kMostSpan / fold));
    const i64 span = fold * std::min(together, step.kv_heads), spans = (step.heads + span - 1) / span;
    const i64 memory = span * (2 * size + kChunk + kLanes);
    work.spans.resize(static_cast<std::size_t>(memory * threads + kLanes));
    float* aligned = work.spans.data();
    while (reinterpret_cast<std::uintptr_t>(aligned) % 64) aligned++;

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (i64 i = 0; i < step.count; i++) write<T>(step, i);
        float* own = aligned + omp_get_thread_num() * memory;
#pragma omp for schedule(dynamic)
        for (i64 i = 0; i < chunks * spans; i++) {
            const i64 first = i % spans * span;
            float *weights = own + span * size, *mixed = weights + span * kChunk;
            auto* sums = reinterpret_cast<Sum*>(mixed + span * size);
            answer_chunk<T>(step, work.chunks[static_cast<std::size_t>(i / spans)],
                            {first, std::min(span, step.heads - first), own, weights, mixed, sums});
        }
#pragma omp for schedule(static)
        for (i64 i = 0; i < several * step.heads; i++) {
            const Chunk *first = work.several[static_cast<std::size_t>(i / step.heads)], *end = first;
            while (end < work.chunks.data() + chunks && end->row == first->row) end++;
            combine<T>(step, first, end - first, i % step.heads);
        }
    }
}

}  // namespace
}  // namespace unspool
#endif

extern "C" {

// Stores a new token of every row and answers its query. `plan` is [rows, block size, window or 0, then per row: length, run, table].
// Keys and values are [slots, kv_heads, dim]; q, k and v are [rows, their heads, dim], rows `*_stride` numbers apart;
// `out` is [rows, heads * dim]. Numbers have `bytes` 2 (bf16) or 4 (fp32). Returns 0, or 1 where memory ran out.
int unspool_attend(const std::int64_t* plan, const std::int64_t* tables, int bytes, int heads, int kv_heads, int dim,
                   const void* q, std::int64_t q_stride, const void* k, std::int64_t k_stride, const void* v,
                   std::int64_t v_stride, void* keys, void* values, void* out, float scale, float softcap, int threads) {
#if defined(__x86_64__)
    using namespace unspool;
    thread_local Work work;
    const Step step{reinterpret_cast<const Row*>(plan + 3), tables, plan[0], plan[1], plan[2], heads, kv_heads, dim,
                    q, k, v, q_stride, k_stride, v_stride, keys, values, out, scale, softcap};
    try {
        bytes == 2 ? run<Bf16>(step, work, threads) : run<Fp32>(step, work, threads);
    } catch (const std::bad_alloc&) {
        return 1;
    }
#endif
    return 0;
}

}  // extern "C"

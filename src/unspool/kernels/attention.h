// Attention over paged pools of keys and values, bf16 or fp32, for rows with one query or with many, summed in fp32.
//
// First every row's new keys and values are written to their slots. Then a row's past is cut into chunks of 256 tokens
// by position, a chunk is answered for each query and head by itself, and a query's chunks are put together in their
// order. Nothing of this depends on the other rows, on how many of a row's queries come at once, or on the number of
// threads, so a token's results are the same bits alone and in company, from a whole prompt and from chunks of it.

#pragma once

#include "attention_tile.h"

#include <atomic>
#include <cmath>
#include <new>
#include <utility>
#include <vector>

namespace unspool::UNSPOOL_LEVEL::attention {
namespace {

constexpr i64 kSlice = 64;             // tokens that are packed together for many rows
constexpr i64 kFewTokens = 16;         // and gone through together for few
constexpr i64 kAhead = 32;             // tokens to fetch ahead of use
constexpr i64 kFewQueries = 16;        // of a row: its chunks may be answered by different threads
constexpr i64 kManyRows = 8 * kTall;   // about so many rows share packed keys and values
constexpr i64 kMostSpan = 32;          // rows of one thread's work, where they have different key/value heads
constexpr i64 kSerial = 16 << 10;      // up to so many products of a query and a key's numbers, threads do not pay

// One row of the step, as Python lays it out.
struct Row {
    i64 length;  // its tokens with the new ones
    i64 feed;    // new ones
    i64 first;   // place of the first of them among the step's tokens
    i64 table;   // place of its block numbers in `Step::tables`
};

struct Step {
    const Row* rows;
    const i64* tables;
    i64 count, block, window;
    i64 heads, kv_heads, dim;
    const void *q, *k, *v;
    i64 q_stride, k_stride, v_stride;  // from token to token
    void *keys, *values, *out;
    Scale scale;

    i64 fold() const { return heads / kv_heads; }
    i64 stride() const { return kv_heads * dim; }
    i64 slot(const Row& row, i64 position) const {
        return tables[row.table + position / block] * block + position % block;
    }
    // The oldest position that the token at a position sees.
    i64 oldest(i64 position) const { return window ? std::max<i64>(0, position + 1 - window) : 0; }
};

// Queries [first, first + count) of a row and the tokens [from, to), some of which each of them sees. It is all that
// they see, or part of one chunk; then the results are parts.
struct Task {
    const Row* row;
    i64 first, count;
    i64 from, to;
    float* parts;  // [count][heads][padded dim + 2]: mixed values, greatest score, sum of weights; null where it is all

    i64 position(i64 query) const { return row->length - row->feed + first + query; }
    i64 slice() const { return row->feed <= kFewQueries ? kFewTokens : kSlice; }
};

// A task for the query heads of some key/value heads.
struct Item {
    i64 task, first, count;
};

// Groups of as many tokens as a vector has numbers, by position.
struct Groups {
    i64 from, to;
};

// A thread's memory: per row queries, weights, the sums of a chunk and of all chunks so far; packed keys or values.
struct Scratch {
    float *queries, *weights, *mixed, *whole, *packed;
    Sum *sums, *total;

    template <class F>
    static i64 size(const Step& step, i64 rows) {
        const i64 numbers = 2 * kPitch + 2 * padded<F>(step.dim);
        return rows * numbers + kSlice * padded<F>(step.dim) + (4 * rows + kWidth - 1) / kWidth * kWidth;
    }
    template <class F>
    static Scratch at(float* memory, const Step& step, i64 rows) {
        Scratch s{};
        const auto take = [&memory](i64 size) { return std::exchange(memory, memory + size); };
        s.queries = take(rows * kPitch);
        s.weights = take(rows * kPitch);
        s.mixed = take(rows * padded<F>(step.dim));
        s.whole = take(rows * padded<F>(step.dim));
        s.packed = take(kSlice * padded<F>(step.dim));
        s.sums = reinterpret_cast<Sum*>(take(2 * rows));
        s.total = reinterpret_cast<Sum*>(take(2 * rows));
        return s;
    }
};

// ---- One task -----------------------------------------------------------------------------------------------------

// The rows of a key/value head, row i its query i / fold and head i % fold, in tiles as even as can be.
struct Tiles {
    i64 rows, count;
    explicit Tiles(i64 rows) : rows(rows), count((rows + kTall - 1) / kTall) {}
    i64 begin(i64 tile) const { return rows * tile / count; }
    i64 height(i64 tile) const { return begin(tile + 1) - begin(tile); }
};

// A stretch of tokens in one chunk.
struct Span {
    i64 from, to;
    i64 chunk() const { return from / kChunk * kChunk; }
    Groups groups() const { return {from / kWidth, (to + kWidth - 1) / kWidth}; }
    Span within(i64 low, i64 high) const { return {std::max(from, low), std::min(to, high)}; }
    bool empty() const { return from >= to; }
};

// What a query, and what any of a tile, sees of a span.
Span seen(const Step& step, const Task& task, i64 query, Span span) {
    const i64 position = task.position(query);
    return span.within(step.oldest(position), position + 1);
}

Span seen(const Step& step, const Task& task, const Tiles& tiles, i64 tile, Span span) {
    const i64 first = tiles.begin(tile) / step.fold(), last = (tiles.begin(tile + 1) - 1) / step.fold();
    return span.within(step.oldest(task.position(first)), task.position(last) + 1);
}

// Makes the scores of what lies outside `seen` -infinity, in the groups of a row.
UNSPOOL_TARGET void hide(float* row, Groups groups, Span seen) {
    for (i64 group = groups.from; group < groups.to; group++) {
        const i64 low = std::max<i64>(seen.from - group * kWidth, 0);
        const i64 high = std::min<i64>(seen.to - group * kWidth, kWidth);
        if (low == 0 && high == kWidth) continue;
        float* scores = row + (group * kWidth - seen.chunk());
        const Vec nothing = set(-std::numeric_limits<float>::infinity());
        store(scores, within(low, std::max(low, high), load(scores), nothing));
    }
}

// What to fetch while the group at a position is packed: from further on of the same or, past its end, of what is next.
template <class Number>
const Number* fetched(const Step& step, const Task& task, i64 position, Span span, const Number* pool, const Number* next) {
    const i64 ahead = position + kAhead, past = ahead - span.groups().to * kWidth;
    if (past < 0) return pool + step.slot(*task.row, ahead) * step.stride();
    return next + step.slot(*task.row, std::min(span.from / kWidth * kWidth + past, position)) * step.stride();
}

// Calls `work(slice, head)` for the slices of a span and, in each, the item's key/value heads.
template <class Work>
void each_slice(const Task& task, const Item& item, Span span, const Work& work) {
    for (i64 at = span.from / task.slice() * task.slice(); at < span.to; at += task.slice())
        for (i64 head = 0; head < item.count; head++) work(span.within(at, at + task.slice()), head);
}

// One tile of rows.
template <class F>
void score_few(const Step& step, const Task& task, const Item& item, Span span, const Scratch& s) {
    using Number = typename F::Number;
    const i64 rows = task.count * step.fold();
    each_slice(task, item, span, [&](Span slice, i64 head) {
        const auto* keys = static_cast<const Number*>(step.keys) + (item.first + head) * step.dim;
        const auto* values = static_cast<const Number*>(step.values) + (item.first + head) * step.dim;
        const Groups groups = slice.groups();
        by_rows(rows, [&](auto constant) {
            for (i64 group = groups.from; group < groups.to; group++)
                score_group<F, decltype(constant)::value>(
                    s.queries + head * rows * kPitch, keys + step.slot(*task.row, group * kWidth) * step.stride(),
                    step.stride(), step.dim, fetched(step, task, group * kWidth, span, keys, values), step.scale,
                    s.weights + head * rows * kPitch + group * kWidth - span.chunk());
        });
    });
}

template <class F>
void mix_few(const Step& step, const Task& task, const Item& item, Span span, const Scratch& s) {
    using Number = typename F::Number;
    const i64 rows = task.count * step.fold(), width = padded<F>(step.dim);
    each_slice(task, item, span, [&](Span slice, i64 head) {
        const auto* values = static_cast<const Number*>(step.values) + (item.first + head) * step.dim;
        const Groups groups = slice.groups();
        const float* weights = s.weights + head * rows * kPitch + (groups.from * kWidth - span.chunk()) / F::kTokens;
        float* mixed = s.mixed + head * rows * width;
        by_rows(rows, [&](auto constant) {
            constexpr int kRows = decltype(constant)::value, kMost = 2 * kRows * F::kParts <= kFloatSums ? 2 : 1;
            const auto pass = [&](auto count, i64 i) {
                const auto where = [&](i64 group) {
                    const Number* from = values + i * line<F>();
                    return std::pair(from + step.slot(*task.row, group * kWidth) * step.stride(),
                                     fetched(step, task, group * kWidth, span, from, from));
                };
                mix_groups<F, kRows, decltype(count)::value>(weights, groups.from, groups.to, task.from, task.to, where,
                                                             step.stride(), words<F>(step.dim, i), width,
                                                             mixed + i * line<F>());
            };
            i64 i = 0;
            for (; kMost == 2 && (i + 2) * line<F>() <= step.dim; i += 2) pass(std::integral_constant<int, kMost>{}, i);
            for (; i < lines<F>(step.dim); i++) pass(std::integral_constant<int, 1>{}, i);
        });
    });
}

template <class F>
void score_chunk(const Step& step, const Task& task, const Item& item, Span span, const Scratch& s) {
    using Number = typename F::Number;
    const Tiles tiles(task.count * step.fold());
    if (tiles.count == 1) return score_few<F>(step, task, item, span, s);
    const i64 size = key_words<F>(step.dim) * kWidth;
    each_slice(task, item, span, [&](Span slice, i64 head) {
        const auto* keys = static_cast<const Number*>(step.keys) + (item.first + head) * step.dim;
        const auto* values = static_cast<const Number*>(step.values) + (item.first + head) * step.dim;
        const Groups groups = slice.groups();
        for (i64 group = groups.from; group < groups.to; group++)
            pack_keys<F>(keys + step.slot(*task.row, group * kWidth) * step.stride(), step.stride(), step.dim,
                         fetched(step, task, group * kWidth, span, keys, values),
                         s.packed + (group - groups.from) * size);
        for (i64 tile = 0; tile < tiles.count; tile++) {
            const Span part = seen(step, task, tiles, tile, slice);
            if (part.empty()) continue;
            const i64 row = head * tiles.rows + tiles.begin(tile);
            const Groups some = part.groups();
            score_tile<F>(tiles.height(tile), s.queries + row * kPitch, s.packed + (some.from - groups.from) * size,
                          some.to - some.from, step.dim, step.scale,
                          s.weights + row * kPitch + some.from * kWidth - span.chunk());
        }
    });
}

template <class F>
void weigh_chunk(const Step& step, const Task& task, const Item& item, Span span, const Scratch& s) {
    const Tiles tiles(task.count * step.fold());
    for (i64 tile = 0; tile < item.count * tiles.count; tile++) {
        const Groups groups = seen(step, task, tiles, tile % tiles.count, span).groups();
        const i64 chunk = span.chunk() / kWidth;
        for (i64 i = tiles.begin(tile % tiles.count); i < tiles.begin(tile % tiles.count + 1); i++) {
            const Span part = seen(step, task, i / step.fold(), span);
            if (part.empty()) continue;
            const i64 row = tile / tiles.count * tiles.rows + i;
            hide(s.weights + row * kPitch, groups, part);
            s.sums[row] = weigh<F>(s.weights + row * kPitch, groups.from - chunk, groups.to - chunk);
        }
    }
}

template <class F>
void mix_chunk(const Step& step, const Task& task, const Item& item, Span span, const Scratch& s) {
    using Number = typename F::Number;
    const Tiles tiles(task.count * step.fold());
    const i64 width = padded<F>(step.dim), size = kWidth / F::kTokens * width;
    std::fill(s.mixed, s.mixed + item.count * tiles.rows * width, 0.0f);
    if (tiles.count == 1) return mix_few<F>(step, task, item, span, s);
    each_slice(task, item, span, [&](Span slice, i64 head) {
        const auto* values = static_cast<const Number*>(step.values) + (item.first + head) * step.dim;
        const Groups groups = slice.groups();
        for (i64 group = groups.from; group < groups.to; group++)
            pack_values<F>(values + step.slot(*task.row, group * kWidth) * step.stride(), step.stride(), step.dim,
                           task.from - group * kWidth, task.to - group * kWidth,
                           fetched(step, task, group * kWidth, span, values, values),
                           s.packed + (group - groups.from) * size);
        for (i64 tile = 0; tile < tiles.count; tile++) {
            const Span part = seen(step, task, tiles, tile, slice);
            if (part.empty()) continue;
            const i64 row = head * tiles.rows + tiles.begin(tile);
            const Groups some = part.groups();
            mix_tile<F>(tiles.height(tile),
                        s.weights + row * kPitch + (some.from * kWidth - span.chunk()) / F::kTokens,
                        s.packed + (some.from - groups.from) * size, some.to - some.from, step.dim,
                        s.mixed + row * width);
        }
    });
}

// Adds a chunk's part to the whole of those before it.
UNSPOOL_TARGET void join(Sum& total, float* whole, Sum part, const float* mixed, i64 width) {
    const float greatest = std::max(total.greatest, part.greatest);
    const Vec before = power_of_two(set(total.greatest - greatest));
    const Vec now = power_of_two(set(part.greatest - greatest));
    total = {greatest, total.sum * before[0] + part.sum * now[0]};
    for (i64 i = 0; i < width; i += kWidth) {
        const Vec old = load(whole + i) * before;
        store(whole + i, fma(load(mixed + i), now, old));
    }
}

constexpr Sum kNothing{-std::numeric_limits<float>::infinity(), 0.0f};

// The answer of a head to a query: its mixed values by the sum of their weights.
template <class F>
UNSPOOL_TARGET void answer(const Step& step, const Row& row, i64 query, i64 head, const float* whole, float sum) {
    auto* out = static_cast<typename F::Number*>(step.out) + ((row.first + query) * step.heads + head) * step.dim;
    for (i64 i = 0; i < lines<F>(step.dim); i++) {
        Vec parts[F::kParts];
        for (int part = 0; part < F::kParts; part++, whole += kWidth)
            parts[part] = load(whole) * set(1.0f / sum);
        F::store_line(out + i * line<F>(), words<F>(step.dim, i), parts);
    }
}

// Calls `work(row, query, head)` for the item's rows in a thread's memory.
template <class Work>
void each_row(const Step& step, const Task& task, const Item& item, const Work& work) {
    const i64 fold = step.fold(), rows = task.count * fold;
    for (i64 i = 0; i < item.count * rows; i++) work(i, i % rows / fold, (item.first + i / rows) * fold + i % fold);
}

template <class F>
void run_item(const Step& step, const Task& task, const Item& item, const Scratch& s) {
    const i64 width = padded<F>(step.dim);
    each_row(step, task, item, [&](i64 row, i64 query, i64 head) {
        const auto* q = static_cast<const typename F::Number*>(step.q);
        const i64 token = task.row->first + task.first + query;
        F::pack_query(q + token * step.q_stride + head * step.dim, step.dim, s.queries + row * kPitch);
        s.total[row] = kNothing;
        std::fill(s.whole + row * width, s.whole + (row + 1) * width, 0.0f);
    });
    for (Span span{task.from, 0}; span.from < task.to; span.from = span.to) {
        span.to = std::min(task.to, span.chunk() + kChunk);
        score_chunk<F>(step, task, item, span, s);
        weigh_chunk<F>(step, task, item, span, s);
        mix_chunk<F>(step, task, item, span, s);
        each_row(step, task, item, [&](i64 row, i64 query, i64 head) {
            if (seen(step, task, query, span).empty()) return;
            const float* mixed = s.mixed + row * width;
            if (!task.parts) return join(s.total[row], s.whole + row * width, s.sums[row], mixed, width);
            float* part = task.parts + (query * step.heads + head) * (width + 2);
            std::copy(mixed, mixed + width, part);
            part[width] = s.sums[row].greatest;
            part[width + 1] = s.sums[row].sum;
        });
    }
    if (task.parts) return;
    each_row(step, task, item, [&](i64 row, i64 query, i64 head) {
        answer<F>(step, *task.row, task.first + query, head, s.whole + row * width, s.total[row].sum);
    });
}

// ---- All of a step ------------------------------------------------------------------------------------------------

// Some new tokens of a row, or the tasks that answer it in parts.
struct Piece {
    const Row* row;
    i64 first, count;
};

// The work of a step and memory for it, which stays with the calling thread for its next call.
struct Work {
    std::vector<Piece> writes, several;
    std::vector<Task> tasks;
    std::vector<Item> items;
    std::vector<float> parts, scratch;
    i64 cost, rows;  // products of a query's and a key's numbers; most rows of an item
};

template <class Number>
void write(const Step& step, const Piece& piece) {
    const auto bytes = static_cast<std::size_t>(step.stride()) * sizeof(Number);
    for (i64 i = piece.first; i < piece.first + piece.count; i++) {
        const i64 token = piece.row->first + i;
        const i64 place = step.slot(*piece.row, piece.row->length - piece.row->feed + i) * step.stride();
        std::memcpy(static_cast<Number*>(step.keys) + place, static_cast<const Number*>(step.k) + token * step.k_stride, bytes);
        std::memcpy(static_cast<Number*>(step.values) + place, static_cast<const Number*>(step.v) + token * step.v_stride,
                    bytes);
    }
}

// Cuts a row with few queries into tasks of one chunk each, other rows into tasks of `most` queries.
void cut(const Step& step, const Row& row, i64 most, Work& work) {
    for (i64 i = 0; i < row.feed; i += kSlice) work.writes.push_back({&row, i, std::min(kSlice, row.feed - i)});
    const i64 before = row.length - row.feed, began = std::ssize(work.tasks);
    if (row.feed <= kFewQueries) {
        for (i64 from = step.oldest(before), to; from < row.length; from = to) {
            to = std::min(row.length, (from / kChunk + 1) * kChunk);
            work.tasks.push_back({&row, 0, row.feed, from, to, nullptr});
        }
        const i64 count = std::ssize(work.tasks) - began;
        if (count > 1) work.several.push_back({&row, began, count});
        return;
    }
    const i64 count = (row.feed + most - 1) / most;
    for (i64 i = 0; i < count; i++) {
        const i64 first = row.feed * i / count, end = row.feed * (i + 1) / count;
        work.tasks.push_back({&row, first, end - first, step.oldest(before + first), before + end, nullptr});
    }
}

void cut(const Step& step, i64 width, int threads, Work& work) {
    work.writes.clear();
    work.several.clear();
    work.tasks.clear();
    work.items.clear();
    const i64 fold = step.fold();
    i64 rows = 0;
    for (i64 i = 0; i < step.count; i++) rows += step.rows[i].feed * step.heads;
    const i64 most = std::clamp<i64>(rows / (4 * threads), kTall, kManyRows) / fold;
    for (i64 i = 0; i < step.count; i++) cut(step, step.rows[i], std::max<i64>(most, 1), work);

    i64 size = 0;
    for (const Piece& piece : work.several) size += piece.count * piece.row->feed * step.heads * (width + 2);
    work.parts.resize(static_cast<std::size_t>(size));
    float* parts = work.parts.data();
    for (const Piece& piece : work.several)
        for (i64 i = 0; i < piece.count; i++, parts += piece.row->feed * step.heads * (width + 2))
            work.tasks[static_cast<std::size_t>(piece.first + i)].parts = parts;

    // A task's key/value heads stay together, for reading in order, unless there are few tasks for the threads.
    const i64 tasks = std::ssize(work.tasks), heads = tasks * step.kv_heads / (4 * threads);
    work.cost = work.rows = 0;
    for (i64 i = 0; i < tasks; i++) {
        const Task& task = work.tasks[static_cast<std::size_t>(i)];
        const i64 span = std::clamp<i64>(std::min(heads, kMostSpan / (fold * task.count)), 1, step.kv_heads);
        for (i64 head = 0; head < step.kv_heads; head += span)
            work.items.push_back({i, head, std::min(span, step.kv_heads - head)});
        work.cost += task.count * (task.to - task.from) * step.heads * step.dim;
        work.rows = std::max(work.rows, span * fold * task.count);
    }
}

// Puts together the parts of a row's query for one head.
template <class F>
void combine(const Step& step, const Work& work, const Piece& piece, i64 query, i64 head, float* whole) {
    const i64 width = padded<F>(step.dim);
    std::fill(whole, whole + width, 0.0f);
    Sum total = kNothing;
    for (i64 i = 0; i < piece.count; i++) {
        const Task& task = work.tasks[static_cast<std::size_t>(piece.first + i)];
        if (seen(step, task, query, {task.from, task.to}).empty()) continue;
        const float* part = task.parts + (query * step.heads + head) * (width + 2);
        join(total, whole, {part[width], part[width + 1]}, part, width);
    }
    answer<F>(step, *piece.row, query, head, whole, total.sum);
}

template <class F>
void run(const Step& step, Work& work, int threads) {
    cut(step, padded<F>(step.dim), threads, work);
    if (work.cost <= kSerial) threads = 1;
    const i64 writes = std::ssize(work.writes), items = std::ssize(work.items), several = std::ssize(work.several);
    const i64 size = Scratch::size<F>(step, work.rows);
    work.scratch.resize(static_cast<std::size_t>(size * threads + 16));
    float* aligned = work.scratch.data();
    while (reinterpret_cast<std::uintptr_t>(aligned) % 64) aligned++;

    std::atomic<i64> next_item{items - 1}, next_row{0};
    parallel(threads, [&](int thread, int team) {
        share_out(writes, thread, team,
                  [&](i64 i) { write<typename F::Number>(step, work.writes[static_cast<std::size_t>(i)]); });
        wait_for_team();
        const Scratch own = Scratch::at<F>(aligned + thread * size, step, work.rows);
        // A row's last queries see most: they come first.
        for (i64 i = next_item--; i >= 0; i = next_item--) {
            const Item& item = work.items[static_cast<std::size_t>(i)];
            run_item<F>(step, work.tasks[static_cast<std::size_t>(item.task)], item, own);
        }
        if (several == 0) return;
        wait_for_team();
        for (i64 i = next_row++; i < several; i = next_row++) {
            const Piece& piece = work.several[static_cast<std::size_t>(i)];
            for (i64 j = 0; j < piece.row->feed * step.heads; j++)
                combine<F>(step, work, piece, j / step.heads, j % step.heads, own.whole);
        }
    });
}

}  // namespace

inline int attend(const i64* plan, const i64* tables, int bytes, int heads, int kv_heads, int dim, const void* q,
                  i64 q_stride, const void* k, i64 k_stride, const void* v, i64 v_stride, void* keys, void* values,
                  void* out, float scale, float softcap, int threads) {
    thread_local Work work;
    const Step step{reinterpret_cast<const Row*>(plan + 3), tables, plan[0], plan[1], plan[2], heads, kv_heads, dim,
                    q, k, v, q_stride, k_stride, v_stride, keys, values, out, Scale(scale, softcap)};
#if defined(UNSPOOL_PAIRED)
    using Halves = Paired;
#else
    using Halves = Single<Bf16>;
#endif
    try {
        (bytes == 4 ? run<Single<Fp32>> : run<Halves>)(step, work, threads);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace unspool::UNSPOOL_LEVEL::attention

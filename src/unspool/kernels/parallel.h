// Threads for the kernels: those of the OpenMP that torch brought, never a pool of their own.

#pragma once

#include <cstdint>

namespace unspool {

using i64 = std::int64_t;

// Calls `body(data, thread, team)` once on each of at most `threads` threads and waits for them.
void run_team(int threads, void (*body)(void* data, int thread, int team), void* data);

// Calls `work(data)` on the calling thread, which meanwhile has a team of at most `threads` at hand: what it runs by
// `run_team` starts at once, since the others wait for it and do nothing else.
void with_team(int threads, void (*work)(void* data), void* data);

// Waits for all threads of the team; each of them calls it.
void wait_for_team();

// Calls `work(thread, team)` on each thread of a team.
template <class Work>
void parallel(int threads, const Work& work) {
    if (threads <= 1) return work(0, 1);
    run_team(
        threads, [](void* data, int thread, int team) { (*static_cast<const Work*>(data))(thread, team); },
        const_cast<void*>(static_cast<const void*>(&work)));
}

// Calls `work(i)` for each i from 0 to `count`, in contiguous parts, one a thread.
template <class Work>
void share_out(i64 count, int thread, int team, const Work& work) {
    for (i64 i = count * thread / team; i < count * (thread + 1) / team; i++) work(i);
}

template <class Work>
void parallel_for(int threads, i64 count, const Work& work) {
    parallel(threads, [&](int thread, int team) { share_out(count, thread, team, work); });
}

}  // namespace unspool

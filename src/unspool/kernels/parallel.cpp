// Finds GNU's OpenMP among what the process has loaded and asks it for threads by its stable C functions. So the library
// links no OpenMP, there is one pool of threads in the process, and every compiler gives the same library.

#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>

namespace unspool {
namespace {

constexpr int kLooks = 1 << 12;  // some fifty microseconds

struct Runtime {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
    void (*barrier)();
    int (*thread)();
    int (*team)();

    bool found() const { return parallel && barrier && thread && team; }
};

template <class Function>
void look(const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

// The pool's threads do not outlive a fork, and OpenMP would wait for them in the child for ever.
std::atomic<bool> forked{false};

Runtime find() {
    Runtime runtime{};
    look("GOMP_parallel", runtime.parallel);
    look("GOMP_barrier", runtime.barrier);
    look("omp_get_thread_num", runtime.thread);
    look("omp_get_num_threads", runtime.team);
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    return runtime;
}

const Runtime runtime = find();

struct Work {
    void (*body)(void*, int, int);
    void* data;
};

// Of this thread's innermost team; of one thread where OpenMP was not asked.
thread_local bool together = false;

void run_member(void* data) {
    const Work work = *static_cast<const Work*>(data);
    const bool before = together;
    together = true;
    work.body(work.data, runtime.thread(), runtime.team());
    together = before;
}

// Waits until `seen` of what `value` holds. It is expected soon, so the thread first looks again and again; then it
// sleeps, for the other may itself wait for this one's processor.
template <class Number, class Seen>
void await(const std::atomic<Number>& value, const Seen& seen) {
    for (int i = 0; i < kLooks; i++) {
        if (seen(value.load(std::memory_order_acquire))) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
    for (Number now; !seen(now = value.load(std::memory_order_acquire));) value.wait(now, std::memory_order_acquire);
}

// Threads that stay together for many pieces of work: the first hands them out, the others wait for the next.
class Team {
public:
    Team(void (*work)(void*), void* data) : work_(work), data_(data) {}

    void member() {
        const int thread = runtime.thread();
        Team* const before = here;
        here = this;
        if (thread == 0) {
            size_ = runtime.team();
            work_(data_);
            pieces_.store(kOver, std::memory_order_release);
            pieces_.notify_all();
        } else {
            serve(thread);
        }
        here = before;
    }

    void run(Work piece) {
        piece_ = piece;
        left_.store(size_ - 1, std::memory_order_relaxed);
        pieces_.store(pieces_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
        pieces_.notify_all();
        inside = true;
        piece.body(piece.data, 0, size_);
        inside = false;
        await(left_, [](int left) { return left == 0; });
    }

    void wait() {
        const unsigned phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            phase_.notify_all();
        } else {
            await(phase_, [=](unsigned now) { return now != phase; });
        }
    }

    static thread_local Team* here;
    static thread_local bool inside;  // a piece of work, so that it is no leader

private:
    static constexpr unsigned kOver = ~0u;

    void serve(int thread) {
        for (unsigned seen = 0;;) {
            await(pieces_, [=](unsigned now) { return now != seen; });
            seen = pieces_.load(std::memory_order_acquire);
            if (seen == kOver) return;
            inside = true;
            piece_.body(piece_.data, thread, size_);
            inside = false;
            if (left_.fetch_sub(1, std::memory_order_release) == 1) left_.notify_one();
        }
    }

    void (*work_)(void*);
    void* data_;
    Work piece_{};
    int size_ = 1;
    alignas(64) std::atomic<unsigned> pieces_{0};
    alignas(64) std::atomic<int> left_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> phase_{0};
};

thread_local Team* Team::here = nullptr;
thread_local bool Team::inside = false;

}  // namespace

void run_team(int threads, void (*body)(void*, int, int), void* data) {
    if (threads > 1 && Team::here && !Team::inside) return Team::here->run({body, data});
    if (threads <= 1 || forked || !runtime.found()) {
        const bool before = together;
        together = false;
        body(data, 0, 1);
        together = before;
        return;
    }
    Work work{body, data};
    runtime.parallel(run_member, &work, static_cast<unsigned>(threads), 0);
}

void with_team(int threads, void (*work)(void*), void* data) {
    if (threads <= 1 || forked || !runtime.found()) return work(data);
    Team team(work, data);
    runtime.parallel([](void* team) { static_cast<Team*>(team)->member(); }, &team, static_cast<unsigned>(threads), 0);
}

void wait_for_team() {
    if (Team::here && Team::inside)
        Team::here->wait();
    else if (together)
        runtime.barrier();
}

}  // namespace unspool

// Whether there are threads to be had.
extern "C" int unspool_has_threads() { return unspool::runtime.found() && !unspool::forked; }

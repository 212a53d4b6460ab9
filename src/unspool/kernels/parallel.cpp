// Finds GNU's OpenMP among what the process has loaded and asks it for threads by its stable C functions. So the library
// links no OpenMP, there is one pool of threads in the process, and every compiler gives the same library.

#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>

namespace unspool {
namespace {

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

}  // namespace

void run_team(int threads, void (*body)(void*, int, int), void* data) {
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

void wait_for_team() {
    if (together) runtime.barrier();
}

}  // namespace unspool

// Whether there are threads to be had.
extern "C" int unspool_has_threads() { return unspool::runtime.found() && !unspool::forked; }

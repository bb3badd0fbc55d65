// The table of kernels, and how a list of calls is run by the threads of one parallel region.
#include <sched.h>

#include <atomic>

#include "kernel.h"

namespace qnext {

extern const Kernel LINEAR[], EXPERTS[], NORMS[], DELTA_NET[], ATTENTION[];
static const Kernel* const TABLES[] = {LINEAR, EXPERTS, NORMS, DELTA_NET, ATTENTION};

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads take tasks as they come, so one that is slowed down takes fewer, and meet between phases.
class Crew {
  std::atomic<int64_t> next{0}, arrived{0}, round{0};

 public:
  int64_t take() { return next.fetch_add(1, std::memory_order_relaxed); }
  void meet(int64_t threads) {
    int64_t mine = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      next.store(0, std::memory_order_relaxed);
      arrived.store(0, std::memory_order_relaxed);
      round.store(mine + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; round.load(std::memory_order_acquire) == mine; spins++)
      if (spins < 5000) {
        relax();
      } else {
        sched_yield();  // somebody else has the core of a thread we wait for
      }
  }
};

struct Run {
  const Call* calls;
  int64_t count;
  Crew crew;

  void work(int64_t threads) {  // what each of them does
    for (int64_t i = 0; i < count; i++) {
      const Call& call = calls[i];
      for (int64_t phase = 0;; phase++) {
        int64_t tasks = call.kernel->tasks(call, phase);
        if (tasks == DONE) break;
        for (int64_t task; (task = crew.take()) < tasks;) call.kernel->run(call, phase, task);
        crew.meet(threads);
      }
    }
  }
};

// Of the OpenMP runtime that torch has loaded; the code that `#pragma omp parallel` makes would ask
// for the compiler's own.
static void (*in_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
static int (*team_size)() = nullptr;

}  // namespace qnext

using namespace qnext;

extern "C" {

const Kernel* qnext_kernel(const char* name) {
  for (const Kernel* table : TABLES)
    for (const Kernel* kernel = table; kernel->name; kernel++)
      if (!std::strcmp(kernel->name, name)) return kernel;
  return nullptr;
}

void qnext_use(decltype(in_parallel) parallel, decltype(team_size) size) {
  in_parallel = parallel, team_size = size;
}

// Sets every tensor's memory to that of `slot[i]` and `offset[i]` bytes on, then runs the calls.
void qnext_run(const Call* calls, int64_t count, Tensor* tensors, int64_t tensor_count,
               const int64_t* slot, const int64_t* offset, char* const* memory, int64_t threads) {
  for (int64_t i = 0; i < tensor_count; i++) tensors[i].data = memory[slot[i]] + offset[i];
  Run run{calls, count, {}};
  if (threads == 1 || !in_parallel) return run.work(1);
  // there may be fewer than were asked for
  in_parallel([](void* run) { static_cast<Run*>(run)->work(team_size()); }, &run, unsigned(threads), 0);
}
}

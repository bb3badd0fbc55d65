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

// Threads take tasks as they come, so one that is slowed down takes fewer. A phase is over when its
// tasks are done, whoever did them: a thread that lost its core to somebody else is waited for only
// if it holds a task, and where it comes back late it goes on with the phase that is under way.
class Crew {
  static constexpr int SHIFT = 32;
  std::atomic<uint64_t> next{0};  // (phase, its next task)
  std::atomic<int64_t> done{0};   // tasks of this phase

 public:
  // A task of a phase; none (-1) where all are taken or the phase is over.
  int64_t take(uint64_t phase, int64_t tasks) {
    uint64_t seen = next.load(std::memory_order_acquire);
    while (seen >> SHIFT == phase && int64_t(uint32_t(seen)) < tasks)
      if (next.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel))
        return int64_t(uint32_t(seen));
    return -1;
  }
  void finish(uint64_t phase, int64_t tasks) {
    if (done.fetch_add(1, std::memory_order_acq_rel) < tasks - 1) return;
    done.store(0, std::memory_order_relaxed);
    next.store((phase + 1) << SHIFT, std::memory_order_release);
  }
  void skip(uint64_t phase) {  // one without tasks; whoever comes first does
    uint64_t empty = phase << SHIFT;
    next.compare_exchange_strong(empty, (phase + 1) << SHIFT, std::memory_order_acq_rel);
  }
  void await_end(uint64_t phase) {
    for (int64_t spins = 0; next.load(std::memory_order_acquire) >> SHIFT == phase; spins++)
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

  void work() {  // what each thread does
    uint64_t number = 0;
    for (int64_t i = 0; i < count; i++) {
      const Call& call = calls[i];
      for (int64_t phase = 0;; phase++, number++) {
        int64_t tasks = call.kernel->tasks(call, phase);
        if (tasks == DONE) break;
        if (tasks == 0) crew.skip(number);
        for (int64_t task; (task = crew.take(number, tasks)) >= 0;) {
          call.kernel->run(call, phase, task);
          crew.finish(number, tasks);
        }
        crew.await_end(number);
      }
    }
  }
};

// Of the OpenMP runtime that torch has loaded; the code that `#pragma omp parallel` makes would ask
// for the compiler's own.
static void (*in_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;

}  // namespace qnext

using namespace qnext;

extern "C" {

const Kernel* qnext_kernel(const char* name) {
  for (const Kernel* table : TABLES)
    for (const Kernel* kernel = table; kernel->name; kernel++)
      if (!std::strcmp(kernel->name, name)) return kernel;
  return nullptr;
}

void qnext_use(decltype(in_parallel) parallel) { in_parallel = parallel; }

// Sets every tensor's memory to that of `slot[i]` and `offset[i]` bytes on, then runs the calls.
void qnext_run(const Call* calls, int64_t count, Tensor* tensors, int64_t tensor_count,
               const int64_t* slot, const int64_t* offset, char* const* memory, int64_t threads) {
  for (int64_t i = 0; i < tensor_count; i++) tensors[i].data = memory[slot[i]] + offset[i];
  Run run{calls, count, {}};
  if (threads == 1 || !in_parallel) return run.work();
  in_parallel([](void* run) { static_cast<Run*>(run)->work(); }, &run, unsigned(threads), 0);
}
}

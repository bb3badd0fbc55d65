// The table of kernels, and how a list of calls is run by the threads of one parallel region.
#include <sched.h>

#include <atomic>

#include "kernel.h"

namespace qnext {

extern const Kernel LINEAR[], EXPERTS[], NORMS[], DELTA_NET[], ATTENTION[], SMALL[];
static const Kernel* const TABLES[] = {LINEAR, EXPERTS, NORMS, DELTA_NET, ATTENTION, SMALL};

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads take tasks as they come, so one that is slowed down takes fewer. A phase is over when its
// tasks are done, whoever did them: a thread that lost its core to somebody else is waited for only
// if it holds a task, and where it comes back late it goes on with the phase that is under way.
//
// Tasks are short, and a number that another core has written takes as long to read (80 to 300 ns
// measured): so each thread has a share of them that it takes from first, counted where no other
// looks until its own share is empty, and what it has done is told once a phase.
class Crew {
  static constexpr int SHIFT = 32;
  static constexpr int64_t MOST = 8;  // shares; more threads than that have them together
  struct alignas(64) Number {         // in a cache line of its own
    std::atomic<uint64_t> value{0};   // (phase, tasks)
  };
  Number taken[MOST], done;
  const int64_t shares;

  // A task of a share; none (-1) where all are taken or the phase is over.
  int64_t take(uint64_t phase, int64_t tasks, int64_t share) {
    int64_t begin = tasks * share / shares, size = tasks * (share + 1) / shares - begin;
    std::atomic<uint64_t>& number = taken[share].value;
    for (uint64_t seen = number.load(std::memory_order_acquire);;) {
      int64_t count = seen >> SHIFT == phase ? int64_t(uint32_t(seen)) : 0;  // else of one before
      if (seen >> SHIFT > phase || count >= size) return -1;
      uint64_t next = (phase << SHIFT) + uint64_t(count + 1);
      if (number.compare_exchange_weak(seen, next, std::memory_order_acq_rel)) return begin + count;
    }
  }

 public:
  explicit Crew(int64_t threads) : shares(threads < MOST ? threads : MOST) {}

  bool is_over(uint64_t phase) const { return done.value.load(std::memory_order_acquire) >> SHIFT > phase; }

  // Runs tasks of a phase until there are none, and returns when the phase is over.
  template <class Task> void run(uint64_t phase, int64_t tasks, int64_t thread, Task task) {
    uint64_t ran = 0;
    for (int64_t i = 0; i < shares; i++)
      for (int64_t t; (t = take(phase, tasks, (thread + i) % shares)) >= 0; ran++) task(t);
    if (ran || !tasks) finish(phase, ran, tasks);
    await_end(phase);
  }

  // Whoever comes first runs `chain`, which returns how many phases from this one on it ran.
  template <class Chain> void run_alone(uint64_t phase, int64_t thread, Chain chain) {
    for (int64_t i = 0; i < shares; i++)
      if (take(phase, 1, (thread + i) % shares) >= 0)
        done.value.store((phase + chain()) << SHIFT, std::memory_order_release);
    await_end(phase);
  }

 private:
  void finish(uint64_t phase, uint64_t ran, int64_t tasks) {
    uint64_t now = phase << SHIFT, over = (phase + 1) << SHIFT;
    if (!tasks) {  // whoever comes first ends it
      done.value.compare_exchange_strong(now, over, std::memory_order_acq_rel);
      return;
    }
    now = done.value.fetch_add(ran, std::memory_order_acq_rel) + ran;
    if (int64_t(uint32_t(now)) == tasks) done.value.store(over, std::memory_order_release);
  }
  void await_end(uint64_t phase) {
    for (int64_t spins = 0; !is_over(phase); spins++)
      if (spins < 5000) {
        relax();
      } else {
        sched_yield();  // somebody else has the core of a thread we wait for
      }
  }
};

struct Place {  // in a list of calls: a phase of one of them
  const Call* call;
  int64_t phase;

  int64_t tasks() const { return call->kernel->tasks(*call, phase); }
  void run(int64_t task) const { call->kernel->run(*call, phase, task); }
  bool faulty() const { return __atomic_load_n(call->fault, __ATOMIC_RELAXED); }
  void next() {
    if (++phase == call->kernel->phases) call++, phase = 0;
  }
};

struct Run {
  const Call *calls, *end;
  Crew crew;
  std::atomic<int64_t> threads{0};  // that have come

  void work() {  // what each thread does
    int64_t thread = threads.fetch_add(1, std::memory_order_relaxed);
    uint64_t number = 0;
    for (Place at{calls, 0}; at.call < end; at.next(), number++) {
      if (crew.is_over(number)) continue;
      if (at.faulty()) return;
      int64_t tasks = at.tasks();
      if (crew.is_over(number)) continue;  // what they were counted by may be gone
      if (tasks == 1) {
        crew.run_alone(number, thread, [&] { return run_chain(at); });
      } else {
        crew.run(number, tasks, thread, [&](int64_t task) { at.run(task); });
      }
    }
  }

 private:
  // Phases of one task each that follow one another, such as norms of a few tokens, are one task
  // together: that threads tell each other of a phase's end takes longer than many of them do.
  uint64_t run_chain(Place at) {
    uint64_t ran = 0;
    do {
      at.run(0), at.next(), ran++;
    } while (at.call < end && !at.faulty() && at.tasks() == 1);
    return ran;
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
  Run run{calls, calls + count, Crew(threads)};
  if (threads == 1 || !in_parallel) return run.work();
  in_parallel([](void* run) { static_cast<Run*>(run)->work(); }, &run, unsigned(threads), 0);
}
}

// Parallel loops on XLA's intra-op thread pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

namespace jengine {

// What the kernels need of a thread pool; bindings.cc wraps ffi::ThreadPool in it.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual int num_threads() const = 0;
  virtual void schedule(std::function<void()> task) = 0;
};

// Called while waiting, with the number of calls so far: first pauses, then gives the core to others.
void wait_a_moment(int round);

// Splits [0, num_units) over threads: body(unit, claim, finished) does `unit` and then what claim() gives, until it
// gives -1, and counts the units it did in `finished`. Claiming early lets it prefetch. Returns when all units are
// done.
//
// Units are claimed from one counter, so a core that others keep busy takes fewer. The caller works too and waits only
// for units that a running helper has claimed: it never waits for the pool to start one, and so cannot deadlock when it
// is itself a thread of the pool. A helper that starts late finds nothing left; it owns a share of the state.
template <class Body>
void parallel_claim(Pool& pool, int64_t num_units, int max_workers, const Body& body) {
  struct State {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  const int64_t threads = pool.num_threads();
  int64_t workers = threads < max_workers ? threads : max_workers;
  workers = workers < num_units ? workers : num_units;
  auto state = std::make_shared<State>();
  auto work = [state, num_units, &body] {  // `body` is dead once all units are done: touch it only with a unit in hand
    int64_t unit = state->next.fetch_add(1, std::memory_order_relaxed);
    if (unit >= num_units) return;
    int64_t finished = 0;
    body(unit, [&]() -> int64_t {
      const int64_t claimed = state->next.fetch_add(1, std::memory_order_relaxed);
      return claimed < num_units ? claimed : -1;
    }, finished);
    state->done.fetch_add(finished, std::memory_order_release);
  };
  for (int64_t i = 1; i < workers; ++i) pool.schedule(work);
  work();
  for (int round = 0; state->done.load(std::memory_order_acquire) < num_units; ++round) wait_a_moment(round);
}

// Calls f(i) for every i in [0, n), on up to max_workers threads.
template <class F>
void parallel_for(Pool& pool, int64_t n, int max_workers, const F& f) {
  parallel_claim(pool, n, max_workers, [&](int64_t unit, const auto& claim, int64_t& finished) {
    for (; unit >= 0; unit = claim(), ++finished) f(unit);
  });
}

}  // namespace jengine

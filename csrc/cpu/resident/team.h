// The workers of a call that goes over its samples in several phases.
#pragma once

#include <array>
#include <memory>

#include "engine.h"

namespace fastode::resident {

// Y's and z's sums, or what a phase adds up else.
using Sums = std::array<double, 5>;

// The workers of a call, which stay for all of its phases: a batch whose samples share their steps is gone over once
// for each attempt. The batch is in `parts` whose sums and gradients are added up in their order, whoever has them.
template <class Worker>
class Team {
 public:
  // `make(arena)` returns a new Worker, which is told each part that it enters; first without memory, to count it.
  template <class Make>
  Team(int64_t samples, int64_t parts, const Make& make)
      : samples_(samples), parts_(parts), count_(std::min(parts, workers_for(samples))) {
    Arena none(nullptr);
    make(none);
    char* scratch = static_cast<char*>(memory_.take(count_ * none.used()));
    for (int64_t w = 0; w < count_; ++w) arenas_.emplace_back(scratch + w * none.used());
    for (int64_t w = 0; w < count_; ++w) workers_.push_back(make(arenas_[w]));
  }

  // Calls f(worker, sample, sums) for all samples and returns the sums, added up in the parts' order. The samples are
  // gone over upwards and downwards in turn: the last ones of a phase are in the cache when the next begins.
  template <class F>
  Sums each(const F& f) {
    std::vector<Sums> found(parts_, Sums{});
    in_parallel(count_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w)
        each_of(w * parts_ / count_, (w + 1) * parts_ / count_, [&](int64_t part) {
          Worker& worker = *workers_[w];
          worker.enter(part);
          Sums sums{};
          each_of(part * samples_ / parts_, (part + 1) * samples_ / parts_, [&](int64_t n) { f(worker, n, sums); });
          found[part] = sums;
        });
    });
    down_ = !down_;
    Sums total{};
    for (const Sums& part : found)
      for (size_t i = 0; i < total.size(); ++i) total[i] += part[i];
    return total;
  }

  void check() const {
    for (const Arena& arena : arenas_) arena.check();
  }

 private:
  template <class F>
  void each_of(int64_t first, int64_t end, const F& f) const {
    for (int64_t k = 0; k < end - first; ++k) f(down_ ? end - 1 - k : first + k);
  }

  int64_t samples_, parts_, count_;
  CallMemory memory_;
  std::vector<Arena> arenas_;
  std::vector<std::unique_ptr<Worker>> workers_;
  bool down_ = false;
};

}  // namespace fastode::resident

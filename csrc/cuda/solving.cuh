// What a solve with steps by error has both ways: where the maps of a step lie, and sums over the samples that share
// their steps. Equations: README.md of fastode/ops/schemes/skew_pair, (6).
#pragma once

#include "../step_control.h"
#include "grid.cuh"
#include "skew.cuh"

namespace fastode::device {

// The maps of a sample's step, behind those that a forward keeps: the state at its start and the one at its end, which
// change places; the results of the norms at a stage's point; the slopes, of which the last one of a step is the next
// one's first. `turned`: whether the states and the first and last slopes have changed places.
template <class Tile>
struct StepMaps {
  using State = typename Tile::State;
  using Sum = typename Tile::Sum;
  static constexpr int kStates = 0, kHat = 4, kSlopes = 6;

  const cuda::Room& room;
  int stages, n, turned;

  FASTODE_DEVICE char* own(int slot) const { return SkewPair<Tile>::place(room, room.split + slot, n); }
  FASTODE_DEVICE char* start(int half) const { return own(kStates + 2 * turned + half); }
  FASTODE_DEVICE char* end(int half) const { return own(kStates + 2 - 2 * turned + half); }
  FASTODE_DEVICE char* hat(int half) const { return own(kHat + half); }
  FASTODE_DEVICE char* slope(int i, int half) const {
    const bool ends = i == 0 || i + 1 == stages;
    return own(kSlopes + 2 * (ends && turned ? stages - 1 - i : i) + half);
  }

  // A place behind all these.
  FASTODE_DEVICE char* behind(int slot) const { return own(kSlopes + 2 * stages + slot); }

  // What a step begins with, of four maps: the state, then the first slope.
  FASTODE_DEVICE char* beginning(int which) const { return which < 2 ? start(which) : slope(0, which - 2); }

  // The start of the step and the sum of row(j) times slope j, times `factor`, for the first so many j. A slope that
  // does not count is not there.
  template <class Row>
  FASTODE_DEVICE void combine(State& state, int half, int count, const Row& row, float factor) const {
    Sum sum;
    Tile::clear(sum);
    Tile::add_kept(sum, 1, start(half));
    add_slopes(sum, half, count, row, factor);
    Tile::round(state, sum);
  }

  template <class Row>
  FASTODE_DEVICE void add_slopes(Sum& sum, int half, int count, const Row& row, float factor) const {
    FASTODE_ROLLED
    for (int j = 0; j < count; ++j) {
      const float weight = row(j);
      if (weight != 0) Tile::add_kept(sum, weight * factor, slope(j, half));
    }
  }
};

inline constexpr int kParts = 64;  // of a sum over samples, and of a kind of sums

// When all blocks are there, the sums of rows of kSolveSums, in `parts` first. By a call, so that nothing of this waits
// in a register meanwhile.
FASTODE_DEVICE_CALL void add_rows(const float* rows, int samples, int kinds, double* parts, double* sums) {
  grid_barrier();
  const int own = thread();
  if (own < kParts) {
    double total = 0;
    FASTODE_ROLLED
    for (int n = own / kinds; n < samples; n += kParts / kinds) total += rows[n * cuda::kSolveSums + own % kinds];
    parts[own] = total;
  }
  block_barrier();
  if (own >= kinds) return;
  double total = 0;
  FASTODE_ROLLED
  for (int i = own; i < kParts; i += kinds) total += parts[i];
  sums[own] = total;
}

// A solve of samples that share their steps, or of one.
template <class Tile>
class Solving {
 public:
  static constexpr int threads = Tile::kThreads, C = Tile::kChannels, W = Tile::kSide;

 protected:
  using Pair = SkewPair<Tile>;
  using Halves = resident::Halves;
  static_assert(kParts * sizeof(double) <= Memory<Tile>::kSums * Tile::kDown * C * sizeof(float));
  static_assert(kParts <= threads && threads / 32 <= C);

  // `sums`: where those of all samples go, in shared memory.
  FASTODE_DEVICE Solving(const cuda::SolveCall& call, Pair& pair, int first, double* sums)
      : call_(call), pair_(pair), first_(first), sums_(sums) {}

  // Calls f(sample) for the block's samples of the solve.
  template <class F>
  FASTODE_DEVICE void each(const F& f) const {
    FASTODE_ROLLED
    for (int n = first_; n < call_.samples; n += call_.alone ? call_.samples : blocks()) f(n);
  }

  // Leaves the sum of what the threads have, of one kind, for `leave_sums`.
  FASTODE_DEVICE void leave_part(int kind, float own) const {
    const float total = Pair::sum_lanes(own);
    const int mine = anew(thread());
    if (mine % 32 == 0) pair_.memory().bias(kind)[mine / 32] = total;  // W has none
  }

  // Leaves a sample's sums of the first so many kinds.
  FASTODE_DEVICE void leave_sums(int n, int kinds, int turn) const {
    block_barrier();
    const int kind = anew(thread());
    if (kind >= kinds) return;
    float total = 0;
    FASTODE_ROLLED
    for (int i = 0; i < threads / 32; ++i) total += pair_.memory().bias(kind)[i];
    if (call_.alone)
      sums_[kind] = total;
    else
      row(n, turn)[kind] = total;
  }

  // The sums of all samples of the solve, for the thread that decides.
  FASTODE_DEVICE void take_sums(int kinds, int turn) const {
    double* const parts = reinterpret_cast<double*>(pair_.memory().partial);
    if (!call_.alone && kinds > 0) add_rows(row(0, turn), call_.samples, kinds, parts, sums_);
    block_barrier();
  }

  // How many numbers a norm of a half is over.
  FASTODE_DEVICE double entries(int half) const {
    return static_cast<double>(pair_.channels(half)) * (W * W) * (call_.alone ? 1 : call_.samples);
  }

  // Whose number the solve has among all.
  FASTODE_DEVICE int number() const { return call_.alone ? first_ : 0; }
  // Whether this block tells what the solve did.
  FASTODE_DEVICE bool tells() const { return call_.alone || block() == 0; }

  const cuda::SolveCall& call_;
  Pair& pair_;
  const int first_;
  double* const sums_;

 private:
  FASTODE_DEVICE float* row(int n, int turn) const {
    return call_.exchange + (int64_t{turn} * call_.samples + n) * cuda::kSolveSums;
  }
};

}  // namespace fastode::device

// Solutions of a skew pair with steps by error. Equations: README.md of fastode/ops/schemes/skew_pair, (6).
//
// Samples that share their steps are coupled by the norms of their errors alone. Each block takes its samples through
// all stages of an attempt and leaves their sums; then all blocks meet, once for an attempt, and each decides by itself
// what comes next: the same for all, of the same numbers in the same order. A sample with steps of its own meets
// nobody.
#pragma once

#include "../step_control.h"
#include "skew.cuh"

namespace fastode::device {

template <class Tile>
struct SolveForward {
  static constexpr int threads = Tile::kThreads, C = Tile::kChannels, W = Tile::kSide;
  using T = typename Tile::Type;
  using State = typename Tile::State;
  using Sum = typename Tile::Sum;
  using Pair = SkewPair<Tile>;

  static constexpr size_t bytes(int) { return Memory<Tile>::bytes(cuda::kPairNorms, 1); }

  static FASTODE_DEVICE void run(const cuda::SolveCall& call) {
    Pair pair(call.pair, true, false);
    FASTODE_ROLLED
    for (int first = block(); first < call.samples; first += call.alone ? blocks() : call.samples)
      SolveForward(call, pair, first).solve();
  }

 private:
  using Halves = resident::Halves;

  // What a solve does until its blocks meet again: evaluates the slopes at time 0, then after a trial step, which its
  // first size may need, then those of attempts.
  enum Phase { kBegins, kTries, kAttempts, kEnds };

  // How a solve stands; one thread writes it, between two barriers. It lies where a pull-back has its means.
  struct Stand {
    double t, h, sums[cuda::kSolveSums];
    resident::FirstStep first;
    resident::SolveEnd end;
    int64_t tried;
    int phase, turned;           // turned: whether the states and the first and last slopes have changed places
    float size;                  // of the step, as a stage sees it
    bool last;                   // whether t₁ lies in the attempt
    float weights[kMostStages];  // then those of y(t₁), times the size
  };
  static constexpr int kParts = 64;  // of a sum over samples, and of a kind of sums
  static_assert(sizeof(Stand) <= (Memory<Tile>::kMeans - 2) * C * sizeof(float));
  static_assert(kParts * sizeof(double) <= Memory<Tile>::kSums * Tile::kDown * C * sizeof(float));
  static_assert(kParts <= threads && threads / 32 <= C);

  // Places of a sample's maps: the state at the step's start and the one at its end, which change places; the results
  // of the norms at a stage's point; the slopes, of which the last one of a step is the next one's first.
  static constexpr int kStates = 0, kHat = 4, kSlopes = 6;

  // A stage of a sample.
  struct Stage {
    const SolveForward& solve;
    int n, i;

    FASTODE_DEVICE char* hat(int half) const { return solve.own(kHat + half, n); }
    FASTODE_DEVICE char* slope(int half) const { return solve.slope(i, half, n); }
    FASTODE_DEVICE Trace trace(int) const { return {nullptr, nullptr, nullptr}; }
  };

  FASTODE_DEVICE SolveForward(const cuda::SolveCall& call, Pair& pair, int first)
      : call_(call), pair_(pair), first_(first), stand_(*reinterpret_cast<Stand*>(pair.memory().means)) {}

  FASTODE_DEVICE char* own(int slot, int n) const { return Pair::place(call_.room, slot, n); }
  FASTODE_DEVICE char* start(int half, int n) const { return own(kStates + 2 * stand_.turned + half, n); }
  FASTODE_DEVICE char* end(int half, int n) const { return own(kStates + 2 - 2 * stand_.turned + half, n); }
  FASTODE_DEVICE char* slope(int i, int half, int n) const {
    const bool ends = i == 0 || i + 1 == call_.stages;
    const int at = ends && stand_.turned ? call_.stages - 1 - i : i;
    return own(kSlopes + 2 * at + half, n);
  }

  // Calls f(sample) for the block's samples of the solve.
  template <class F>
  FASTODE_DEVICE void each(const F& f) const {
    FASTODE_ROLLED
    for (int n = first_; n < call_.samples; n += call_.alone ? call_.samples : blocks()) f(n);
  }

  FASTODE_DEVICE void solve() {
    block_barrier();  // all have read the parameters, or how the block's solve before ended
    if (thread() == 0) stand_.phase = kBegins, stand_.turned = 0, stand_.tried = 0, stand_.last = false;
    block_barrier();
    each([&](int n) { begin(n); });
    int turn = 0;
    FASTODE_ROLLED
    while (stand_.phase != kEnds) {
      const int kinds = stand_.phase == kBegins ? (call_.first_step == 0 ? 4 : 0) : 2;
      each([&](int n) {
        evaluate(n);
        if (kinds > 0) leave_sums(n, kinds, turn);
        if (stand_.last) write(n);
      });
      take_sums(kinds, turn);
      turn = 1 - turn;
      if (thread() == 0) decide();
      block_barrier();
    }
    if (stand_.end != resident::kReached) each([&](int n) { write(n); });
    if (thread() == 0 && call_.log && (call_.alone || block() == 0)) tell();
  }

  FASTODE_DEVICE void begin(int n) const {
    if (!pair_.whole()) {
      pair_.bring(start(kY, n), call_.x, n, As::kStart);
      pair_.bring(start(kZ, n), call_.x, n, As::kZ);
      return;
    }
    State state;
    Tile::load(state, call_.x, n);
    for (const int half : {kY, kZ}) Tile::keep(state, start(half, n));
  }

  // The stages of the phase at hand.
  FASTODE_DEVICE void evaluate(int n) {
    const int phase = stand_.phase, from = phase == kBegins ? 0 : 1, to = phase == kAttempts ? call_.stages : from + 1;
    FASTODE_ROLLED
    for (int i = from; i < to; ++i) {
      const bool ends = phase == kAttempts && call_.ends_in_solution && i + 1 == to;
      pair_.evaluate(Stage{*this, n, i}, true, true, [&](State& state, int half) {
        combine(state, n, half, i, [&](int j) { return phase == kTries ? 1.0f : call_.table[i][j]; }, stand_.size);
        if (ends) Tile::keep(state, end(half, n));
      });
    }
    if (phase != kAttempts || call_.ends_in_solution) return;
    FASTODE_ROLLED
    for (int half = kY; half <= kZ; ++half) {
      State state;
      combine(state, n, half, to, [&](int j) { return static_cast<float>(call_.b[j]); }, stand_.size);
      Tile::keep(state, end(half, n));
    }
  }

  // The start of the step and the sum of row(j) times slope j, times `factor`, for the first so many j. A slope that
  // does not count is not there.
  template <class Row>
  FASTODE_DEVICE void combine(State& state, int n, int half, int count, const Row& row, float factor) const {
    Sum sum;
    Tile::clear(sum);
    Tile::add_kept(sum, 1, start(half, n));
    add_slopes(sum, n, half, count, row, factor);
    Tile::round(state, sum);
  }

  template <class Row>
  FASTODE_DEVICE void add_slopes(Sum& sum, int n, int half, int count, const Row& row, float factor) const {
    FASTODE_ROLLED
    for (int j = 0; j < count; ++j) {
      const float weight = row(j);
      if (weight != 0) Tile::add_kept(sum, weight * factor, slope(j, half, n));
    }
  }

  // Leaves the sums of the squares of what the phase measures in units of the tolerance: of y's, then z's. At time 0 of
  // the state and of the slopes, after a trial of the slopes' change, of an attempt of its error.
  FASTODE_DEVICE void leave_sums(int n, int kinds, int turn) {
    FASTODE_ROLLED
    for (int kind = 0; kind < kinds; ++kind) {
      const float total = Pair::sum_lanes(squares(n, kind % 2, kind / 2 == 1));
      if (lane() == 0) pair_.memory().bias(kind)[thread() / 32] = total;  // W has none
    }
    block_barrier();
    if (thread() >= kinds) return;
    float total = 0;
    FASTODE_ROLLED
    for (int i = 0; i < threads / 32; ++i) total += pair_.memory().bias(thread())[i];
    if (call_.alone)
      stand_.sums[thread()] = total;
    else
      row(n, turn)[thread()] = total;
  }

  FASTODE_DEVICE float* row(int n, int turn) const {
    return call_.exchange + (int64_t{turn} * call_.samples + n) * cuda::kSolveSums;
  }

  FASTODE_DEVICE float squares(int n, int half, bool of_slope) const {
    const int phase = stand_.phase, count = phase == kBegins ? of_slope : phase == kTries ? 2 : call_.stages;
    Sum sum;
    Tile::clear(sum);
    if (phase == kBegins && !of_slope) Tile::add_kept(sum, 1, start(half, n));
    const auto weight = [&](int j) {
      return phase == kAttempts ? static_cast<float>(call_.error[j]) : phase == kTries && j == 0 ? -1.0f : 1.0f;
    };
    add_slopes(sum, n, half, count, weight, phase == kAttempts ? stand_.size : 1.0f);
    const char* const from = start(half, n);
    const char* const to = phase == kAttempts ? end(half, n) : from;
    const float rtol = static_cast<float>(call_.rtol), atol = static_cast<float>(call_.atol);
    float total = 0;
    FASTODE_UNROLLED
    for (int tile = 0; tile < Tile::kTiles; ++tile) {
      FASTODE_UNROLLED
      for (int eight = 0; eight < 2; ++eight) {
        uint32_t u[2], v[2];
        Tile::kept_words(u, from, tile, eight);
        Tile::kept_words(v, to, tile, eight);
        FASTODE_UNROLLED
        for (int i = 0; i < 4; ++i) {
          const auto one = T::unpack(u[i / 2]), other = T::unpack(v[i / 2]);
          const float a = magnitude(i % 2 ? one.high : one.low), b = magnitude(i % 2 ? other.high : other.low);
          // As torch.max takes it: NaN stays.
          const float scaled = sum.value[tile][eight][i] / (atol + rtol * (a < b || b != b ? b : a));
          if (Tile::channel(eight) + i % 2 < pair_.channels(half)) total += scaled * scaled;
        }
      }
    }
    return total;
  }

  static FASTODE_DEVICE float magnitude(float x) { return x < 0 ? -x : x; }

  // The sums of all samples of the solve, for the thread that decides.
  FASTODE_DEVICE void take_sums(int kinds, int turn) const {
    double* const parts = reinterpret_cast<double*>(pair_.memory().partial);
    if (!call_.alone && kinds > 0) {
      grid_barrier();
      if (thread() < kParts) {
        double total = 0;
        FASTODE_ROLLED
        for (int n = thread() / kinds; n < call_.samples; n += kParts / kinds) total += row(n, turn)[thread() % kinds];
        parts[thread()] = total;
      }
      block_barrier();
      if (thread() < kinds) {
        double total = 0;
        FASTODE_ROLLED
        for (int i = thread(); i < kParts; i += kinds) total += parts[i];
        stand_.sums[thread()] = total;
      }
    }
    block_barrier();
  }

  FASTODE_DEVICE void decide() {
    const int phase = stand_.phase;
    Halves* const norms = &stand_.first.state;
    if (phase == kBegins) {
      stand_.t = 0, stand_.h = call_.first_step;
      FASTODE_UNROLLED
      for (int kind = 0; kind < 6; ++kind) norms[kind / 2].value[kind % 2] = 0;
      if (call_.first_step == 0) {
        norms[0] = root(0), norms[1] = root(2);
        stand_.size = static_cast<float>(stand_.first.trial());
        stand_.phase = kTries;
        return;
      }
    } else if (phase == kTries) {
      norms[2] = root(0);
      stand_.h = stand_.first.size(call_.order);
    } else if (judge()) {
      stand_.phase = kEnds;
      return;
    }
    aim();
  }

  FASTODE_DEVICE Halves root(int first) const {
    Halves found;
    FASTODE_UNROLLED
    for (int half = 0; half < 2; ++half) {
      const double entries = static_cast<double>(pair_.channels(half)) * (W * W) * (call_.alone ? 1 : call_.samples);
      found.value[half] = ::sqrt(stand_.sums[first + half] / entries);
    }
    return found;
  }

  // Of the attempt that was made: whether the solve ends with it, else the next one's size.
  FASTODE_DEVICE bool judge() {
    const Halves norms = root(0);
    const resident::Larger larger(norms);
    const double ratio = larger.value;
    const bool accepted = ratio <= 1;
    log_attempt({stand_.t, stand_.h, ratio, accepted ? 1.0 : 0.0, static_cast<double>(larger.half)});
    ++stand_.tried;
    stand_.end = resident::kReached;
    if (accepted) {
      if (stand_.last) return true;
      stand_.t += stand_.h, stand_.turned = 1 - stand_.turned;
      if (!resident::is_finite(norms[0]) || !resident::is_finite(norms[1])) {
        stand_.end = resident::kNotFinite;
        return true;
      }
    }
    stand_.h *= resident::NextFactor(ratio, call_.order).value;
    return false;
  }

  // What the next attempt needs.
  FASTODE_DEVICE void aim() {
    stand_.end = resident::hindrance(stand_.tried, call_.most, stand_.t, stand_.h);
    stand_.phase = stand_.end == resident::kReached ? kAttempts : kEnds;
    stand_.size = static_cast<float>(stand_.h);
    stand_.last = stand_.t + stand_.h >= call_.t1;
    if (!stand_.last) return;
    const resident::Quartic quartic((call_.t1 - stand_.t) / stand_.h);
    FASTODE_ROLLED
    for (int i = 0; i < call_.stages; ++i)
      stand_.weights[i] =
          static_cast<float>(quartic.weight(i, call_.stages, call_.b[i], call_.middle[i]) * stand_.size);
  }

  // y(t₁), if t₁ lies in the step that was made; NaN where the solve did not come so far.
  FASTODE_DEVICE void write(int n) const {
    State state;
    if (stand_.phase == kEnds)
      Tile::fill(state, 0x7fff7fffu);
    else
      combine(state, n, kY, call_.stages, [&](int j) { return stand_.weights[j]; }, 1);
    if (pair_.whole()) return Tile::store(state, call_.result, n);
    Tile::keep(state, own(kHat, n));
    pair_.take(own(kHat, n), call_.result, n, As::kY);
  }

  // ---- the log, as SolveLog::write of control.h has it

  struct Five {
    double value[resident::kLogEach];
  };

  FASTODE_DEVICE double* log() const {
    const int64_t each = resident::kLogHead + call_.logged * resident::kLogEach;
    return call_.log + (call_.alone ? first_ : 0) * each;
  }

  FASTODE_DEVICE void log_attempt(const Five& attempt) const {
    if (!call_.log || (!call_.alone && block() != 0)) return;
    const int64_t at = stand_.tried < call_.logged ? stand_.tried : call_.logged - 1;
    double* const to = log() + resident::kLogHead + at * resident::kLogEach;
    FASTODE_UNROLLED
    for (int i = 0; i < resident::kLogEach; ++i) to[i] = attempt.value[i];
  }

  FASTODE_DEVICE void tell() const {
    double* const to = log();
    to[0] = static_cast<double>(stand_.tried), to[1] = static_cast<double>(stand_.end);
    to[2] = stand_.t, to[3] = stand_.h;
    const Halves* const norms = &stand_.first.state;
    FASTODE_UNROLLED
    for (int kind = 0; kind < 6; ++kind) to[4 + kind] = norms[kind / 2].value[kind % 2];
  }

  const cuda::SolveCall& call_;
  Pair& pair_;
  const int first_;
  Stand& stand_;
};

}  // namespace fastode::device

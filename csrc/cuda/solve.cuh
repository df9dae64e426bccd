// Solutions of a skew pair with steps by error. Equations: README.md of fastode/ops/schemes/skew_pair, (6).
//
// Samples that share their steps are coupled by the norms of their errors alone. Each block takes its samples through
// all stages of an attempt and leaves their sums; then all blocks meet, once for an attempt, and each decides by itself
// what comes next: the same for all, of the same numbers in the same order. A sample with steps of its own meets
// nobody.
#pragma once

#include "solving.cuh"

namespace fastode::device {

template <class Tile>
struct SolveForward : Solving<Tile> {
  using Base = Solving<Tile>;
  using Base::threads, Base::C, Base::W;
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
  using Maps = StepMaps<Tile>;
  using Base::call_, Base::pair_, Base::first_, Base::each, Base::tells;

  // What a solve does until its blocks meet again: evaluates the slopes at time 0, then after a trial step, which its
  // first size may need, then those of attempts.
  enum Phase { kBegins, kTries, kAttempts, kEnds };

  // How a solve stands; one thread writes it, between two barriers. It lies where a pull-back has its means.
  struct Stand {
    double t, h, sums[cuda::kSolveSums];
    resident::FirstStep first;
    resident::SolveEnd end;
    int64_t tried, taken;        // attempts, and accepted steps
    int phase, turned;           // turned: whether the states and the first and last slopes have changed places
    int every, slot;             // which beginnings are kept; the slot of the one that is to be, or -1
    float size;                  // of the step, as a stage sees it
    bool last;                   // whether t₁ lies in the attempt
    bool stays;                  // whether the first attempt was accepted
    bool thins;                  // whether every second beginning gives way
    float weights[kMostStages];  // then those of y(t₁), times the size
  };
  static_assert(sizeof(Stand) <= (Memory<Tile>::kMeans - 2) * C * sizeof(float));

  // A stage of a sample.
  struct Stage {
    const Maps& maps;
    int i;

    FASTODE_DEVICE char* hat(int half) const { return maps.hat(half); }
    FASTODE_DEVICE char* slope(int half) const { return maps.slope(i, half); }
    FASTODE_DEVICE Trace trace(int) const { return {nullptr, nullptr, nullptr}; }
  };

  FASTODE_DEVICE SolveForward(const cuda::SolveCall& call, Pair& pair, int first)
      : Base(call, pair, first, reinterpret_cast<Stand*>(pair.memory().means)->sums),
        stand_(*reinterpret_cast<Stand*>(pair.memory().means)) {}

  FASTODE_DEVICE Maps maps(int n) const { return {call_.room, call_.stages, n, stand_.turned}; }

  FASTODE_DEVICE void solve() {
    block_barrier();  // all have read the parameters, or how the block's solve before ended
    if (thread() == 0) {
      stand_.phase = kBegins, stand_.turned = 0, stand_.tried = stand_.taken = 0, stand_.last = stand_.stays = false;
      stand_.every = 1, stand_.slot = -1, stand_.thins = false;
    }
    block_barrier();
    each([&](int n) { begin(n); });
    int turn = 0;
    FASTODE_ROLLED
    while (stand_.phase != kEnds) {
      const int kinds = stand_.phase == kBegins && call_.first_step == 0 ? 4 : 2;
      each([&](int n) {
        if (stand_.slot >= 0) keep(n);
        evaluate(n);
        FASTODE_ROLLED
        for (int kind = 0; kind < kinds; ++kind) this->leave_part(kind, squares(n, kind % 2, kind / 2 == 1));
        if (kinds > 0) this->leave_sums(n, kinds, turn);
        if (stand_.last) write(n);
      });
      this->take_sums(kinds, turn);
      turn = 1 - turn;
      if (thread() == 0) decide();
      block_barrier();
    }
    if (stand_.end != resident::kReached) each([&](int n) { write(n); });
    if (thread() == 0 && tells()) tell();
  }

  FASTODE_DEVICE void begin(int n) const {
    const Maps at = maps(n);
    if (!pair_.whole()) {
      pair_.bring(at.start(kY), call_.x, n, As::kStart);
      pair_.bring(at.start(kZ), call_.x, n, As::kZ);
      return;
    }
    State state;
    Tile::load(state, call_.x, n);
    for (const int half : {kY, kZ}) Tile::keep(state, at.start(half));
  }

  // The beginning of the step at hand goes to its slot, after every second one that is there has given way.
  FASTODE_DEVICE void keep(int n) const {
    FASTODE_ROLLED
    for (int to = stand_.thins ? 1 : stand_.slot; to <= stand_.slot; ++to) {
      FASTODE_ROLLED
      for (int which = 0; which < 4; ++which) {
        State state;
        Tile::recall(state, to == stand_.slot ? maps(n).beginning(which) : kept(2 * to, which, n));
        Tile::keep(state, kept(to, which, n));
      }
    }
  }

  FASTODE_DEVICE char* kept(int slot, int which, int n) const { return Pair::place(call_.room, 4 * slot + which, n); }

  // The stages of the phase at hand.
  FASTODE_DEVICE void evaluate(int n) {
    const int phase = stand_.phase, from = phase == kBegins ? 0 : 1, to = phase == kAttempts ? call_.stages : from + 1;
    const Maps at = maps(n);
    FASTODE_ROLLED
    for (int i = from; i < to; ++i) {
      const bool ends = phase == kAttempts && call_.ends_in_solution && i + 1 == to;
      pair_.evaluate(Stage{at, i}, true, true, [&](State& state, int half) {
        at.combine(state, half, i, [&](int j) { return phase == kTries ? 1.0f : call_.table[i][j]; }, stand_.size);
        if (ends) Tile::keep(state, at.end(half));
      });
    }
    if (phase != kAttempts || call_.ends_in_solution) return;
    FASTODE_ROLLED
    for (int half = kY; half <= kZ; ++half) {
      State state;
      at.combine(state, half, to, [&](int j) { return static_cast<float>(call_.b[j]); }, stand_.size);
      Tile::keep(state, at.end(half));
    }
  }

  // The squares of what the phase measures in units of the tolerance, as far as this thread has them: at time 0 of the
  // state and of the slopes, after a trial of the slopes' change, of an attempt of its error.
  FASTODE_DEVICE float squares(int n, int half, bool of_slope) const {
    const int phase = stand_.phase, count = phase == kBegins ? of_slope : phase == kTries ? 2 : call_.stages;
    const Maps at = maps(n);
    Sum sum;
    Tile::clear(sum);
    if (phase == kBegins && !of_slope) Tile::add_kept(sum, 1, at.start(half));
    const auto weight = [&](int j) {
      return phase == kAttempts ? static_cast<float>(call_.error[j]) : phase == kTries && j == 0 ? -1.0f : 1.0f;
    };
    at.add_slopes(sum, half, count, weight, phase == kAttempts ? stand_.size : 1.0f);
    const char* const from = at.start(half);
    const char* const to = phase == kAttempts ? at.end(half) : from;
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
          if (Tile::channel(eight) + i % 2 >= pair_.channels(half)) continue;
          total += scaled * scaled;
          if (phase == kBegins && !of_slope) total += a - a;  // NaN where the state is not finite
        }
      }
    }
    return total;
  }

  static FASTODE_DEVICE float magnitude(float x) { return x < 0 ? -x : x; }

  FASTODE_DEVICE void decide() {
    const int phase = stand_.phase;
    Halves* const norms = &stand_.first.state;
    stand_.slot = phase == kBegins && call_.taken ? 0 : -1;
    if (phase == kBegins) {
      stand_.t = 0, stand_.h = call_.first_step;
      FASTODE_UNROLLED
      for (int kind = 0; kind < 6; ++kind) norms[kind / 2].value[kind % 2] = 0;
      norms[0] = root(0);
      if (call_.first_step == 0) {
        norms[1] = root(2);
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
    for (int half = 0; half < 2; ++half) found.value[half] = ::sqrt(stand_.sums[first + half] / this->entries(half));
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
      stand_.stays |= stand_.tried == 1;
      take_step();
      if (stand_.last) return true;
      stand_.t += stand_.h, stand_.turned = 1 - stand_.turned;
      const bool finite = resident::is_finite(norms[0]) && resident::is_finite(norms[1]);
      const bool full = call_.taken && stand_.taken == call_.most_taken;
      stand_.end = !finite ? resident::kNotFinite : full ? resident::kNoRoom : resident::kReached;
      if (stand_.end != resident::kReached) return true;
    }
    stand_.h *= resident::NextFactor(ratio, call_.order).value;
    return false;
  }

  // Notes the step that was accepted, and whether the next one's beginning is to be kept.
  FASTODE_DEVICE void take_step() {
    if (call_.taken && tells()) call_.sizes[this->number() * call_.most_taken + stand_.taken] = stand_.size;
    ++stand_.taken;
    stand_.thins = stand_.taken == int64_t{stand_.every} * cuda::kSolveSlots;
    if (stand_.thins) stand_.every *= 2;
    if (call_.taken && stand_.taken % stand_.every == 0) stand_.slot = static_cast<int>(stand_.taken / stand_.every);
  }

  // What the next attempt needs.
  FASTODE_DEVICE void aim() {
    // The errors of steps from an infinite state may be finite; z is x there.
    const double z = stand_.first.state[kZ];
    stand_.end = z == z ? resident::hindrance(stand_.tried, call_.most, stand_.t, stand_.h) : resident::kNotFinite;
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
      maps(n).combine(state, kY, call_.stages, [&](int j) { return stand_.weights[j]; }, 1);
    if (pair_.whole()) return Tile::store(state, call_.result, n);
    Tile::keep(state, maps(n).hat(kY));
    pair_.take(maps(n).hat(kY), call_.result, n, As::kY);
  }

  // ---- the log, as SolveLog::write of control.h has it

  struct Five {
    double value[resident::kLogEach];
  };

  FASTODE_DEVICE double* log() const {
    const int64_t each = resident::kLogHead + call_.logged * resident::kLogEach;
    return call_.log + this->number() * each;
  }

  FASTODE_DEVICE void log_attempt(const Five& attempt) const {
    if (!call_.log || !tells()) return;
    const int64_t at = stand_.tried < call_.logged ? stand_.tried : call_.logged - 1;
    double* const to = log() + resident::kLogHead + at * resident::kLogEach;
    FASTODE_UNROLLED
    for (int i = 0; i < resident::kLogEach; ++i) to[i] = attempt.value[i];
  }

  FASTODE_DEVICE void tell() const {
    if (call_.taken)
      call_.taken[this->number()] = {stand_.taken, stand_.end, stand_.stays, (call_.t1 - stand_.t) / stand_.h,
                                     stand_.first};
    if (!call_.log) return;
    double* const to = log();
    to[0] = static_cast<double>(stand_.tried), to[1] = static_cast<double>(stand_.end);
    to[2] = stand_.t, to[3] = stand_.h;
    const Halves* const norms = &stand_.first.state;
    FASTODE_UNROLLED
    for (int kind = 0; kind < 6; ++kind) to[4 + kind] = norms[kind / 2].value[kind % 2];
  }

  Stand& stand_;
};

}  // namespace fastode::device

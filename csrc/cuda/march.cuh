// Solutions of a skew pair by equal steps, forwards and backwards. Equations: README.md of
// fastode/ops/schemes/skew_pair.
#pragma once

#include "skew_pull.cuh"

namespace fastode::device {

// Where the maps of a sample lie behind those that are kept: the first state; the norms' results at a stage's point or,
// backwards, the cotangents of the activations' inputs; ẏ and ż of each stage, which backwards give way to the
// cotangents of the points; behind those, backwards, the cotangents of the state.
inline constexpr int kFirst = 0, kHat = 2, kSlopes = 4;

template <class Tile>
struct March {
  using State = typename Tile::State;
  using Sum = typename Tile::Sum;
  using Pair = SkewPair<Tile>;
  static constexpr int C = Tile::kChannels;

  // A stage of a step of a sample.
  struct Stage {
    const cuda::MarchCall& call;
    const cuda::Used& used;
    int n, step, i;

    FASTODE_DEVICE Stage(const cuda::MarchCall& call, int n, int step, int i)
        : call(call), used(call.used[step >= call.turn]), n(n), step(step), i(i) {}

    FASTODE_DEVICE bool uses(int half) const { return (half == kY ? used.y : used.z) >> i & 1; }
    FASTODE_DEVICE char* own(int slot) const { return Pair::place(call.room, call.room.split + slot, n); }
    FASTODE_DEVICE char* hat(int half) const { return own(kHat + half); }
    FASTODE_DEVICE char* slope(int half) const { return own(kSlopes + 2 * i + half); }

    // The number of a slope among those that are used, from the first step on.
    FASTODE_DEVICE int number(int half) const {
      const int late = step >= call.turn, steps = late ? call.turn : step;
      return steps * call.width[0] + (step - steps) * call.width[1] + call.before[late][i] + (half == kZ && uses(kY));
    }

    FASTODE_DEVICE char* state(int half) const {
      const bool kept = call.statistics && step > 0;
      return kept ? Pair::place(call.room, call.room.split - 2 * (call.steps - step) + half, n) : own(kFirst + half);
    }

    // What lies, or is to lie, where a backward finds it; null forwards without one.
    FASTODE_DEVICE Trace trace(int half) const {
      if (!call.statistics) return {nullptr, nullptr, nullptr};
      return {Pair::place(call.room, number(half), n), rows(kPreY + half), rows(kPostY + half)};
    }

   private:
    FASTODE_DEVICE float* rows(int which) const {
      const int64_t evaluation = step * call.stages + i;
      return call.statistics + ((evaluation * cuda::kPairNorms + which) * call.samples + n) * 2 * C;
    }
  };

  // The first state, which x is.
  static FASTODE_DEVICE void begin(const Pair& pair, const Stage& first) {
    if (!pair.whole()) {
      pair.bring(first.state(kY), first.call.x, first.n, As::kStart);
      pair.bring(first.state(kZ), first.call.x, first.n, As::kZ);
      return;
    }
    State state;
    Tile::load(state, first.call.x, first.n);
    for (const int half : {kY, kZ}) Tile::keep(state, first.state(half));
  }

  // One half of a stage's point or, at row `stages`, of the next state. A slope that is not used is not there.
  static FASTODE_DEVICE void combine(State& state, const Stage& at, int half, int row) {
    const uint32_t used = half == kY ? at.used.y : at.used.z;
    Sum sum;
    Tile::clear(sum);
    Tile::add_kept(sum, 1, at.state(half));
    FASTODE_ROLLED
    for (int j = 0; j < row; ++j) {
      const float factor = at.call.table[row][j];
      if (factor != 0 && used >> j & 1) Tile::add_kept(sum, factor, at.own(kSlopes + 2 * j + half));
    }
    Tile::round(state, sum);
  }
};

// y(t₁) from x, which is y(0) and z(0), and what a later backward reads.
template <class Tile>
struct MarchForward {
  static constexpr int threads = Tile::kThreads;
  using State = typename Tile::State;
  using Stage = typename March<Tile>::Stage;

  static constexpr size_t bytes(int) { return Memory<Tile>::bytes(cuda::kPairNorms, 1); }

  static FASTODE_DEVICE void run(const cuda::MarchCall& call) {
    SkewPair<Tile> pair(call.pair, true, false);
    block_barrier();
    FASTODE_ROLLED
    for (int n = block(); n < call.samples; n += blocks()) {
      const Stage first(call, n, 0, 0);
      March<Tile>::begin(pair, first);
      State state;
      FASTODE_ROLLED
      for (int step = 0; step < call.steps; ++step) {
        FASTODE_ROLLED
        for (int i = 0; i < call.stages; ++i) stage(pair, {call, n, step, i});
        const Stage here(call, n, step, 0), next(call, n, step + 1, 0);
        if (step + 1 == call.steps) break;
        FASTODE_ROLLED
        for (int half = kZ; half >= kY; --half) {
          March<Tile>::combine(state, here, half, call.stages);
          Tile::keep(state, next.state(half));
        }
      }
      March<Tile>::combine(state, {call, n, call.steps - 1, 0}, kY, call.stages);
      if (pair.whole()) {
        Tile::store(state, call.result, n);
      } else {
        Tile::keep(state, first.own(kHat));
        pair.take(first.own(kHat), call.result, n, As::kY);
      }
    }
  }

 private:
  static FASTODE_DEVICE void stage(SkewPair<Tile>& pair, const Stage& at) {
    pair.evaluate(at, at.uses(kY), at.uses(kZ),
                  [&](State& state, int half) { March<Tile>::combine(state, at, half, at.i); });
  }
};

// The cotangent of x from that of y(t₁), with what the forward kept.
template <class Tile>
struct MarchBackward {
  static constexpr int threads = Tile::kThreads, C = Tile::kChannels;
  using State = typename Tile::State;
  using Sum = typename Tile::Sum;
  using Stage = typename March<Tile>::Stage;
  using Pull = PairPull<Tile>;

  static constexpr size_t bytes(int) { return Memory<Tile>::bytes(cuda::kPairNorms, 1); }

  static FASTODE_DEVICE void run(const cuda::MarchBackCall& back) {
    const cuda::MarchCall& call = back.march;
    SkewPair<Tile> pair(call.pair, false, back.sums != nullptr);
    block_barrier();
    FASTODE_ROLLED
    for (int n = block(); n < call.samples; n += blocks()) {
      const Stage first(call, n, 0, 0);
      if (back.points) March<Tile>::begin(pair, first);
      Pull::begin(pair, back.cotangent, n, total(first, kY), total(first, kZ));
      FASTODE_ROLLED
      for (int step = call.steps - 1; step >= 0; --step) {
        FASTODE_ROLLED
        for (int i = 0; back.points && i + 1 < call.stages; ++i) slopes_again(pair, {call, n, step, i});
        FASTODE_ROLLED
        for (int i = call.stages - 1; i >= 0; --i) Pull::stage(pair, BackStage(back, n, step, i));
        end_step({call, n, step, 0});
      }
      Pull::end(pair, call.result, n, total(first, kY), total(first, kZ));
    }
    if (back.sums) pair.store_sums(back.sums, cuda::kPairNorms);
  }

 private:
  struct BackStage : Stage {
    const cuda::MarchBackCall& back;

    FASTODE_DEVICE BackStage(const cuda::MarchBackCall& back, int n, int step, int i)
        : Stage(back.march, n, step, i), back(back) {}

    FASTODE_DEVICE void point(State& state, int half) const { March<Tile>::combine(state, *this, half, this->i); }

    FASTODE_DEVICE void slope_bar(Sum& bar, int half) const {
      const cuda::MarchCall& call = this->call;
      const int i = this->i;
      Tile::clear(bar);
      if (call.table[call.stages][i] != 0) Tile::add_kept(bar, call.table[call.stages][i], total(*this, half));
      FASTODE_ROLLED
      for (int l = i + 1; l < call.stages; ++l)
        if (call.table[l][i] != 0 && points(*this, half) >> l & 1)
          Tile::add_kept(bar, call.table[l][i], this->own(kSlopes + 2 * l + half));
    }

    FASTODE_DEVICE bool products() const { return back.products >= 0; }

    // (4): where the input or the cotangent of the product of a slope lies.
    FASTODE_DEVICE char* factor(int half, bool cotangent) const {
      const int slopes = this->call.room.split - 2 * (this->call.steps - 1);
      const int slot = back.products + this->number(half) + (cotangent ? slopes : 0);
      return SkewPair<Tile>::place(this->call.room, slot, this->n);
    }

    // Statistics that change nothing, for who multiplies.
    FASTODE_DEVICE void note(int half) const {
      FASTODE_ROLLED
      for (int i = thread(); i < 2 * C; i += Tile::kThreads)
        back.plain[(int64_t{this->number(half)} * this->call.samples + this->n) * 4 * C + i] = i < C ? 0 : 1;
    }
  };

  // Where the cotangent of the state lies.
  static FASTODE_DEVICE char* total(const Stage& at, int half) { return at.own(kSlopes + 2 * at.call.stages + half); }

  static FASTODE_DEVICE void slopes_again(SkewPair<Tile>& pair, const Stage& at) {
    FASTODE_ROLLED
    for (int half = kY; half <= kZ; ++half) {
      if (!at.uses(half)) continue;
      State state;
      pair.slope_again(state, kPostY + half, at.trace(half));
      Tile::keep(state, at.slope(half));
    }
  }

  // Which stages' points have a cotangent in a half.
  static FASTODE_DEVICE uint32_t points(const Stage& at, int half) {
    const uint32_t own = half == kY ? at.used.y : at.used.z, through = half == kY ? at.used.z : at.used.y;
    return at.call.pair.gamma != 0 ? own | through : through;
  }

  // The cotangents of the state at the step's start.
  static FASTODE_DEVICE void end_step(const Stage& at) {
    FASTODE_ROLLED
    for (int half = kY; half <= kZ; ++half) {
      Sum sum;
      Tile::clear(sum);
      Tile::add_kept(sum, 1, total(at, half));
      FASTODE_ROLLED
      for (int i = 0; i < at.call.stages; ++i)
        if (points(at, half) >> i & 1) Tile::add_kept(sum, 1, at.own(kSlopes + 2 * i + half));
      State state;
      Tile::round(state, sum);
      Tile::keep(state, total(at, half));
    }
  }
};

}  // namespace fastode::device

// Solutions of a skew pair by equal steps, forwards and backwards. Equations: README.md of
// fastode/ops/schemes/skew_pair.
#pragma once

#include "skew.cuh"

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

  static constexpr size_t bytes(int) { return Memory<Tile>::bytes(cuda::kPairNorms, 1); }

  static FASTODE_DEVICE void run(const cuda::MarchBackCall& back) {
    const cuda::MarchCall& call = back.march;
    SkewPair<Tile> pair(call.pair, false, back.sums != nullptr);
    block_barrier();
    FASTODE_ROLLED
    for (int n = block(); n < call.samples; n += blocks()) {
      const Stage first(call, n, 0, 0);
      if (back.points) March<Tile>::begin(pair, first);
      begin(pair, back, first);
      FASTODE_ROLLED
      for (int step = call.steps - 1; step >= 0; --step) {
        FASTODE_ROLLED
        for (int i = 0; back.points && i + 1 < call.stages; ++i) slopes_again(pair, {call, n, step, i});
        FASTODE_ROLLED
        for (int i = call.stages - 1; i >= 0; --i) stage(pair, back, {call, n, step, i});
        end_step({call, n, step, 0});
      }
      end(pair, first);
    }
    if (back.sums) pair.store_sums(back.sums, cuda::kPairNorms);
  }

 private:
  // Where the cotangent of the state lies.
  static FASTODE_DEVICE char* total(const Stage& at, int half) { return at.own(kSlopes + 2 * at.call.stages + half); }

  // The cotangents of the last state.
  static FASTODE_DEVICE void begin(const SkewPair<Tile>& pair, const cuda::MarchBackCall& back, const Stage& first) {
    State state;
    Tile::clear(state);
    Tile::keep(state, total(first, kZ));
    if (!pair.whole()) return pair.bring(total(first, kY), back.cotangent, first.n, As::kY);
    Tile::load(state, back.cotangent, first.n);
    Tile::keep(state, total(first, kY));
  }

  // The cotangent of x from those of the first state.
  static FASTODE_DEVICE void end(const SkewPair<Tile>& pair, const Stage& first) {
    State state;
    if (pair.whole()) {
      Sum sum;
      Tile::clear(sum);
      for (const int half : {kY, kZ}) Tile::add_kept(sum, 1, total(first, half));
      Tile::round(state, sum);
      Tile::keep(state, total(first, kZ));
    } else {
      Tile::recall(state, total(first, kY));
      pair.put(state);
      pair.add_start(total(first, kZ));
    }
    pair.take(total(first, kZ), first.call.result, first.n, As::kZ);
  }

  static FASTODE_DEVICE void slopes_again(SkewPair<Tile>& pair, const Stage& at) {
    FASTODE_ROLLED
    for (int half = kY; half <= kZ; ++half) {
      if (!at.uses(half)) continue;
      State state;
      pair.slope_again(state, kPostY + half, at.trace(half));
      Tile::keep(state, at.slope(half));
    }
  }

  // (5) from the cotangents of a stage's slopes to those of its point.
  static FASTODE_DEVICE void stage(SkewPair<Tile>& pair, const cuda::MarchBackCall& back, const Stage& at) {
    FASTODE_ROLLED
    for (int half = kY; half <= kZ; ++half) {
      if (!at.uses(half)) continue;
      State state;
      pair.activate_again(state, at.trace(half).input);
      Sum bar;
      slope_bar(bar, at, half);
      pair.pull(kPostY + half, state, bar, at.trace(anew(half)).after);
      pair.pull_activation(bar, at.trace(anew(half)).input);
      if (half == kZ) Tile::scale(bar, -1);
      Tile::round(state, bar);
      Tile::keep(state, pulled(back, at, anew(half)));
    }
    FASTODE_ROLLED
    for (int half = kZ; half >= kY; --half) {
      const bool through = at.uses(kZ - half), damped = pair.gamma() != 0 && at.uses(half);
      if (through || damped) point_bar(pair, back, at, half, through, damped);
    }
  }

  // (3) for half of a stage's point, to the slope's place. What the norm makes of the point goes to a product, too.
  static FASTODE_DEVICE void point_bar(SkewPair<Tile>& pair, const cuda::MarchBackCall& back, const Stage& at, int half,
                                       bool through, bool damped) {
    const int which = kPreY + half;
    State point;
    if (through) {
      Tile::recall(point, pulled(back, at, kZ - half));
      pair.put(point);
    }
    const bool product = through && back.products >= 0;
    if (product || pair.reads(which)) March<Tile>::combine(point, at, half, at.i);
    Sum bar;
    if (!through)
      Tile::clear(bar);
    else if (half == kZ)
      pair.template convolve<true>(bar);
    else
      pair.template convolve<false>(bar);
    if (damped) Tile::add_kept(bar, half == kZ ? pair.gamma() : -pair.gamma(), pulled(back, at, half));
    const float* const found = at.trace(half).before;
    pair.pull(which, point, bar, found);
    if (product) {
      pair.normalise_again(which, point, found);
      Tile::keep(point, factor(back, at, kZ - half, half == kY));
      FASTODE_ROLLED
      for (int i = thread(); i < 2 * C; i += Tile::kThreads)
        back.plain[(int64_t{at.number(kZ - half)} * at.call.samples + at.n) * 4 * C + i] = i < C ? 0 : 1;
    }
    Tile::round(point, bar);
    Tile::keep(point, at.slope(half));
  }

  // Where the cotangent of the activation's input lies, for z with its sign turned.
  static FASTODE_DEVICE char* pulled(const cuda::MarchBackCall& back, const Stage& at, int half) {
    return back.products < 0 ? at.own(kHat + half) : factor(back, at, half, half == kY);
  }

  // (4): where the input or the cotangent of the product of a slope lies.
  static FASTODE_DEVICE char* factor(const cuda::MarchBackCall& back, const Stage& at, int half, bool cotangent) {
    const int slopes = at.call.room.split - 2 * (at.call.steps - 1);
    return SkewPair<Tile>::place(at.call.room, back.products + at.number(half) + (cotangent ? slopes : 0), at.n);
  }

  // Which stages' points have a cotangent in a half.
  static FASTODE_DEVICE uint32_t points(const Stage& at, int half) {
    const uint32_t own = half == kY ? at.used.y : at.used.z, through = half == kY ? at.used.z : at.used.y;
    return at.call.pair.gamma != 0 ? own | through : through;
  }

  // The cotangent of a slope.
  static FASTODE_DEVICE void slope_bar(Sum& bar, const Stage& at, int half) {
    const cuda::MarchCall& call = at.call;
    Tile::clear(bar);
    if (call.table[call.stages][at.i] != 0) Tile::add_kept(bar, call.table[call.stages][at.i], total(at, half));
    FASTODE_ROLLED
    for (int l = at.i + 1; l < call.stages; ++l)
      if (call.table[l][at.i] != 0 && points(at, half) >> l & 1)
        Tile::add_kept(bar, call.table[l][at.i], at.own(kSlopes + 2 * l + half));
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

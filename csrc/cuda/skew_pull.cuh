// The pull-back of a skew pair's evaluation in a block, and what goes in and out at the two ends of a solution's.
// Equations: README.md of fastode/ops/schemes/skew_pair.
#pragma once

#include "skew.cuh"

namespace fastode::device {

// (2) and (3), from the cotangents of a stage's slopes to those of its point, in the slopes' places. `at` says which
// slopes are used and where what they left lies, and makes the slopes' cotangents and, again, the point. For (4) it has
// places for the factors of two products: those of a slope are the input of its convolution and h̄.
template <class Tile>
struct PairPull {
  using State = typename Tile::State;
  using Sum = typename Tile::Sum;

  template <class At>
  static FASTODE_DEVICE void stage(SkewPair<Tile>& pair, const At& at) {
    FASTODE_ROLLED
    for (int half = kY; half <= kZ; ++half) {
      if (!at.uses(half)) continue;
      State state;
      pair.activate_again(state, at.trace(half).input);
      Sum bar;
      at.slope_bar(bar, half);
      pair.pull(kPostY + half, state, bar, at.trace(anew(half)).after);
      pair.pull_activation(bar, at.trace(anew(half)).input);
      if (half == kZ) Tile::scale(bar, -1);
      Tile::round(state, bar);
      Tile::keep(state, pulled(at, anew(half)));
    }
    FASTODE_ROLLED
    for (int half = kZ; half >= kY; --half) {
      const bool through = at.uses(kZ - half), damped = pair.gamma() != 0 && at.uses(half);
      if (through || damped) point_bar(pair, at, half, through, damped);
    }
  }

  // The cotangents of the last state, from that of the result.
  static FASTODE_DEVICE void begin(const SkewPair<Tile>& pair, const cuda::Map& cotangent, int64_t n, char* y,
                                   char* z) {
    State state;
    Tile::clear(state);
    Tile::keep(state, z);
    if (!pair.whole()) return pair.bring(y, cotangent, n, As::kY);
    Tile::load(state, cotangent, n);
    Tile::keep(state, y);
  }

  // That of x, from those of the first state.
  static FASTODE_DEVICE void end(const SkewPair<Tile>& pair, const cuda::Map& result, int64_t n, char* y, char* z) {
    State state;
    if (pair.whole()) {
      Sum sum;
      Tile::clear(sum);
      Tile::add_kept(sum, 1, y);
      Tile::add_kept(sum, 1, z);
      Tile::round(state, sum);
      Tile::keep(state, z);
    } else {
      Tile::recall(state, y);
      pair.put(state);
      pair.add_start(z);
    }
    pair.take(z, result, n, As::kZ);
  }

 private:
  // What the norm makes of the point goes to a product, too.
  template <class At>
  static FASTODE_DEVICE void point_bar(SkewPair<Tile>& pair, const At& at, int half, bool through, bool damped) {
    const int which = kPreY + half;
    State point;
    if (through) {
      Tile::recall(point, pulled(at, kZ - half));
      pair.put(point);
    }
    const bool product = through && at.products();
    if (product || pair.reads(which)) at.point(point, half);
    Sum bar;
    if (!through)
      Tile::clear(bar);
    else if (half == kZ)
      pair.template convolve<true>(bar);
    else
      pair.template convolve<false>(bar);
    if (damped) Tile::add_kept(bar, half == kZ ? pair.gamma() : -pair.gamma(), pulled(at, half));
    const float* const found = at.trace(half).before;
    pair.pull(which, point, bar, found);
    if (product) {
      pair.normalise_again(which, point, found);
      Tile::keep(point, at.factor(kZ - half, half == kY));
      at.note(kZ - half);
    }
    Tile::round(point, bar);
    Tile::keep(point, at.slope(half));
  }

  // Where the cotangent of the activation's input lies, for z with its sign turned.
  template <class At>
  static FASTODE_DEVICE char* pulled(const At& at, int half) {
    return at.products() ? at.factor(half, half == kY) : at.hat(half);
  }
};

}  // namespace fastode::device

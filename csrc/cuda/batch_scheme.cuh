// Explicit schemes of a branch with batch norms in training. Otherwise as scheme.cuh has them.
#pragma once

#include "batch.cuh"
#include "scheme.cuh"

namespace fastode::device {

// u_s, and what a later backward reads. f is evaluated at every point, used or not.
template <class Tile>
struct BatchSchemeForward {
  static constexpr int threads = Tile::kThreads;
  static constexpr bool meets = true;

  static FASTODE_DEVICE void run(const cuda::SchemeCall& call) {
    Batch<Tile> branch(call.branch, call.samples);
    branch.fix_statistics();
    branch.each([&](int n) {
      typename Tile::State point;
      Tile::load(point, call.x, n);
      Tile::keep(point, place(call, call.point[0], n));
      branch.offer(0, point, n);
    });
    FASTODE_ROLLED
    for (int k = 0; k < call.stages; ++k) {
      branch.value(k, call.room, {call.input[k]}, [&](int n, typename Tile::Sum& sum) {
        typename Tile::State point;
        combine(call, n, k, sum, point);
        if (k + 1 == call.stages) return Tile::store(point, call.result, n);
        Tile::keep(point, place(call, call.point[k + 1], n));
        branch.offer(0, point, n);
      });
    }
  }

 private:
  static FASTODE_DEVICE char* place(const cuda::SchemeCall& call, int slot, int n) {
    return Branch<Tile>::place(call.room, slot, n);
  }

  // From f(u_k) to u_{k + 1}. What counts zero times is left out: it may be infinite.
  static FASTODE_DEVICE void combine(const cuda::SchemeCall& call, int n, int k, typename Tile::Sum& sum,
                                     typename Tile::State& point) {
    if (call.image[k] >= 0) {
      Tile::round(point, sum);
      Tile::keep(point, place(call, call.image[k], n));
    }
    if (beta(call, k, k) != 0)
      Tile::scale(sum, beta(call, k, k));
    else
      Tile::clear(sum);
    FASTODE_ROLLED
    for (int j = k; j >= 0; --j) {
      const float a = alpha(call, k, j), b = beta(call, k, j);
      if (a != 0) Tile::add_kept(sum, a, place(call, call.point[j], n));
      if (j < k && b != 0) Tile::add_kept(sum, b, place(call, call.image[j], n));
    }
    Tile::round(point, sum);
  }
};

// The cotangent of x from that of u_s, with what the forward kept.
template <class Tile>
struct BatchSchemeBackward {
  static constexpr int threads = Tile::kThreads;
  static constexpr bool meets = true;

  static FASTODE_DEVICE void run(const cuda::BackwardCall& backward) {
    const cuda::SchemeCall& call = backward.scheme;
    Batch<Tile> branch(call.branch, call.samples);
    branch.each([&](int n) {
      typename Tile::State bar;
      Tile::load(bar, call.x, n);
      Tile::keep(bar, place(call, call.bar[call.stages], n));
    });
    const bool sums = backward.sums != nullptr;
    FASTODE_ROLLED
    for (int k = call.stages - 1; k >= 0; --k) {
      bool through = call.table != nullptr;
      FASTODE_ROLLED
      for (int i = k; i < call.stages; ++i) through = through || beta(call, i, k) != 0;
      const Left left{{sums ? backward.cotangent[k] : nullptr}, {backward.back}, sums};
      branch.pull(
          k, call.room, {call.input[k]}, left, through,
          [&](int n, typename Tile::Sum& sum) {
            Tile::clear(sum);
            add_bars(sum, call, n, k, 1);
          },
          [&](int n, typename Tile::Sum& sum) {
            typename Tile::State bar;
            add_bars(sum, call, n, k, 0);
            Tile::round(bar, sum);
            if (k == 0) return Tile::store(bar, call.result, n);
            Tile::keep(bar, place(call, call.bar[k], n));
          });
    }
    if (sums) branch.store_sums(backward.sums, call.branch.count);
  }

 private:
  static FASTODE_DEVICE char* place(const cuda::SchemeCall& call, int slot, int n) {
    return Branch<Tile>::place(call.room, slot, n);
  }

  // The cotangents of u_{i + 1} for i from k on, times the coefficients of u_k in them or of f(u_k).
  static FASTODE_DEVICE void add_bars(typename Tile::Sum& sum, const cuda::SchemeCall& call, int n, int k, bool image) {
    FASTODE_ROLLED
    for (int i = k; i < call.stages; ++i) {
      const float factor = image ? beta(call, i, k) : alpha(call, i, k);
      if (factor != 0) Tile::add_kept(sum, factor, place(call, call.bar[i + 1], n));
    }
  }
};

}  // namespace fastode::device

// Explicit schemes in Shu–Osher form, forwards and backwards. Derivation: README.md of fastode/ops/schemes/runge_kutta.
#pragma once

#include "branch.cuh"

namespace fastode::device {

// Entries of row k + 1 of the tableau, the coefficients of u_j and f(u_j) in u_{k + 1}.
FASTODE_DEVICE float alpha(const cuda::SchemeCall& call, int k, int j) {
  return call.table ? static_cast<float>(call.table[k * call.stages + j]) : call.alpha[k][j];
}
FASTODE_DEVICE float beta(const cuda::SchemeCall& call, int k, int j) {
  return call.table ? static_cast<float>(call.table[(call.stages + k) * call.stages + j]) : call.beta[k][j];
}

// u_s, and what a later backward reads of each evaluation.
template <class Tile>
struct SchemeForward {
  static constexpr int threads = Tile::kThreads;

  static FASTODE_DEVICE void run(const cuda::SchemeCall& call) {
    Branch<Tile> branch(call.branch, call.samples);
    branch.fix_statistics();
    FASTODE_ROLLED
    for (int n = block(); n < call.samples; n += blocks()) {
      typename Tile::State point;
      Tile::load(point, call.x, n);
      FASTODE_ROLLED
      for (int k = 0; k < call.stages; ++k) {
        if (call.point[k] >= 0) Tile::keep(point, Branch<Tile>::place(call.room, call.point[k], n));
        stage(branch, call, n, k, point);
      }
      Tile::store(point, call.result, n);
    }
  }

 private:
  // From u_k to u_{k + 1}, in `point`.
  static FASTODE_DEVICE void stage(Branch<Tile>& branch, const cuda::SchemeCall& call, int n, int k,
                                   typename Tile::State& point) {
    typename Tile::Sum sum;
    bool uses = call.table != nullptr;  // what is learned has a gradient where it is zero, too
    FASTODE_ROLLED
    for (int i = k; i < call.stages; ++i) uses = uses || beta(call, i, k) != 0;
    if (uses) {
      typename Tile::State work = point;
      branch.value(work, sum, n, k, call.room, {call.input[k]});
      if (call.image[k] >= 0) {
        Tile::round(work, sum);
        Tile::keep(work, Branch<Tile>::place(call.room, call.image[k], n));
      }
    }
    // What counts zero times is left out: it may be infinite.
    if (beta(call, k, k) != 0)
      Tile::scale(sum, beta(call, k, k));
    else
      Tile::clear(sum);
    if (alpha(call, k, k) != 0) Tile::add(sum, alpha(call, k, k), point);
    FASTODE_ROLLED
    for (int j = 0; j < k; ++j) {
      const float a = alpha(call, k, j), b = beta(call, k, j);
      if (a != 0) Tile::add_kept(sum, a, Branch<Tile>::place(call.room, call.point[j], n));
      if (b != 0) Tile::add_kept(sum, b, Branch<Tile>::place(call.room, call.image[j], n));
    }
    Tile::round(point, sum);
  }
};

// The cotangent of x from that of u_s, with what the forward kept.
template <class Tile>
struct SchemeBackward {
  static constexpr int threads = Tile::kThreads;

  static FASTODE_DEVICE void run(const cuda::BackwardCall& backward) {
    const cuda::SchemeCall& call = backward.scheme;
    Branch<Tile> branch(call.branch, call.samples);
    FASTODE_ROLLED
    for (int n = block(); n < call.samples; n += blocks()) {
      typename Tile::State bar;
      Tile::load(bar, call.x, n);
      FASTODE_ROLLED
      for (int k = call.stages - 1; k >= 0; --k) {
        if (call.bar[k + 1] >= 0) Tile::keep(bar, Branch<Tile>::place(call.room, call.bar[k + 1], n));
        stage(branch, backward, n, k, bar);
      }
      Tile::store(bar, call.result, n);
    }
    if (backward.sums) branch.store_sums(backward.sums, call.branch.count);
  }

 private:
  // From the cotangent of u_{k + 1} to that of u_k, in `bar`.
  static FASTODE_DEVICE void stage(Branch<Tile>& branch, const cuda::BackwardCall& backward, int n, int k,
                                   typename Tile::State& bar) {
    const cuda::SchemeCall& call = backward.scheme;
    typename Tile::Sum sum;
    Tile::clear(sum);
    bool through = call.table != nullptr;
    FASTODE_ROLLED
    for (int i = k; i < call.stages; ++i) {
      if (beta(call, i, k) == 0) continue;
      through = true;
      add_bar(sum, beta(call, i, k), call, n, k, i, bar);
    }
    const bool sums = backward.sums != nullptr;
    const Left left{{sums ? backward.cotangent[k] : nullptr}, {}, sums};
    if (through) branch.pull(sum, n, k, call.room, {call.input[k]}, left);
    FASTODE_ROLLED
    for (int i = k; i < call.stages; ++i)
      if (alpha(call, i, k) != 0) add_bar(sum, alpha(call, i, k), call, n, k, i, bar);
    Tile::round(bar, sum);
  }

  // factor times the cotangent of u_{i + 1}
  static FASTODE_DEVICE void add_bar(typename Tile::Sum& sum, float factor, const cuda::SchemeCall& call, int n, int k,
                                     int i, const typename Tile::State& bar) {
    if (i == k)
      Tile::add(sum, factor, bar);
    else
      Tile::add_kept(sum, factor, Branch<Tile>::place(call.room, call.bar[i + 1], n));
  }
};

}  // namespace fastode::device

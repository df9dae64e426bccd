// IE-Skip, forwards. Derivation: README.md of fastode/ops/schemes/implicit_euler.
#pragma once

#include "scheme.cuh"

namespace fastode::device {

// y_K after K steps from y_0 = x + f(x). What a step needs beside the branch waits in memory: registers are scarce.
template <class Tile>
struct DescentForward {
  static constexpr int threads = Tile::kThreads;

  static FASTODE_DEVICE void run(const cuda::DescentCall& call) {
    Branch<Tile> branch(call.branch, call.samples);
    for (int n = block(); n < call.samples; n += blocks()) {
      typename Tile::State y;
      typename Tile::Sum sum;
      Tile::load(y, map_of<Tile>(call.x), n);
      Tile::keep(y, place(call, call.start, n));
      FASTODE_ROLLED
      for (int k = 0; k <= call.steps; ++k) {
        if (k > 0) Tile::keep(y, place(call, call.point, n));
        branch.value(y, sum, n, 0, call.room, call.input);
        if (k == 0)
          start(call, n, y, sum);
        else
          step(branch, call, n, y, sum);
        Tile::round(y, sum);
      }
      Tile::store(y, map_of<Tile>(call.result), n);
    }
  }

 private:
  static FASTODE_DEVICE char* place(const cuda::DescentCall& call, int slot, int n) {
    return Branch<Tile>::place(call.room, slot, n);
  }

  // From f(x) to x + f(x).
  static FASTODE_DEVICE void start(const cuda::DescentCall& call, int n, typename Tile::State& work,
                                   typename Tile::Sum& sum) {
    if (call.theta != 1) {
      Tile::round(work, sum);
      Tile::keep(work, place(call, call.skip, n));
    }
    Tile::add_kept(sum, 1, place(call, call.start, n));
  }

  // From f(y) to y − 2γ (e − θ Jᵀ e) with e = y − x − (1 − θ) f(x) − θ f(y).
  static FASTODE_DEVICE void step(Branch<Tile>& branch, const cuda::DescentCall& call, int n,
                                  typename Tile::State& work, typename Tile::Sum& sum) {
    Tile::scale(sum, -call.theta);
    Tile::add_kept(sum, 1, place(call, call.point, n));
    Tile::add_kept(sum, -1, place(call, call.start, n));
    if (call.theta != 1) Tile::add_kept(sum, call.theta - 1, place(call, call.skip, n));
    Tile::round(work, sum);
    Tile::keep(work, place(call, call.residual, n));
    branch.pull(sum, n, 0, call.room, call.input);
    Tile::scale(sum, 2 * call.step_size * call.theta);
    Tile::add_kept(sum, -2 * call.step_size, place(call, call.residual, n));
    Tile::add_kept(sum, 1, place(call, call.point, n));
  }
};

}  // namespace fastode::device

// IE-Skip, forwards and backwards. Derivation: README.md of fastode/ops/schemes/implicit_euler.
//
// What a step needs beside the branch waits in memory: registers are scarce.
#pragma once

#include "scheme.cuh"
#include "second.cuh"

namespace fastode::device {

// y_K after K steps from y_0 = x + f(x).
template <class Tile>
struct DescentForward {
  static constexpr int threads = Tile::kThreads;

  static FASTODE_DEVICE void run(const cuda::DescentCall& call) {
    Branch<Tile> branch(call.branch, call.samples);
    branch.fix_statistics();
    FASTODE_ROLLED
    for (int n = block(); n < call.samples; n += blocks()) {
      typename Tile::State y;
      typename Tile::Sum sum;
      Tile::load(y, call.x, n);
      FASTODE_ROLLED
      for (int k = 0; k <= call.steps; ++k) {  // the evaluation at x, then at y_0, y_1, …
        const int by = (k - 1) * call.stride;
        const Slots input = k == 0 ? Slots{call.at_x.input} : Slots{call.at_point.input, by};
        branch.value(y, sum, n, k, call.room, input);
        if (k == 0)
          start(call, n, y, sum);
        else
          step(branch, call, n, k, input, y, sum);
        Tile::round(y, sum);
      }
      Tile::store(y, call.result, n);
    }
  }

 private:
  static FASTODE_DEVICE char* place(const cuda::DescentCall& call, int slot, int n) {
    return Branch<Tile>::place(call.room, slot, n);
  }

  // From f(x) to x + f(x).
  static FASTODE_DEVICE void start(const cuda::DescentCall& call, int n, typename Tile::State& work,
                                   typename Tile::Sum& sum) {
    if (call.skip >= 0) {
      Tile::round(work, sum);
      Tile::keep(work, place(call, call.skip, n));
    }
    Tile::add_kept(sum, 1, place(call, call.at_x.input[0], n));
  }

  // From f(y) to y − 2γ (e − θ Jᵀ e) with e = y − x − (1 − θ) f(x) − θ f(y).
  static FASTODE_DEVICE void step(Branch<Tile>& branch, const cuda::DescentCall& call, int n, int k, Slots input,
                                  typename Tile::State& work, typename Tile::Sum& sum) {
    const Slots cotangent{call.at_point.cotangent, (k - 1) * call.stride};
    const Slots back{call.at_point.back, (k - 1) * call.stride};
    Tile::scale(sum, -call.theta);
    Tile::add_kept(sum, 1, place(call, input[0], n));
    Tile::add_kept(sum, -1, place(call, call.at_x.input[0], n));
    if (call.skip >= 0) Tile::add_kept(sum, call.theta - 1, place(call, call.skip, n));
    branch.pull(sum, n, k, call.room, input, {cotangent, back});
    Tile::scale(sum, 2 * call.step_size * call.theta);
    Tile::add_kept(sum, -2 * call.step_size, place(call, cotangent[branch.count() - 1], n));  // e, rounded
    Tile::add_kept(sum, 1, place(call, input[0], n));
  }
};

// The cotangent of x from that of y_K, with what the forward kept. Without steps it is the residual block's.
template <class Tile>
struct DescentBackward {
  static constexpr int threads = Tile::kThreads;

  static FASTODE_DEVICE void run(const cuda::DescentCall& call) {
    Second<Tile> branch(call.branch, call.samples);
    FASTODE_ROLLED
    for (int n = block(); n < call.samples; n += blocks()) {
      typename Tile::State bar;
      typename Tile::Sum sum;
      Tile::load(bar, call.x, n);
      FASTODE_ROLLED
      for (int k = call.steps; k > 0; --k) step(branch, call, n, k, bar, sum);
      finish(branch, call, n, bar, sum);
      Tile::store(bar, call.result, n);
    }
    if (call.sums) branch.store_sums(call.sums, call.branch.count);
  }

 private:
  static FASTODE_DEVICE char* place(const cuda::DescentCall& call, int slot, int n) {
    return Branch<Tile>::place(call.room, slot, n);
  }

  // From the cotangent of y_k to that of y_{k − 1}: equations (4) and (5).
  static FASTODE_DEVICE void step(Second<Tile>& branch, const cuda::DescentCall& call, int n, int k,
                                  typename Tile::State& bar, typename Tile::Sum& sum) {
    const int by = (k - 1) * call.stride, back_by = (k - 1) * call.stride_back, means = call.steps + k;
    const Slots input{call.at_point.input, by}, back{call.at_point.back, by};
    const Slots tangent{call.tangent, back_by};
    char* const pushed = place(call, tangent[0], n);
    branch.push(bar, sum, n, k, means, call.room, input, tangent);
    Tile::scale(sum, 2 * call.step_size * call.theta);
    Tile::add_kept(sum, -2 * call.step_size, pushed);
    branch.sweep(sum, -2 * call.step_size, n, k, means, call.room, input, tangent, back, call.e_bar + back_by,
                 -call.theta, call.sums != nullptr);
    Tile::scale(sum, -call.theta);
    Tile::add_kept(sum, 1, pushed);
    char* const e_bar = place(call, call.e_bar + back_by, anew(n));
    Tile::add_kept(sum, 1, e_bar);
    Tile::round(bar, sum);
    add_e_bar(call, n, e_bar, k == call.steps);
  }

  static FASTODE_DEVICE void add_e_bar(const cuda::DescentCall& call, int n, const char* e_bar, bool first) {
    typename Tile::State total;
    typename Tile::Sum sum;
    Tile::clear(sum);
    Tile::add_kept(sum, 1, e_bar);
    if (!first) Tile::add_kept(sum, 1, place(call, call.e_bars, n));
    Tile::round(total, sum);
    Tile::keep(total, place(call, call.e_bars, n));
  }

  // Equation (6).
  static FASTODE_DEVICE void finish(Second<Tile>& branch, const cuda::DescentCall& call, int n,
                                    typename Tile::State& bar, typename Tile::Sum& sum) {
    Tile::keep(bar, place(call, call.bar, n));
    Tile::clear(sum);
    Tile::add(sum, 1, bar);
    if (call.steps > 0) Tile::add_kept(sum, call.theta - 1, place(call, call.e_bars, n));
    branch.pull(sum, n, 0, call.room, {call.at_x.input}, {{call.at_x.cotangent}, {}, call.sums != nullptr});
    Tile::add_kept(sum, 1, place(call, call.bar, anew(n)));
    if (call.steps > 0) Tile::add_kept(sum, -1, place(call, call.e_bars, anew(n)));
    Tile::round(bar, sum);
  }
};

}  // namespace fastode::device

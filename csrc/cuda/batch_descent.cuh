// IE-Skip of a branch with batch norms in training. Otherwise as descent.cuh has it.
#pragma once

#include "batch_second.cuh"

namespace fastode::device {

// y_K after K steps from y_0 = x + f(x).
template <class Tile>
struct BatchDescentForward {
  using State = typename Tile::State;
  using Sum = typename Tile::Sum;
  static constexpr int threads = Tile::kThreads;
  static constexpr bool meets = true;

  static FASTODE_DEVICE void run(const cuda::DescentCall& call) {
    Batch<Tile> branch(call.branch, call.samples);
    branch.fix_statistics();
    const int last = branch.count() - 1;
    branch.each([&](int n) {
      State x;
      Tile::load(x, call.x, n);
      Tile::keep(x, place(call, call.at_x.input[0], n));
      branch.offer(0, x, n);
    });
    // y_k, which step k + 1 starts from.
    const auto arrive = [&](int n, int k, const Sum& sum) {
      State y;
      Tile::round(y, sum);
      if (k == call.steps) return Tile::store(y, call.result, n);
      Tile::keep(y, place(call, call.at_point.input[0] + k * call.stride, n));
      branch.offer(0, y, n);
    };
    FASTODE_ROLLED
    for (int k = 0; k <= call.steps; ++k) {  // the evaluation at x, then at y_0, y_1, …
      const int by = (k - 1) * call.stride;
      const Slots input = k == 0 ? Slots{call.at_x.input} : Slots{call.at_point.input, by};
      const Slots cotangent{call.at_point.cotangent, by};
      branch.value(k, call.room, input, [&](int n, Sum& sum) {
        if (k == 0)
          start(call, n, sum);
        else
          residual(call, n, input[0], cotangent[last], sum);
        if (k == 0) arrive(n, 0, sum);
      });
      if (k == 0) continue;
      branch.pull(
          k, call.room, input, {cotangent, {call.at_point.back, by}}, true,
          [&](int n, Sum& sum) {
            Tile::clear(sum);
            Tile::add_kept(sum, 1, place(call, cotangent[last], n));
          },
          [&](int n, Sum& sum) {
            Tile::scale(sum, 2 * call.step_size * call.theta);
            Tile::add_kept(sum, -2 * call.step_size, place(call, cotangent[last], n));  // e, rounded
            Tile::add_kept(sum, 1, place(call, input[0], n));
            arrive(n, k, sum);
          });
    }
  }

 private:
  static FASTODE_DEVICE char* place(const cuda::DescentCall& call, int slot, int n) {
    return Branch<Tile>::place(call.room, slot, n);
  }

  // From f(x) to x + f(x).
  static FASTODE_DEVICE void start(const cuda::DescentCall& call, int n, Sum& sum) {
    if (call.skip >= 0) {
      State f;
      Tile::round(f, sum);
      Tile::keep(f, place(call, call.skip, n));
    }
    Tile::add_kept(sum, 1, place(call, call.at_x.input[0], n));
  }

  // From f(y) to e = y − x − (1 − θ) f(x) − θ f(y), which is kept.
  static FASTODE_DEVICE void residual(const cuda::DescentCall& call, int n, int y, int to, Sum& sum) {
    Tile::scale(sum, -call.theta);
    Tile::add_kept(sum, 1, place(call, y, n));
    Tile::add_kept(sum, -1, place(call, call.at_x.input[0], n));
    if (call.skip >= 0) Tile::add_kept(sum, call.theta - 1, place(call, call.skip, n));
    State e;
    Tile::round(e, sum);
    Tile::keep(e, place(call, to, n));
  }
};

// The cotangent of x from that of y_K, with what the forward kept. Without steps it is the residual block's.
template <class Tile>
struct BatchDescentBackward {
  using State = typename Tile::State;
  using Sum = typename Tile::Sum;
  static constexpr int threads = Tile::kThreads;
  static constexpr bool meets = true;

  static FASTODE_DEVICE void run(const cuda::DescentCall& call) {
    BatchSecond<Tile> branch(call.branch, call.samples);
    branch.each([&](int n) {
      State bar;
      Tile::load(bar, call.x, n);
      Tile::keep(bar, place(call, call.bar, n));
    });
    FASTODE_ROLLED
    for (int k = call.steps; k >= 0; --k) {
      if (k > 0) push(branch, call, k);
      sweep(branch, call, k);
    }
    if (call.sums) branch.store_sums(call.sums, call.branch.count);
  }

 private:
  static FASTODE_DEVICE char* place(const cuda::DescentCall& call, int slot, int n) {
    return Branch<Tile>::place(call.room, slot, n);
  }

  // The places of step k's maps: those that forward has kept, and the backward's own.
  static FASTODE_DEVICE Slots at(const cuda::DescentCall& call, const int (&first)[kMostUnits], int k) {
    return {first, (k - 1) * call.stride};
  }
  static FASTODE_DEVICE Slots own(const cuda::DescentCall& call, const int (&first)[kMostUnits], int k) {
    return {first, (k - 1) * call.stride_back};
  }
  static FASTODE_DEVICE int e_bar_of(const cuda::DescentCall& call, int k) {
    return call.e_bar + (k - 1) * call.stride_back;
  }

  // ē of step k from the cotangent of y_k: equation (4).
  static FASTODE_DEVICE void push(BatchSecond<Tile>& branch, const cuda::DescentCall& call, int k) {
    const int e_bar = e_bar_of(call, k);
    branch.push(
        k, call.steps + k, call.room, at(call, call.at_point.input, k), own(call, call.tangent, k),
        [&](int n, State& t) { Tile::recall(t, place(call, call.bar, n)); },
        [&](int n, Sum& sum) {
          State made;
          Tile::scale(sum, 2 * call.step_size * call.theta);
          Tile::add_kept(sum, -2 * call.step_size, place(call, call.bar, n));
          Tile::round(made, sum);
          Tile::keep(made, place(call, e_bar, n));
        });
  }

  // From ē to the cotangent of y_{k − 1}: equation (5). With k = 0 that of x: equation (6), whose pull-back is a sweep
  // without a tangent.
  static FASTODE_DEVICE void sweep(BatchSecond<Tile>& branch, const cuda::DescentCall& call, int k) {
    const bool last = k == 0;
    if (last) branch.no_tangent(0, call.room, call.zero[0]);
    const Slots input = last ? Slots{call.at_x.input} : at(call, call.at_point.input, k);
    const Slots tangent = last ? Slots{call.zero} : own(call, call.tangent, k);
    const Slots back = last ? Slots{call.zero} : at(call, call.at_point.back, k);
    const Slots value = last ? Slots{call.at_x.cotangent} : at(call, call.value, k);
    // Again where it is used, so that no register waits with it.
    const auto e_bar = [&] { return e_bar_of(call, anew(k)); };
    branch.sweep(
        last ? 0 : -2 * call.step_size, k, last ? 0 : call.steps + k, call.room, input, tangent, back, value,
        last ? call.at_x.cotangent[branch.count() - 1] : e_bar(), call.waiting, last ? 1 : -call.theta,
        call.sums != nullptr,
        [&](int n, Sum& sum) {
          Tile::clear(sum);
          Tile::add_kept(sum, 1, place(call, last ? call.bar : e_bar(), n));
          if (last && call.steps > 0) Tile::add_kept(sum, call.theta - 1, place(call, call.e_bars, n));
        },
        [&](int n, Sum& sum) {
          State bar;
          if (!last) Tile::scale(sum, -call.theta);
          Tile::add_kept(sum, 1, place(call, call.bar, n));
          if (!last || call.steps > 0) Tile::add_kept(sum, last ? -1 : 1, place(call, last ? call.e_bars : e_bar(), n));
          Tile::round(bar, sum);
          if (last) return Tile::store(bar, call.result, n);
          Tile::keep(bar, place(call, call.bar, n));
          add_e_bar(call, n, e_bar(), k == call.steps);
        });
  }

  static FASTODE_DEVICE void add_e_bar(const cuda::DescentCall& call, int n, int e_bar, bool first) {
    Sum sum;
    State total;
    Tile::clear(sum);
    Tile::add_kept(sum, 1, place(call, e_bar, n));
    if (!first) Tile::add_kept(sum, 1, place(call, call.e_bars, n));
    Tile::round(total, sum);
    Tile::keep(total, place(call, call.e_bars, n));
  }
};

}  // namespace fastode::device

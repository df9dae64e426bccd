// The operators of one step of u' = f(t, u), of which the solution of a single map's equation is made.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "resident/step_impl.h"

namespace fastode::resident {
namespace {

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using Numbers = std::vector<double>;
using MaybeTensor = std::optional<Tensor>;

template <class F>
auto with_arithmetic(const Tensor& x, const F& f) {
  return x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

const Tensor* maybe(const MaybeTensor& tensor) { return tensor ? &*tensor : nullptr; }

// Calls f for every sample with its map of the step's layout.
template <class A, class F>
void each_sample(const Tensor& x, const Tensor& map, const F& f) {
  const Plane<A> plane(x.size(2), x.size(3), 0);
  const Map<A> maps = batch_map<A>(plane, map, blocks_of<A>(x.size(1)));
  in_parallel(x.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) f(plane, n, maps.at({0, 0, n, 1, nullptr}, 0));
  });
}

Tensor enter(const Tensor& x) {
  return with_arithmetic(x, [&](auto zero) {
    using A = decltype(zero);
    const Tensor map = new_batch_map<A>(x, blocks_of<A>(x.size(1)));
    const Feature<const A> from = feature_of<const A>(x);
    each_sample<A>(x, map,
                   [&](const Plane<A>& plane, int64_t n, const View<A>& to) { load_sample(plane, from, n, to); });
    return map;
  });
}

Tensor leave(const Tensor& map, const Tensor& x) {
  return with_arithmetic(x, [&](auto zero) {
    using A = decltype(zero);
    const bool last = x.strides()[1] == 1 && x.size(1) > 1;
    const Tensor result = new_map(x.scalar_type(), x.size(0), x.size(1), x.size(2), x.size(3), last);
    const Feature<A> to = feature_of<A>(result);
    each_sample<A>(x, map,
                   [&](const Plane<A>& plane, int64_t n, const View<A>& from) { store_sample(plane, from, to, n); });
    return result;
  });
}

std::tuple<Tensors, Tensors, Tensors> step_forward(const Tensor& x, const Tensor& state, const MaybeTensor& first,
                                                   const Tensors& parameters, const Integers& units,
                                                   const Numbers& numbers, const Numbers& rows, const Numbers& times,
                                                   bool given, const Integers& timed, const Tensors& planes,
                                                   bool keep) {
  const StepArguments step{rows, times, given, timed, planes};
  StepMade made;
  with_arithmetic(x, [&](auto zero) {
    const Packed<decltype(zero)> packed({parameters, units, numbers}, x, {.transposed = false});
    run_step(packed, step, x, state, maybe(first), keep, made);
  });
  return {made.slopes, made.points, made.kept};
}

Tensor new_numbers(const double* from, int64_t count) {
  const Tensor made = new_vector(count, ScalarType::Double);
  std::copy(from, from + count, static_cast<double*>(made.data_ptr()));
  return made;
}

std::tuple<Tensor, MaybeTensor, Tensors, Tensor, Tensor> step_backward(
    const Tensor& x, const MaybeTensor& end_bar, const MaybeTensor& carried, const Tensors& slopes,
    const Tensors& points, const Tensors& kept, const Tensors& parameters, const Integers& units,
    const Numbers& numbers, const Numbers& rows, const Numbers& times, bool given, const Integers& timed,
    const Tensors& planes, const Numbers& weights, const MaybeTensor& error_bar, const Numbers& error_weights,
    bool gradients) {
  const StepArguments step{rows, times, given, timed, planes};
  StepBars bars{weights, error_weights, maybe(end_bar), maybe(error_bar), maybe(carried), slopes, x, x};
  Tensors found;
  with_arithmetic(x, [&](auto zero) {
    using A = decltype(zero);
    const Packed<A> packed({parameters, units, numbers}, x, {.gradients = gradients, .last = false});
    const int64_t workers = workers_for(x.size(0)), size = workers * packed.spec.gradients;
    CallMemory memory;
    A* sums = static_cast<A*>(memory.take(size * static_cast<int64_t>(sizeof(A))));
    pull_step(packed, step, x, {{}, points, kept}, bars, sums);
    if (gradients) found = packed.gradients(sums, workers);
  });
  return {bars.state, given ? MaybeTensor(bars.first) : MaybeTensor(), found,
          new_numbers(bars.moments.data(), static_cast<int64_t>(bars.moments.size())), new_numbers(&bars.product, 1)};
}

// Calls f(begin, end) for the elements of every sample of a map, which are whole vectors; returns what it returns.
template <class F>
auto of_samples(const Tensor& map, const F& f) {
  const int64_t samples = map.size(0), length = map.numel() / std::max<int64_t>(1, samples);
  std::vector<decltype(f(int64_t{0}, int64_t{0}))> found(samples);
  in_parallel(samples, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) found[n] = f(n * length, (n + 1) * length);
  });
  return found;
}

// The sum of weight * term at the elements from one on.
template <class A>
struct Terms {
  Terms(const Tensors& terms, const Numbers& weights) : factors(weights.begin(), weights.end()) {
    for (const Tensor& term : terms) from.push_back(static_cast<const A*>(term.data_ptr()));
  }

  Vec<A> at(int64_t i) const {
    Vec<A> value = {};
    for (size_t k = 0; k < from.size(); ++k) value += factors[k] * load<Vec<A>>(from[k] + i);
    return value;
  }

  std::vector<const A*> from;
  std::vector<A> factors;
};

Tensor scaled_squares(const Tensors& terms, const Numbers& weights, const Tensor& u, const Tensor& v, double rtol,
                      double atol) {
  double sums[2] = {0, 0};
  with_arithmetic(u, [&](auto zero) {
    using A = decltype(zero);
    using V = Vec<A>;
    const Terms<A> error(terms, weights);
    const A *start = static_cast<const A*>(u.data_ptr()), *other = static_cast<const A*>(v.data_ptr());
    const A relative = static_cast<A>(rtol), absolute_part = static_cast<A>(atol);
    const auto found = of_samples(u, [&](int64_t begin, int64_t end) {
      constexpr int64_t stretch = 64 * kLanes<A>;  // summed in the arithmetic's own type
      std::pair<double, double> total(0, 0);
      for (int64_t first = begin; first < end; first += stretch) {
        V squares = {}, nothing = {};
        for (int64_t i = first; i < std::min(end, first + stretch); i += kLanes<A>) {
          const V at_end = load<V>(other + i), one = absolute(load<V>(start + i)), two = absolute(at_end);
          const V value = error.at(i) / (absolute_part + relative * (two < one ? one : two));
          squares += value * value;
          nothing += at_end * A(0);
        }
        for (int lane = 0; lane < kLanes<A>; ++lane) {
          total.first += static_cast<double>(squares[lane]);
          total.second += static_cast<double>(nothing[lane]);
        }
      }
      return total;
    });
    for (const auto& [squares, nothing] : found) sums[0] += squares, sums[1] += nothing;
  });
  return new_numbers(sums, 2);
}

std::tuple<Tensor, Tensor, Tensor> pull_squares(const Tensors& terms, const Numbers& weights, const Tensor& u,
                                                const Tensor& v, double factor, double rtol, double atol) {
  return with_arithmetic(u, [&](auto zero) {
    using A = decltype(zero);
    using V = Vec<A>;
    const auto made = [&] { return new_map(scalar_type<A>(), u.size(0), u.size(1), u.size(2), u.size(3), true); };
    const Tensor error_bar = made(), u_bar = made(), v_bar = made();
    const Terms<A> error(terms, weights);
    const A *start = static_cast<const A*>(u.data_ptr()), *other = static_cast<const A*>(v.data_ptr());
    const auto of = [](const Tensor& tensor) { return static_cast<A*>(tensor.data_ptr()); };
    A *to_error = of(error_bar), *to_u = of(u_bar), *to_v = of(v_bar);
    const auto sign = [](V value) { return value > 0 ? splat<V>(1) : value < 0 ? splat<V>(-1) : V{}; };
    of_samples(u, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += kLanes<A>) {
        const V at_start = load<V>(start + i), at_end = load<V>(other + i);
        const V one = absolute(at_start), two = absolute(at_end);
        const V unit = 1 / (static_cast<A>(atol) + static_cast<A>(rtol) * (two < one ? one : two));
        const V scaled = error.at(i) * unit, pulled = static_cast<A>(factor) * scaled * unit;
        const V through = -static_cast<A>(rtol) * scaled * pulled;
        // Of equal ones either gets a half, as torch has it.
        const V share = one > two ? splat<V>(1) : one < two ? V{} : splat<V>(A(0.5));
        store<V>(to_error + i, pulled);
        store<V>(to_u + i, share * through * sign(at_start));
        store<V>(to_v + i, (1 - share) * through * sign(at_end));
      }
      return 0;
    });
    return std::make_tuple(error_bar, u_bar, v_bar);
  });
}

}  // namespace
}  // namespace fastode::resident

STABLE_TORCH_LIBRARY_IMPL(fastode, CPU, m) {
  m.impl("resident_enter", TORCH_BOX(&fastode::resident::enter));
  m.impl("resident_leave", TORCH_BOX(&fastode::resident::leave));
  m.impl("resident_scaled_squares", TORCH_BOX(&fastode::resident::scaled_squares));
  m.impl("resident_pull_squares", TORCH_BOX(&fastode::resident::pull_squares));
  m.impl("resident_step_forward", TORCH_BOX(&fastode::resident::step_forward));
  m.impl("resident_step_backward", TORCH_BOX(&fastode::resident::step_backward));
}

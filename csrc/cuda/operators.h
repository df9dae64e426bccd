// The resident operators over the programs, for the card's tensors or, on the test machine, the CPU's: explicit schemes
// and IE-Skip, forwards and backwards.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "calls.h"
#include "solve_operators.h"

namespace fastode::cuda {

// Places by number: those of every unit's input at each stage, then one for each image and each cotangent. Where batch
// norms couple the samples all maps have places, of which those that no backward reads serve every stage.
class SchemePlaces {
 public:
  // `table` [2, s, s], float64, on the host or, learned, on the card. `keep`: for a backward.
  SchemePlaces(SchemeCall& call, const Tensor& table, bool keep) : call_(call) {
    const bool coupled = batch_norms(call.branch) > 0;
    const int s = static_cast<int>(table.size(1)), units = call.branch.count;
    if (s > kMostStages) throw std::runtime_error("a scheme has more stages than the programs take");
    const double* numbers = static_cast<const double*>(table.data_ptr());
    call.stages = s;
    call.table = on_card(table) ? numbers : nullptr;
    for (int i = 0; i < s; ++i) {
      for (int k = 0; k <= i; ++k) {  // what is learned may be anything but zero
        call.alpha[i][k] = call.table ? 1 : static_cast<float>(numbers[i * s + k]);
        call.beta[i][k] = call.table ? 1 : static_cast<float>(numbers[(s + i) * s + k]);
      }
    }
    for (int k = 0; k < s; ++k) {
      bool point = keep || coupled, image = false;
      for (int i = k + 1; i < s; ++i) point = point || call.alpha[i][k] != 0, image = image || call.beta[i][k] != 0;
      call.point[k] = point ? slots++ : -1;
      call.image[k] = image ? slots++ : -1;
      for (int u = 0; u < kMostUnits; ++u) {
        const bool wanted = u > 0 && u < units && (keep || coupled);
        call.input[k][u] = !wanted ? -1 : keep || k == 0 ? slots++ : call.input[0][u];
      }
      if (coupled) call.input[k][0] = call.point[k];
    }
    for (int k = 0; k <= s; ++k) {
      bool again = false;  // whether the cotangent of u_k is read after that of u_{k − 1} was made
      for (int j = 0; k > 0 && j < k - 1; ++j) again = again || call.alpha[k - 1][j] != 0 || call.beta[k - 1][j] != 0;
      call.bar[k] = keep && again && !coupled ? slots++ : -1;
    }
  }

  // Backward finds the first unit's input where forward has put the point.
  void turn() {
    for (int k = 0; k < call_.stages; ++k) call_.input[k][0] = call_.point[k];
  }

  // Whether f(u_k) is evaluated.
  bool used(int k) const {
    bool found = false;
    for (int i = k; i < call_.stages; ++i) found = found || call_.beta[i][k] != 0;
    return found;
  }

  int slots = 0;

 private:
  SchemeCall& call_;
};

using Forward = std::tuple<Tensor, Tensor, Tensors>;
using Backward = std::tuple<Tensor, Tensors, Tensor>;

inline SchemeCall scheme_call(const Tensor& x, const Tensor& result, const Tensors& parameters, const Integers& units,
                              const Numbers& numbers) {
  SchemeCall call{};
  call.samples = static_cast<int>(x.size(0));
  call.branch = branch_of(parameters, units, numbers);
  call.x = map_of(x), call.result = map_of(result);
  return call;
}

inline Forward scheme_forward(const Tensor& x, const Tensors& parameters, const Integers& units, const Numbers& numbers,
                              const Tensor& table, bool keep) {
  const Tensor y = new_map_like(x);
  SchemeCall call = scheme_call(x, y, parameters, units, numbers);
  const SchemePlaces places(call, table, keep);
  const int64_t statistics = keep ? statistics_of(x, call.stages, call.branch.count) : 0;
  const Store kept(x, places.slots, statistics + exchange_of(x, call.branch));
  call.room = {kept.at(), nullptr, places.slots, x.size(0)};
  call.branch.statistics = keep ? kept.numbers(x, places.slots) : nullptr;
  call.branch.exchange = kept.numbers(x, places.slots) + statistics;
  const Tensor measured = new_measured(x, call.branch, call.stages);
  const bool coupled = batch_norms(call.branch) > 0;
  launched(coupled ? batch_scheme_forward(type_of(x), shape_of(x), call, queue_of(x))
                   : cuda::scheme_forward(type_of(x), shape_of(x), call, queue_of(x)));
  return {y, measured, keep ? Tensors{kept.tensor} : Tensors{}};
}

// Adds a product for each unit to those of the weights' gradients; `tangent`: along it.
inline void add_product(WeightsCall& call, int evaluation, const int (&input)[kMostUnits],
                        const int (&cotangent)[kMostUnits], float factor, const int* tangent = nullptr,
                        int tangent_evaluation = 0) {
  Product& product = call.product[call.count++];
  product.evaluation = evaluation, product.tangent_evaluation = tangent_evaluation, product.factor = factor;
  for (int u = 0; u < kMostUnits; ++u) {
    product.input[u] = input[u], product.cotangent[u] = cotangent[u];
    product.tangent[u] = tangent ? tangent[u] : -1;
  }
}

// The gradients of the parameters in their order, those of running statistics empty, and where the programs put them.
inline Tensors new_gradients(const Tensors& parameters, const Integers& units, FinishCall& finish) {
  Tensors bars;
  const auto add = [&](bool present) -> void* {
    if (!present) return nullptr;
    bars.push_back(new_gradient(parameters[bars.size()]));
    return bars.back().data_ptr();
  };
  for (int u = 0; u < finish.units; ++u) {
    const int64_t bits = units[u * resident::kUnitIntegers + 6];
    UnitGradients& unit = finish.unit[u];
    unit.norm_weight = add(bits & resident::kWeight), unit.norm_bias = add(bits & resident::kBias);
    for (int i = 0; bits & resident::kRunning && i < 2; ++i)
      bars.push_back(new_vector(parameters[0], 0, parameters[0].scalar_type()));
    unit.weight = add(bits & resident::kConvWeight), unit.bias = add(bits & resident::kConvBias);
  }
  return bars;
}

// From what a backward left to the parameters' gradients: two launches.
inline Tensors parameter_gradients(const Tensor& x, WeightsCall& call, const Tensors& parameters, const Integers& units,
                                   const float* sums, int sums_rows) {
  const int count = call.branch.count;
  const int channels = static_cast<int>(x.size(1));
  FinishCall finish{count, count, channels, 1, {channels, channels}, nullptr, sums, 0, sums_rows, {}};
  const Tensor partial = make_products(x, shape_of(x), call, finish);
  const Tensors bars = new_gradients(parameters, units, finish);
  launched(finish_gradients(type_of(x), shape_of(x), finish, queue_of(x)));
  return bars;
}

// The gradients of x and, if they are wanted, of the parameters.
inline Gradients scheme_backward(const Tensor& x, const Tensor& cotangent, const Tensors& kept_pieces,
                                 const Tensors& parameters, const Integers& units, const Numbers& numbers,
                                 const Tensor& table, bool gradients) {
  Tensors pieces = kept_pieces;
  if (pieces.empty()) pieces = std::get<2>(scheme_forward(x, parameters, units, numbers, table, true));
  const Store kept(pieces[0]);
  const Tensor bar = new_map_like(x);
  const Queue queue = queue_of(x);
  BackwardCall call{scheme_call(cotangent, bar, parameters, units, numbers), {}, nullptr, {}};
  SchemeCall& scheme = call.scheme;
  SchemePlaces places(scheme, table, true);
  places.turn();
  scheme.branch.statistics = kept.numbers(x, places.slots);
  const int count = scheme.branch.count;
  const bool coupled = batch_norms(scheme.branch) > 0;
  int slots = 0;
  if (coupled) {
    for (int& back : call.back) back = places.slots;
    ++slots;
    for (int k = 1; k <= scheme.stages; ++k) scheme.bar[k] = places.slots + slots++;
  }
  WeightsCall weights{scheme.samples, 0, scheme.branch, {}, nullptr, {}};
  for (int k = 0; k < scheme.stages; ++k) {
    const bool used = gradients && places.used(k);
    for (int u = 0; u < count; ++u) call.cotangent[k][u] = used ? places.slots + slots++ : -1;
    if (used) add_product(weights, k, scheme.input[k], call.cotangent[k], 1);
  }
  const auto blocks = coupled ? batch_scheme_backward_blocks : scheme_backward_blocks;
  const int rows = gradients ? blocks(type_of(x), shape_of(x), call, queue) : 0;
  const int64_t sums = sums_of(x, rows, count);
  const Store own(x, slots, sums + exchange_of(x, scheme.branch));
  scheme.room = weights.room = {kept.at(), own.at(), places.slots, x.size(0)};
  weights.branch.statistics = scheme.branch.statistics;
  call.sums = gradients ? own.numbers(x, slots) : nullptr;
  scheme.branch.exchange = own.numbers(x, slots) + sums;
  launched(coupled ? batch_scheme_backward(type_of(x), shape_of(x), call, queue)
                   : cuda::scheme_backward(type_of(x), shape_of(x), call, queue));
  return {bar, gradients ? parameter_gradients(x, weights, parameters, units, call.sums, rows) : Tensors{}};
}

// ---- IE-Skip

// The places of a forward, with `keep` those that a backward reads, and of that backward. Where batch norms couple the
// samples all maps have places.
inline void place_descent(DescentCall& call, bool keep) {
  const int count = call.branch.count;
  const bool coupled = batch_norms(call.branch) > 0;
  int next = 0;
  const auto take = [&](bool wanted) { return wanted ? next++ : -1; };
  for (int u = 0; u < kMostUnits; ++u) call.at_x.input[u] = take(u < count && (u == 0 || keep || coupled));
  call.skip = take(call.theta != 1 && call.steps > 0);
  const int first = next;
  for (int u = 0; u < kMostUnits; ++u) {
    call.at_point.input[u] = take(u < count);
    call.at_point.cotangent[u] = take(u < count && (keep || u + 1 == count));
    call.at_point.back[u] = take(u < count && (keep || coupled));
  }
  call.stride = keep ? next - first : 0;
  call.room.split = keep ? first + call.steps * call.stride : next;
}

// Returns how many places a backward has of its own.
inline int place_backward(DescentCall& call, bool gradients) {
  const int count = call.branch.count;
  int next = call.room.split;
  const auto take = [&](bool wanted) { return wanted ? next++ : -1; };
  call.bar = next++, call.e_bars = next++;
  const bool coupled = batch_norms(call.branch) > 0;
  call.waiting = take(coupled);
  const int zero = take(coupled);
  for (int& place : call.zero) place = zero;
  for (int u = 0; u < kMostUnits; ++u) call.at_x.cotangent[u] = take(u < count && gradients);
  const int first = next;
  for (int u = 0; u < kMostUnits; ++u) call.tangent[u] = take(u < count), call.value[u] = take(u < count);
  call.stride_back = gradients ? next - first : 0;
  return first + (gradients ? call.steps : 1) * (next - first) - call.room.split;
}

inline DescentCall descent_call(const Tensor& x, const Tensor& result, const Tensors& parameters, const Integers& units,
                                const Numbers& numbers, int64_t steps, double step_size, double theta) {
  DescentCall call{};
  call.samples = static_cast<int>(x.size(0)), call.steps = static_cast<int>(steps);
  call.step_size = static_cast<float>(step_size), call.theta = static_cast<float>(theta);
  call.branch = branch_of(parameters, units, numbers);
  call.x = map_of(x), call.result = map_of(result);
  return call;
}

inline Forward descent_forward(const Tensor& x, const Tensors& parameters, const Integers& units,
                               const Numbers& numbers, int64_t steps, double step_size, double theta, bool keep) {
  const Tensor y = new_map_like(x);
  DescentCall call = descent_call(x, y, parameters, units, numbers, steps, step_size, theta);
  place_descent(call, keep);
  // Behind the evaluations there is room for the tangents' means of a backward.
  const int places = call.room.split;
  const int64_t statistics = statistics_of(x, (keep ? 2 : 1) * call.steps + 1, call.branch.count);
  const Store kept(x, places, statistics + exchange_of(x, call.branch));
  call.room = {kept.at(), nullptr, places, x.size(0)};
  call.branch.statistics = kept.numbers(x, places);
  call.branch.exchange = call.branch.statistics + statistics;
  const Tensor measured = new_measured(x, call.branch, steps + 1);
  const bool coupled = batch_norms(call.branch) > 0;
  launched(coupled ? batch_descent_forward(type_of(x), shape_of(x), call, queue_of(x))
                   : cuda::descent_forward(type_of(x), shape_of(x), call, queue_of(x)));
  return {y, measured, keep ? Tensors{kept.tensor} : Tensors{}};
}

inline void shift(int (&places)[kMostUnits], int by) {
  for (int& place : places) place = place < 0 ? place : place + by;
}

// Of f(x), and of each step the value's stream and the tangent's, which counts −2η times −θ.
inline WeightsCall descent_products(const DescentCall& call) {
  WeightsCall weights{call.samples, 0, call.branch, call.room, nullptr, {}};
  add_product(weights, 0, call.at_x.input, call.at_x.cotangent, 1);
  for (int k = 1; k <= call.steps; ++k) {
    Trace trace = call.at_point;
    int tangent[kMostUnits], value[kMostUnits];
    for (int u = 0; u < kMostUnits; ++u) tangent[u] = call.tangent[u], value[u] = call.value[u];
    const int by = (k - 1) * call.stride, back_by = (k - 1) * call.stride_back;
    shift(trace.input, by), shift(trace.cotangent, by), shift(tangent, back_by), shift(value, back_by);
    add_product(weights, k, trace.input, value, -call.theta);
    add_product(weights, k, trace.input, trace.cotangent, 2 * call.step_size * call.theta, tangent, call.steps + k);
  }
  return weights;
}

inline Gradients descent_backward(const Tensor& x, const Tensor& cotangent, const Tensors& kept_pieces,
                                  const Tensors& parameters, const Integers& units, const Numbers& numbers,
                                  int64_t steps, double step_size, double theta, bool gradients) {
  Tensors pieces = kept_pieces;
  if (pieces.empty())
    pieces = std::get<2>(descent_forward(x, parameters, units, numbers, steps, step_size, theta, true));
  const Store kept(pieces[0]);
  const Tensor bar = new_map_like(x);
  const Queue queue = queue_of(x);
  DescentCall call = descent_call(cotangent, bar, parameters, units, numbers, steps, step_size, theta);
  place_descent(call, true);
  const int places = call.room.split, slots = place_backward(call, gradients);
  call.branch.statistics = kept.numbers(x, places);
  const bool coupled = batch_norms(call.branch) > 0;
  const auto blocks = coupled ? batch_descent_backward_blocks : descent_backward_blocks;
  const int rows = gradients ? blocks(type_of(x), shape_of(x), call, queue) : 0;
  const int64_t sums = sums_of(x, rows, call.branch.count);
  const Store own(x, slots, sums + exchange_of(x, call.branch));
  call.room = {kept.at(), own.at(), places, x.size(0)};
  call.sums = gradients ? own.numbers(x, slots) : nullptr;
  call.branch.exchange = own.numbers(x, slots) + sums;
  launched(coupled ? batch_descent_backward(type_of(x), shape_of(x), call, queue)
                   : cuda::descent_backward(type_of(x), shape_of(x), call, queue));
  if (!gradients) return {bar, {}};
  WeightsCall weights = descent_products(call);
  return {bar, parameter_gradients(x, weights, parameters, units, call.sums, rows)};
}

// ---- the operators

inline Forward rk_forward(const Tensor& x, const Tensors& parameters, const Integers& units, const Numbers& numbers,
                          const Tensor& table, bool keep, bool) {
  return scheme_forward(x, parameters, units, numbers, table, keep);
}

inline Backward rk_backward(const Tensor& x, const Tensor& cotangent, const Tensors& kept, const Tensors& parameters,
                            const Integers& units, const Numbers& numbers, const Tensor& table, bool gradients,
                            bool table_gradient, bool) {
  if (table_gradient) throw std::runtime_error("there is no program for the gradients of coefficients");
  auto [bar, bars] = scheme_backward(x, cotangent, kept, parameters, units, numbers, table, gradients);
  return {bar, bars, new_vector(x, 0, ScalarType::Double)};
}

inline Forward ie_forward(const Tensor& x, const Tensors& parameters, const Integers& units, const Numbers& numbers,
                          int64_t steps, double step_size, double theta, bool keep, bool) {
  return descent_forward(x, parameters, units, numbers, steps, step_size, theta, keep);
}

inline Gradients ie_backward(const Tensor& x, const Tensor& cotangent, const Tensors& kept, const Tensors& parameters,
                             const Integers& units, const Numbers& numbers, int64_t steps, double step_size,
                             double theta, bool detach, bool gradients, bool) {
  // With a detached descent the derivative is the residual block's, which x alone gives.
  return descent_backward(x, cotangent, detach ? Tensors{} : kept, parameters, units, numbers, detach ? 0 : steps,
                          step_size, theta, gradients);
}

template <class Library>
void implement(Library& m) {
  m.impl("resident_rk_forward", TORCH_BOX(&rk_forward));
  m.impl("resident_rk_backward", TORCH_BOX(&rk_backward));
  m.impl("resident_ie_forward", TORCH_BOX(&ie_forward));
  m.impl("resident_ie_backward", TORCH_BOX(&ie_backward));
  m.impl("resident_march_forward", TORCH_BOX(&march_solution));
  m.impl("resident_march_backward", TORCH_BOX(&march_gradients));
  m.impl("resident_solve_forward", TORCH_BOX(&solve_solution));
  m.impl("resident_solve_backward", TORCH_BOX(&solve_gradients));
}

}  // namespace fastode::cuda

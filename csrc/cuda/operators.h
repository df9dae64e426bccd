// The resident operators over the programs, for the card's tensors or, on the test machine, the CPU's: explicit schemes
// and IE-Skip, forwards and backwards.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <iterator>
#include <tuple>

#include "calls.h"
#include "solve_operators.h"

namespace fastode::cuda {

// Adds a product for each unit to those of the weights' gradients; `tangent`: along it.
inline Product& add_product(WeightsCall& call, int evaluation, const int (&input)[kMostUnits],
                            const int (&cotangent)[kMostUnits], float factor, const int* tangent = nullptr,
                            int tangent_evaluation = 0) {
  Product& product = call.product[call.count++];
  product.evaluation = evaluation, product.tangent_evaluation = tangent_evaluation;
  for (int u = 0; u < kMostUnits; ++u) {
    product.input[u] = input[u], product.cotangent[u] = cotangent[u], product.factor[u] = factor;
    product.tangent[u] = tangent ? tangent[u] : -1;
  }
  return product;
}

// Places by number: those of every unit's input at each stage, then one for each image. Where batch norms couple the
// samples all maps have places, of which those that no backward reads serve every stage.
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
    for (int& bar : call.bar) bar = -1;
  }

  // Returns how many places a backward has of its own; with `weights` also those that the parameters' gradients read,
  // which are added to them. What forward kept and no backward reads is taken first.
  int place_backward(BackwardCall& back, bool gradients, WeightsCall& weights) {
    const bool coupled = batch_norms(call_.branch) > 0;
    const int last = call_.branch.count - 1;
    int own = 0, image = 0;
    const auto take = [&] {
      while (image < call_.stages && call_.image[image] < 0) ++image;
      return image < call_.stages ? call_.image[image++] : slots + own++;
    };
    if (coupled) std::fill(std::begin(back.back), std::end(back.back), take());
    for (int k = 1; k <= call_.stages; ++k) {
      bool again = coupled;  // whether the cotangent of u_k is read after that of u_{k − 1} was made
      for (int j = 0; j < k - 1; ++j) again = again || call_.alpha[k - 1][j] != 0 || call_.beta[k - 1][j] != 0;
      if (again) call_.bar[k] = take();
    }
    for (int k = 0; k < call_.stages; ++k) {
      const bool used = gradients && this->used(k), scaled = used && only(k);
      if (scaled && call_.bar[k + 1] < 0) call_.bar[k + 1] = take();
      for (int u = 0; u <= last; ++u) back.cotangent[k][u] = used && !(scaled && u == last) ? take() : -1;
      if (!used) continue;
      Product& product = add_product(weights, k, call_.input[k], back.cotangent[k], 1);
      if (scaled) product.cotangent[last] = call_.bar[k + 1], product.factor[last] = call_.beta[k][k];
    }
    return own;
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
  // Whether f(u_k) is in u_{k + 1} alone: its cotangent is that of u_{k + 1}, times a number.
  bool only(int k) const {
    bool found = !call_.table && call_.beta[k][k] != 0;
    for (int i = k + 1; i < call_.stages; ++i) found = found && call_.beta[i][k] == 0;
    return found;
  }

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

// A part of a batch that is taken part by part.
struct Part {
  Tensor bar;         // the cotangent of its x
  Tensor total;       // float sums of the parameters' gradients
  bool begins, ends;  // whether it is the first or the last one
};

// From what a backward left, in `kept` and in `own` with so many places each, to the parameters' gradients: two
// launches. Of a part that is not the last one nothing is returned.
inline Tensors parameter_gradients(const Tensor& x, WeightsCall& call, const Tensors& parameters, const Integers& units,
                                   const Store& kept, const Store& own, int own_places, const float* sums,
                                   int sums_rows, const Part* part) {
  const int count = call.branch.count, channels = static_cast<int>(x.size(1));
  const Shape shape = shape_of(x);
  FinishCall finish{count, count, channels, 1, {channels, channels}, {}, sums, sums_rows, {}, nullptr, nullptr};
  const Tensor made = make_products(x, shape, call, finish, {own.at(), Store::maps(x, shape, own_places)},
                                    {kept.at(), Store::maps(x, shape, call.room.split)});
  Tensors bars;
  if (!part || part->ends) bars = new_gradients(parameters, units, finish);
  if (part && !part->begins) finish.before = static_cast<float*>(part->total.data_ptr());
  if (part && !part->ends) finish.after = static_cast<float*>(part->total.data_ptr());
  launched(finish_gradients(type_of(x), shape, finish, queue_of(x)));
  return bars;
}

// How many parts a batch is taken in where less memory is asked for: the maps that a step leaves are those of one.
inline constexpr int64_t kParts = 4;

// A training step's gradients part by part: one(x, cotangent, nothing kept, part) gives those of a part.
template <class One>
Gradients in_parts(const Tensor& x, const Tensor& cotangent, const Integers& units, const One& one) {
  const int64_t samples = x.size(0), each = (samples + kParts - 1) / kParts, channels = x.size(1);
  const int64_t count = static_cast<int64_t>(units.size()) / resident::kUnitIntegers;
  Tensor all = x, bars = cotangent, bar = new_map_like(x);
  const Tensor total = new_vector(x, count * (9 * channels + 3) * channels, ScalarType::Float);
  Tensors found;
  for (int64_t from = 0; from < samples; from += each) {
    const int64_t length = std::min(each, samples - from);
    const Part part{torch::stable::narrow(bar, 0, from, length), total, from == 0, from + length == samples};
    const Tensor xs = torch::stable::narrow(all, 0, from, length);
    found = std::get<1>(one(xs, torch::stable::narrow(bars, 0, from, length), {}, &part));
  }
  return {bar, found};
}

// Whether a step is taken so: where batch norms do not couple the samples.
inline bool takes_parts(const Tensors& parameters, const Integers& units, const Numbers& numbers, bool everything) {
  return !everything && batch_norms(branch_of(parameters, units, numbers)) == 0;
}

// The gradients of x and, if they are wanted, of the parameters.
inline Gradients scheme_backward(const Tensor& x, const Tensor& cotangent, const Tensors& kept_pieces,
                                 const Tensors& parameters, const Integers& units, const Numbers& numbers,
                                 const Tensor& table, bool gradients, const Part* part = nullptr) {
  Tensors pieces = kept_pieces;
  if (pieces.empty()) pieces = std::get<2>(scheme_forward(x, parameters, units, numbers, table, true));
  const Store kept(pieces[0]);
  const Tensor bar = part ? part->bar : new_map_like(x);
  const Queue queue = queue_of(x);
  BackwardCall call{scheme_call(cotangent, bar, parameters, units, numbers), {}, nullptr, {}};
  SchemeCall& scheme = call.scheme;
  SchemePlaces places(scheme, table, true);
  places.turn();
  scheme.branch.statistics = kept.numbers(x, places.slots);
  const bool coupled = batch_norms(scheme.branch) > 0;
  WeightsCall weights{scheme.samples, 0, 0, scheme.branch, {}, {}, {}};
  const int slots = places.place_backward(call, gradients, weights);
  const auto blocks = coupled ? batch_scheme_backward_blocks : scheme_backward_blocks;
  const int rows = gradients ? blocks(type_of(x), shape_of(x), call, queue) : 0;
  const int64_t sums = sums_of(x, rows, scheme.branch.count);
  const Store own(x, slots, sums + exchange_of(x, scheme.branch));
  scheme.room = weights.room = {kept.at(), own.at(), places.slots, x.size(0)};
  weights.branch.statistics = scheme.branch.statistics;
  call.sums = gradients ? own.numbers(x, slots) : nullptr;
  scheme.branch.exchange = own.numbers(x, slots) + sums;
  launched(coupled ? batch_scheme_backward(type_of(x), shape_of(x), call, queue)
                   : cuda::scheme_backward(type_of(x), shape_of(x), call, queue));
  if (!gradients) return {bar, {}};
  return {bar, parameter_gradients(x, weights, parameters, units, kept, own, slots, call.sums, rows, part)};
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

// Returns how many places a backward has of its own. A step's `back`, which forward has kept, is free behind that
// step's sweep, and of each unit behind the sweep through it: there go the cotangents in the value's stream, and what
// the evaluation at x needs. So is `skip`.
inline int place_backward(DescentCall& call, bool gradients) {
  const int count = call.branch.count, last = count - 1;
  int next = call.room.split;
  const auto take = [&](bool wanted) { return wanted ? next++ : -1; };
  const auto free_of = [&](int step) { return call.at_point.back[0] + step * call.stride; };
  const bool coupled = batch_norms(call.branch) > 0;
  call.bar = coupled || call.steps == 0 ? next++ : free_of(0);
  call.waiting = take(coupled);
  for (int& place : call.zero) place = !coupled ? -1 : call.steps > 0 ? free_of(0) : next;
  if (coupled && call.steps == 0) ++next;
  for (int u = 0; u < kMostUnits; ++u) {
    const bool is_bar = u == last && (call.theta == 1 || call.steps == 0);
    if (!gradients || u > last)
      call.at_x.cotangent[u] = -1;
    else
      call.at_x.cotangent[u] = is_bar ? call.bar : u == last ? call.skip : u + 1 < call.steps ? free_of(u + 1) : next++;
    call.value[u] = u < last ? call.at_point.back[u + 1] : -1;
  }
  call.e_bars = take(call.steps > 1);
  const int first = next;
  call.e_bar = next++;
  if (call.steps == 1) call.e_bars = call.e_bar;
  for (int u = 0; u < kMostUnits; ++u) call.tangent[u] = take(u < count);
  call.stride_back = gradients ? next - first : 0;
  return first + (gradients ? call.steps : std::min(call.steps, 1)) * (next - first) - call.room.split;
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
  WeightsCall weights{call.samples, 0, 0, call.branch, call.room, {}, {}};
  add_product(weights, 0, call.at_x.input, call.at_x.cotangent, 1);
  for (int k = 1; k <= call.steps; ++k) {
    Trace trace = call.at_point;
    int tangent[kMostUnits], value[kMostUnits];
    for (int u = 0; u < kMostUnits; ++u) tangent[u] = call.tangent[u], value[u] = call.value[u];
    const int by = (k - 1) * call.stride, back_by = (k - 1) * call.stride_back;
    shift(trace.input, by), shift(trace.cotangent, by), shift(tangent, back_by), shift(value, by);
    value[call.branch.count - 1] = call.e_bar + back_by;
    add_product(weights, k, trace.input, value, -call.theta);
    add_product(weights, k, trace.input, trace.cotangent, 2 * call.step_size * call.theta, tangent, call.steps + k);
  }
  return weights;
}

inline Gradients descent_backward(const Tensor& x, const Tensor& cotangent, const Tensors& kept_pieces,
                                  const Tensors& parameters, const Integers& units, const Numbers& numbers,
                                  int64_t steps, double step_size, double theta, bool gradients,
                                  const Part* part = nullptr) {
  Tensors pieces = kept_pieces;
  if (pieces.empty())
    pieces = std::get<2>(descent_forward(x, parameters, units, numbers, steps, step_size, theta, true));
  const Store kept(pieces[0]);
  const Tensor bar = part ? part->bar : new_map_like(x);
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
  return {bar, parameter_gradients(x, weights, parameters, units, kept, own, slots, call.sums, rows, part)};
}

// ---- the operators. With less memory forward keeps nothing, and backward runs it again, part by part.

inline Forward rk_forward(const Tensor& x, const Tensors& parameters, const Integers& units, const Numbers& numbers,
                          const Tensor& table, int64_t keep, bool everything) {
  const bool kept = keep && !takes_parts(parameters, units, numbers, everything);
  return scheme_forward(x, parameters, units, numbers, table, kept);
}

inline Backward rk_backward(const Tensor& x, const Tensor& cotangent, const Tensors& kept, const Tensors& parameters,
                            const Integers& units, const Numbers& numbers, const Tensor& table, bool gradients,
                            bool table_gradient, bool everything) {
  if (table_gradient) throw std::runtime_error("there is no program for the gradients of coefficients");
  const auto one = [&](const Tensor& xs, const Tensor& cotangents, const Tensors& pieces, const Part* part) {
    return scheme_backward(xs, cotangents, pieces, parameters, units, numbers, table, gradients, part);
  };
  const bool parts = gradients && takes_parts(parameters, units, numbers, everything);
  auto [bar, bars] = parts ? in_parts(x, cotangent, units, one) : one(x, cotangent, kept, nullptr);
  return {bar, bars, new_vector(x, 0, ScalarType::Double)};
}

inline Forward ie_forward(const Tensor& x, const Tensors& parameters, const Integers& units, const Numbers& numbers,
                          int64_t steps, double step_size, double theta, int64_t keep, bool everything) {
  const bool kept = keep && !takes_parts(parameters, units, numbers, everything);
  return descent_forward(x, parameters, units, numbers, steps, step_size, theta, kept);
}

inline Gradients ie_backward(const Tensor& x, const Tensor& cotangent, const Tensors& kept, const Tensors& parameters,
                             const Integers& units, const Numbers& numbers, int64_t steps, double step_size,
                             double theta, bool detach, bool gradients, bool everything) {
  // With a detached descent the derivative is the residual block's, which x alone gives.
  const auto one = [&](const Tensor& xs, const Tensor& cotangents, const Tensors& pieces, const Part* part) {
    return descent_backward(xs, cotangents, detach ? Tensors{} : pieces, parameters, units, numbers, detach ? 0 : steps,
                            step_size, theta, gradients, part);
  };
  const bool parts = gradients && takes_parts(parameters, units, numbers, everything);
  return parts ? in_parts(x, cotangent, units, one) : one(x, cotangent, kept, nullptr);
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

// The resident operators over the programs, for the card's tensors or, on the test machine, the CPU's: explicit schemes
// and their input gradients, IE-Skip forwards.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "calls.h"

namespace fastode::cuda {

// Places by number: those of every unit's input at each stage, then one for each image and each cotangent.
class SchemePlaces {
 public:
  // `table` [2, s, s], float64, on the host or, learned, on the card. `keep`: for a backward.
  SchemePlaces(SchemeCall& call, const Tensor& table, bool keep) : call_(call) {
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
      bool point = keep, image = false;
      for (int i = k + 1; i < s; ++i) point = point || call.alpha[i][k] != 0, image = image || call.beta[i][k] != 0;
      call.point[k] = point ? slots++ : -1;
      call.image[k] = image ? slots++ : -1;
      for (int u = 0; u < kMostUnits; ++u) call.input[k][u] = u > 0 && u < units && keep ? slots++ : -1;
    }
    for (int k = 0; k <= s; ++k) {
      bool again = false;  // whether the cotangent of u_k is read after that of u_{k − 1} was made
      for (int j = 0; k > 0 && j < k - 1; ++j) again = again || call.alpha[k - 1][j] != 0 || call.beta[k - 1][j] != 0;
      call.bar[k] = keep && again ? slots++ : -1;
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
  const Kept kept(x, places.slots, keep ? call.stages : 0, call.branch.count);
  call.room = kept.place(x.size(0));
  call.branch.statistics = keep ? static_cast<float*>(kept.statistics.data_ptr()) : nullptr;
  launched(cuda::scheme_forward(type_of(x), shape_of(x), call, queue_of(x)));
  return {y, new_vector(x, 0, ScalarType::Float), keep ? kept.pieces() : Tensors{}};
}

// The gradients of the parameters in their order, those of running statistics empty, and where the programs put them.
inline Tensors new_gradients(const Tensors& parameters, const Integers& units, FinishCall& finish) {
  Tensors bars;
  const auto add = [&](bool present) -> void* {
    if (!present) return nullptr;
    const Tensor& p = parameters[bars.size()];
    Integers sizes, strides(p.dim(), 1);
    for (int64_t d = 0; d < p.dim(); ++d) sizes.push_back(p.size(d));
    for (int64_t d = p.dim() - 1; d-- > 0;) strides[d] = strides[d + 1] * sizes[d + 1];
    bars.push_back(new_tensor(p, p.scalar_type(), sizes, strides));
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
inline Tensors parameter_gradients(const Tensor& x, const BackwardCall& backward, const Tensors& parameters,
                                   const Integers& units, int sums_rows) {
  const Queue queue = queue_of(x);
  const int count = backward.scheme.branch.count, channels = static_cast<int>(x.size(1));
  WeightsCall call{backward, nullptr};
  const int blocks = weight_gradients_blocks(type_of(x), shape_of(x), call, queue);
  const Tensor partial = new_vector(x, static_cast<int64_t>(blocks) * (9 * channels + 1) * channels, ScalarType::Float);
  call.partial = static_cast<float*>(partial.data_ptr());
  launched(weight_gradients(type_of(x), shape_of(x), call, queue));
  FinishCall finish{count, channels, call.partial, backward.left.sums, blocks / count, sums_rows, {}};
  const Tensors bars = new_gradients(parameters, units, finish);
  launched(finish_gradients(type_of(x), finish, queue));
  return bars;
}

// The gradients of x and, if they are wanted, of the parameters.
inline std::tuple<Tensor, Tensors> scheme_backward(const Tensor& x, const Tensor& cotangent, const Tensors& kept_pieces,
                                                   const Tensors& parameters, const Integers& units,
                                                   const Numbers& numbers, const Tensor& table, bool gradients) {
  Tensors pieces = kept_pieces;
  if (pieces.empty()) pieces = std::get<2>(scheme_forward(x, parameters, units, numbers, table, true));
  const Kept kept(pieces);
  const Tensor bar = new_map_like(x);
  const Queue queue = queue_of(x);
  BackwardCall call{scheme_call(cotangent, bar, parameters, units, numbers), {}};
  SchemePlaces places(call.scheme, table, true);
  places.turn();
  call.scheme.room = kept.place(x.size(0));
  call.scheme.branch.statistics = static_cast<float*>(kept.statistics.data_ptr());
  const int count = call.scheme.branch.count;
  int slots = 0;
  for (int k = 0; gradients && k < call.scheme.stages; ++k)
    for (int u = 0; u < count; ++u) call.left.cotangent[k][u] = places.used(k) ? slots++ : -1;
  const int rows = gradients ? scheme_backward_blocks(type_of(x), shape_of(x), call, queue) : 0;
  const Tensor left =
      new_vector(x, slots * x.size(0) * static_cast<int64_t>(kept_bytes(shape_of(x))), ScalarType::Byte);
  const Tensor sums = new_vector(x, static_cast<int64_t>(rows) * count * 2 * x.size(1), ScalarType::Float);
  call.left.room = {static_cast<char*>(left.data_ptr()), x.size(0)};
  call.left.sums = gradients ? static_cast<float*>(sums.data_ptr()) : nullptr;
  launched(cuda::scheme_backward(type_of(x), shape_of(x), call, queue));
  return {bar, gradients ? parameter_gradients(x, call, parameters, units, rows) : Tensors{}};
}

inline Tensor descent_forward(const Tensor& x, const Tensors& parameters, const Integers& units, const Numbers& numbers,
                              int64_t steps, double step_size, double theta) {
  const Tensor y = new_map_like(x);
  DescentCall call{};
  call.samples = static_cast<int>(x.size(0)), call.steps = static_cast<int>(steps);
  call.step_size = static_cast<float>(step_size), call.theta = static_cast<float>(theta);
  call.branch = branch_of(parameters, units, numbers);
  call.x = map_of(x), call.result = map_of(y);
  int slots = 0;
  call.start = slots++, call.skip = slots++, call.residual = slots++, call.point = slots++;
  for (int u = 0; u < kMostUnits; ++u) call.input[u] = u < call.branch.count ? slots++ : -1;
  const Kept kept(x, slots, 1, call.branch.count);
  call.room = kept.place(x.size(0));
  call.branch.statistics = static_cast<float*>(kept.statistics.data_ptr());
  launched(cuda::descent_forward(type_of(x), shape_of(x), call, queue_of(x)));
  return y;
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
                          int64_t steps, double step_size, double theta, bool, bool) {
  return {
      descent_forward(x, parameters, units, numbers, steps, step_size, theta), new_vector(x, 0, ScalarType::Float), {}};
}

template <class Library>
void implement(Library& m) {
  m.impl("resident_rk_forward", TORCH_BOX(&rk_forward));
  m.impl("resident_rk_backward", TORCH_BOX(&rk_backward));
  m.impl("resident_ie_forward", TORCH_BOX(&ie_forward));
}

}  // namespace fastode::cuda

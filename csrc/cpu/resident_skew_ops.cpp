// The skew pair's operators on the resident engine. Feature maps are [N, C, H, W] with any strides.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "resident/skew_engine.h"

namespace fastode::resident {
namespace {

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using Numbers = std::vector<double>;
using MaybeTensor = std::optional<Tensor>;

Tensor new_map(const Tensor& like, int64_t channels, int64_t height, int64_t width, bool last) {
  return resident::new_map(like.scalar_type(), like.size(0), channels, height, width, last);
}

Tensor new_map(const Tensor& like, bool last) { return new_map(like, like.size(1), like.size(2), like.size(3), last); }

bool is_last(const Tensor& x) { return x.strides()[1] == 1 && x.size(1) > 1; }

template <class F>
auto with_arithmetic(const Tensor& x, const F& f) {
  return x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

// Calls f(packed, the workers' accumulators) and returns the parameters' gradients, if any is asked for.
template <class A, class F>
Tensors with_gradients(const PairArguments& pair, const Tensor& y, Asked asked, const F& f) {
  const PackedPair<A> packed(pair, y.size(2), y.size(3), asked);
  const int64_t workers = workers_for(y.size(0));
  const Tensor accumulators = new_vector(workers * packed.spec.gradients, scalar_type<A>(), true);
  f(packed, accumulators);
  return asked.weight || asked.norms ? packed.gradients(accumulators, workers) : Tensors{};
}

std::tuple<Tensor, Tensor, Tensors> pair_forward(const Tensor& y, const Tensor& z, const Tensors& parameters,
                                                 const Integers& integers, const Numbers& numbers, bool keep,
                                                 bool results, bool y_last, bool z_last) {
  PairCall call{y, z, nullptr, nullptr, false, new_map(y, y_last), new_map(z, z_last), {true, true}, results};
  Tensors kept;
  with_arithmetic(y, [&](auto zero) {
    with_gradients<decltype(zero)>({parameters, integers, numbers}, y, {},
                                   [&](const auto& packed, const Tensor& accumulators) {
                                     run_pair(packed, call, keep ? &kept : nullptr, accumulators);
                                   });
  });
  return {call.y_out, call.z_out, kept};
}

std::tuple<Tensor, Tensor, Tensors> pair_backward(const Tensor& y, const Tensor& z, const MaybeTensor& y_bar,
                                                  const MaybeTensor& z_bar, Tensors kept, const Tensors& ends,
                                                  const Tensors& parameters, const Integers& integers,
                                                  const Numbers& numbers, bool need_y, bool need_z, bool weight,
                                                  bool norms) {
  const Tensor none = new_vector(0, y.scalar_type());
  PairCall call{y,
                z,
                y_bar ? &*y_bar : nullptr,
                z_bar ? &*z_bar : nullptr,
                true,
                need_y ? new_map(y, is_last(y)) : none,
                need_z ? new_map(z, is_last(z)) : none,
                {need_y, need_z}};
  if (!ends.empty()) call.y_end = &ends[0], call.z_end = &ends[1];
  const Tensors bars = with_arithmetic(y, [&](auto zero) {
    return with_gradients<decltype(zero)>({parameters, integers, numbers}, y, {weight, norms},
                                          [&](const auto& packed, const Tensor& accumulators) {
                                            run_pair(packed, call, kept.empty() ? nullptr : &kept, accumulators);
                                          });
  });
  return {call.y_out, call.z_out, bars};
}

// `table` [stages + 1, stages]: the rows of a, then b, all times the step.
March march_of(const Numbers& table, int64_t steps, const Integers& used) {
  const int64_t stages = static_cast<int64_t>(used.size()) / (2 * steps);
  return {steps, stages, table.data(), table.data() + stages * stages, used.data()};
}

std::tuple<Tensor, Tensors> march_forward(const Tensor& x, const Tensors& parameters, const Integers& integers,
                                          const Numbers& numbers, const Numbers& table, int64_t steps,
                                          const Integers& used, bool keep, bool last) {
  const int64_t stride = integers[0];
  MarchCall call{x, nullptr, new_map(x, parameters[0].size(0), x.size(2) / stride, x.size(3) / stride, last)};
  Tensors kept;
  with_arithmetic(x, [&](auto zero) {
    with_gradients<decltype(zero)>(
        {parameters, integers, numbers}, call.out, {}, [&](const auto& packed, const Tensor& accumulators) {
          run_march(packed, march_of(table, steps, used), call, keep ? &kept : nullptr, accumulators);
        });
  });
  return {call.out, kept};
}

std::tuple<Tensor, Tensors> march_backward(const Tensor& x, const Tensor& cotangent, Tensors kept,
                                           const Tensors& parameters, const Integers& integers, const Numbers& numbers,
                                           const Numbers& table, int64_t steps, const Integers& used, bool weight,
                                           bool norms) {
  MarchCall call{x, &cotangent, new_map(x, is_last(x))};
  const Tensors bars = with_arithmetic(x, [&](auto zero) {
    return with_gradients<decltype(zero)>({parameters, integers, numbers}, cotangent, {weight, norms},
                                          [&](const auto& packed, const Tensor& accumulators) {
                                            run_march(packed, march_of(table, steps, used), call,
                                                      kept.empty() ? nullptr : &kept, accumulators);
                                          });
  });
  return {call.out, bars};
}

}  // namespace
}  // namespace fastode::resident

#define FASTODE_PAIR "Tensor[] parameters, int[] integers, float[] numbers"
#define FASTODE_MARCH "float[] table, int steps, int[] used"

STABLE_TORCH_LIBRARY_FRAGMENT(fastode, m) {
  m.def("resident_skew_forward(Tensor y, Tensor z, " FASTODE_PAIR
        ", bool keep, bool results, bool y_last, bool z_last) -> (Tensor dy, Tensor dz, Tensor[] kept)");
  m.def(
      "resident_skew_backward(Tensor y, Tensor z, Tensor? y_bar, Tensor? z_bar, Tensor[] kept, Tensor[] "
      "ends, " FASTODE_PAIR
      ", bool need_y, bool need_z, bool weight, bool norms) -> (Tensor y_bar, Tensor z_bar, Tensor[] bars)");
  m.def("resident_march_forward(Tensor x, " FASTODE_PAIR ", " FASTODE_MARCH
        ", bool keep, bool last) -> (Tensor y, Tensor[] kept)");
  m.def("resident_march_backward(Tensor x, Tensor cotangent, Tensor[] kept, " FASTODE_PAIR ", " FASTODE_MARCH
        ", bool weight, bool norms) -> (Tensor x_bar, Tensor[] bars)");
}

STABLE_TORCH_LIBRARY_IMPL(fastode, CPU, m) {
  m.impl("resident_skew_forward", TORCH_BOX(&fastode::resident::pair_forward));
  m.impl("resident_skew_backward", TORCH_BOX(&fastode::resident::pair_backward));
  m.impl("resident_march_forward", TORCH_BOX(&fastode::resident::march_forward));
  m.impl("resident_march_backward", TORCH_BOX(&fastode::resident::march_backward));
}

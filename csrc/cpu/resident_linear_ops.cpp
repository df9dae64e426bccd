// The resident engine's operators of the skew field of two matrix products, alone and solved. Matrices are [N, columns]
// with any strides, of the parameters' type.
#include <torch/csrc/stable/library.h>

#include "resident/arguments.h"
#include "resident/linear.h"

namespace fastode::resident {

namespace {

Tensor new_matrix(const Tensor& like, int64_t columns) {
  const int64_t sizes[] = {like.size(0), columns}, strides[] = {columns, 1};
  return new_tensor(like.scalar_type(), sizes, strides, 2);
}

// Calls f(packed, the parts' accumulators) and returns the parameters' gradients if they are asked for.
template <class F>
Tensors with_field(const LinearArguments& field, const Tensor& x, bool gradients, const F& f) {
  return with_arithmetic(x, [&](auto zero) {
    using A = decltype(zero);
    const PackedLinear<A> packed(field, gradients);
    const int64_t parts = parts_for(x.size(0));
    const Tensor accumulators = new_vector(parts * packed.spec.gradients, scalar_type<A>(), true);
    f(packed, accumulators);
    return gradients ? packed.gradients(accumulators, parts) : Tensors{};
  });
}

std::tuple<Tensor, Tensor> linear_forward(const Tensor& y, const Tensor& z, const Tensors& parameters,
                                          const Integers& integers, const Numbers& numbers) {
  const LinearCall call{y,           z, nullptr, nullptr, false, new_matrix(y, y.size(1)), new_matrix(z, z.size(1)),
                        {true, true}};
  with_field({parameters, integers, numbers}, y, false,
             [&](const auto& packed, const Tensor& none) { run_linear(packed, call, none); });
  return {call.y_out, call.z_out};
}

std::tuple<Tensor, Tensor, Tensors> linear_backward(const Tensor& y, const Tensor& z, const MaybeTensor& y_bar,
                                                    const MaybeTensor& z_bar, const Tensors& parameters,
                                                    const Integers& integers, const Numbers& numbers, bool need_y,
                                                    bool need_z, bool gradients) {
  const Tensor none = new_vector(0, y.scalar_type());
  const LinearCall call{y,
                        z,
                        y_bar ? &*y_bar : nullptr,
                        z_bar ? &*z_bar : nullptr,
                        true,
                        need_y ? new_matrix(y, y.size(1)) : none,
                        need_z ? new_matrix(z, z.size(1)) : none,
                        {need_y, need_z}};
  const Tensors bars =
      with_field({parameters, integers, numbers}, y, gradients,
                 [&](const auto& packed, const Tensor& accumulators) { run_linear(packed, call, accumulators); });
  return {call.y_out, call.z_out, bars};
}

std::tuple<Tensor, Tensor, Tensors> linear_solve_forward(const Tensor& x, const Tensors& parameters,
                                                         const Integers& integers, const Numbers& numbers,
                                                         const Numbers& table, const Numbers& solver,
                                                         const Integers& limits, bool per_sample, int64_t keep,
                                                         int64_t through, bool raises) {
  const Embedded scheme = embedded_of(table, solver, limits);
  const SolveCall call{x,
                       nullptr,
                       new_matrix(x, parameters[0].size(0)),
                       per_sample,
                       keep != kKeepNothing,
                       static_cast<Through>(through)};
  Tensors kept;
  Numbers log;
  with_field({parameters, integers, numbers}, x, false,
             [&](const auto& packed, const Tensor& none) { run_linear_solve(packed, scheme, call, log, kept, none); });
  return {call.out, written(log, raises), left_of_solve(std::move(kept), log, keep)};
}

std::tuple<Tensor, Tensors> linear_solve_backward(const Tensor& x, const Tensor& cotangent, const Tensor& log_of,
                                                  Tensors kept, const Tensors& parameters, const Integers& integers,
                                                  const Numbers& numbers, const Numbers& table, const Numbers& solver,
                                                  const Integers& limits, bool per_sample, int64_t through,
                                                  bool gradients) {
  const Embedded scheme = embedded_of(table, solver, limits);
  const SolveCall call{x, &cotangent, new_matrix(x, x.size(1)), per_sample, true, static_cast<Through>(through)};
  Numbers log = numbers_of(log_of);
  kept = found_of_solve(kept, log);
  const Tensors bars =
      with_field({parameters, integers, numbers}, x, gradients, [&](const auto& packed, const Tensor& accumulators) {
        run_linear_solve(packed, scheme, call, log, kept, accumulators);
      });
  return {call.out, bars};
}

}  // namespace
}  // namespace fastode::resident

STABLE_TORCH_LIBRARY_IMPL(fastode, CPU, m) {
  m.impl("resident_linear_forward", TORCH_BOX(&fastode::resident::linear_forward));
  m.impl("resident_linear_backward", TORCH_BOX(&fastode::resident::linear_backward));
  m.impl("resident_linear_solve_forward", TORCH_BOX(&fastode::resident::linear_solve_forward));
  m.impl("resident_linear_solve_backward", TORCH_BOX(&fastode::resident::linear_solve_backward));
}

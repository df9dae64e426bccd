// The resident engine's operators: a whole block in one call. Feature maps are [N, C, H, W] with any strides.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "resident/engine.h"

namespace fastode::resident {

template <template <class> class Program, class A, class Rule>
void run(const Call<A>& call, const Rule& rule);

int64_t group_for(int64_t samples, int64_t workers, int64_t pixels, int64_t stored) {
  const int64_t wanted = stored == sizeof(bfloat16) ? 512 : 128;  // pixels that should share one reading of the weights
  return std::max<int64_t>(1, std::min({kGroup, wanted / pixels, divide_up(samples, workers)}));
}

namespace {

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using Numbers = std::vector<double>;

Tensor like(const Tensor& x) {
  const auto sizes = x.sizes();
  return new_map(x.scalar_type(), sizes[0], sizes[1], sizes[2], sizes[3], x.strides()[1] == 1 && sizes[1] > 1);
}

template <class F>
auto with_arithmetic(const Tensor& x, const F& f) {
  return x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

// Result, statistics and what is kept for backward.
using Forward = std::tuple<Tensor, Tensor, Tensors>;
// Gradients of x, of the parameters and of the scheme's coefficients.
using Backward = std::tuple<Tensor, Tensors, Tensor>;

template <template <class> class Program, class Rule>
Forward forward(const Tensor& x, const BranchArguments& branch, const Rule& rule, int64_t evaluations,
                bool backward_weights, bool keep) {
  return with_arithmetic(x, [&](auto zero) {
    using A = decltype(zero);
    const Packed<A> packed(branch, x, {.transposed = backward_weights});
    Kept kept({});
    const Tensor statistics = new_vector(packed.statistics * evaluations, scalar_type<A>());
    Call<A> call{packed, x, nullptr, like(x), keep ? &kept : nullptr, static_cast<A*>(statistics.data_ptr())};
    run<Program>(call, rule);
    return Forward(call.result, statistics, kept.pieces());
  });
}

template <template <class> class Program, class Rule>
Backward backward(const Tensor& x, const Tensor& cotangent, const BranchArguments& branch, const Rule& rule,
                  const Tensors& kept_pieces, const Wanted& wanted, int64_t products) {
  return with_arithmetic(x, [&](auto zero) {
    using A = decltype(zero);
    const Packed<A> packed(branch, x, wanted);
    const int64_t workers = workers_for(x.size(0));
    Kept kept(kept_pieces);
    Call<A> call{packed, x, &cotangent, like(x), kept_pieces.empty() ? nullptr : &kept};
    const Tensor sums = new_vector(workers * packed.spec.gradients, scalar_type<A>(), true);
    call.gradients = static_cast<A*>(sums.data_ptr());
    std::vector<double> partial(workers * products, 0.0);
    call.products = partial.data(), call.products_stride = products;
    run<Program>(call, rule);
    const Tensor total = new_vector(products, ScalarType::Double, true);
    for (int64_t i = 0; i < workers * products; ++i) static_cast<double*>(total.data_ptr())[i % products] += partial[i];
    return Backward(call.result, wanted.gradients ? packed.gradients(call.gradients, workers) : Tensors{}, total);
  });
}

Forward ie_forward(const Tensor& x, const Tensors& parameters, const Integers& units, const Numbers& numbers,
                   int64_t steps, double gamma, double theta, bool keep, bool frozen) {
  return forward<DescentForward>(x, {parameters, units, numbers}, Descent{steps, gamma, theta, !keep, frozen},
                                 steps + 1, steps > 0, keep);
}

std::tuple<Tensor, Tensors> ie_backward(const Tensor& x, const Tensor& cotangent, const Tensors& kept,
                                        const Tensors& parameters, const Integers& units, const Numbers& numbers,
                                        int64_t steps, double gamma, double theta, bool detach, bool gradients) {
  const Descent descent{steps, gamma, theta, detach, !gradients};
  auto [bar, bars, none] =
      backward<DescentBackward>(x, cotangent, {parameters, units, numbers}, descent, kept, {.gradients = gradients}, 0);
  return {bar, bars};
}

// `table` [2, stages, stages], float64, contiguous: alpha and beta.
Scheme scheme_of(const Tensor& table, bool frozen) {
  return {table.size(1), static_cast<const double*>(table.data_ptr()), frozen};
}

Forward rk_forward(const Tensor& x, const Tensors& parameters, const Integers& units, const Numbers& numbers,
                   const Tensor& table, bool keep, bool frozen) {
  const Scheme scheme = scheme_of(table, frozen);
  return forward<SchemeForward>(x, {parameters, units, numbers}, scheme, scheme.stages, false, keep);
}

Backward rk_backward(const Tensor& x, const Tensor& cotangent, const Tensors& kept, const Tensors& parameters,
                     const Integers& units, const Numbers& numbers, const Tensor& table, bool gradients,
                     bool table_gradient) {
  // Where the stages are kept, no evaluation is computed again to its end but for the coefficients' gradients.
  const Wanted wanted{.gradients = gradients, .last = kept.empty() || table_gradient};
  const Scheme scheme = scheme_of(table, !gradients && !table_gradient);
  const Backward result = backward<SchemeBackward>(x, cotangent, {parameters, units, numbers}, scheme, kept, wanted,
                                                   table_gradient ? table.numel() : 0);
  if (table_gradient) scheme.complete(static_cast<double*>(std::get<2>(result).data_ptr()));
  return result;
}

}  // namespace
}  // namespace fastode::resident

#define FASTODE_BRANCH "Tensor[] parameters, int[] units, float[] numbers"

// `frozen`: what is kept is for a backward without `gradients` and `table_gradient`; else for one with either. A
// backward writes over what is kept. Its schema does not say so, because tracers refuse such lists of tensors; under
// one the list is empty.
STABLE_TORCH_LIBRARY_FRAGMENT(fastode, m) {
  m.def("resident_ie_forward(Tensor x, " FASTODE_BRANCH
        ", int steps, float step_size, float theta, bool keep, bool frozen) -> (Tensor y, Tensor statistics, Tensor[] "
        "kept)");
  m.def("resident_ie_backward(Tensor x, Tensor cotangent, Tensor[] kept, " FASTODE_BRANCH
        ", int steps, float step_size, float theta, bool detach, bool gradients) -> (Tensor x_bar, Tensor[] bars)");
  m.def("resident_rk_forward(Tensor x, " FASTODE_BRANCH
        ", Tensor table, bool keep, bool frozen) -> (Tensor y, Tensor statistics, Tensor[] kept)");
  m.def("resident_rk_backward(Tensor x, Tensor cotangent, Tensor[] kept, " FASTODE_BRANCH
        ", Tensor table, bool gradients, bool table_gradient) -> (Tensor x_bar, Tensor[] bars, Tensor table_bar)");
}

STABLE_TORCH_LIBRARY_IMPL(fastode, CPU, m) {
  m.impl("resident_ie_forward", TORCH_BOX(&fastode::resident::ie_forward));
  m.impl("resident_ie_backward", TORCH_BOX(&fastode::resident::ie_backward));
  m.impl("resident_rk_forward", TORCH_BOX(&fastode::resident::rk_forward));
  m.impl("resident_rk_backward", TORCH_BOX(&fastode::resident::rk_backward));
}

// Running statistics of batch norms, for tracers.
#include "../running.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <vector>

namespace fastode {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

template <class A>
void move_all(const Tensors& means, const Tensors& variances, const Tensors& met, const std::vector<double>& factors,
              const std::vector<double>& unbiased) {
  for (size_t i = 0; i < met.size(); ++i) {
    const size_t norm = i % means.size();
    const int64_t channels = met[i].size(1);
    if (means[norm].numel() != channels || variances[norm].numel() != channels || !met[i].is_contiguous())
      throw std::logic_error("a norm has met other channels than its own");
    const A* now = static_cast<const A*>(met[i].data_ptr());
    move_running(static_cast<A*>(means[norm].data_ptr()), now, A(1), factors[norm], channels);
    move_running(static_cast<A*>(variances[norm].data_ptr()), now + channels, static_cast<A>(unbiased[norm]),
                 factors[norm], channels);
  }
}

void move(const Tensors& means, const Tensors& variances, const Tensors& counts, const Tensors& met,
          const std::vector<double>& factors, const std::vector<double>& unbiased) {
  if (met.empty()) return;
  for (const Tensor& count : counts)
    if (count.scalar_type() != ScalarType::Long) throw std::logic_error("batches are counted in another type");
  met[0].scalar_type() == ScalarType::Double ? move_all<double>(means, variances, met, factors, unbiased)
                                             : move_all<float>(means, variances, met, factors, unbiased);
  const auto evaluations = static_cast<int64_t>(met.size() / means.size());
  for (const Tensor& count : counts) *static_cast<int64_t*>(count.data_ptr()) += evaluations;
}

}  // namespace
}  // namespace fastode

STABLE_TORCH_LIBRARY_IMPL(fastode, CPU, m) { m.impl("move_running", TORCH_BOX(&fastode::move)); }

// From the operators' arguments to the programs' (programs.h), for tensors of any device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../constants.h"
#include "../tensors.h"
#include "programs.h"

namespace fastode::cuda {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using Numbers = std::vector<double>;
using torch::headeronly::ScalarType;

// x's card, and the stream on which torch launches there now.
Queue queue_of(const Tensor& x);

// Whether a tensor lies where programs read it and the host does not.
bool on_card(const Tensor& tensor);

// Memory that nobody has written yet: the test machine fills it with NaN.
void unset(void* begin, int64_t bytes);

inline void launched(const char* error) {
  if (error) throw std::runtime_error(std::string("a program was not launched: ") + error);
}

inline Tensor new_tensor(const Tensor& like, ScalarType type, const Integers& sizes, const Integers& strides) {
  int32_t device, index;
  checked(aoti_torch_get_device_type(like.get(), &device));
  checked(aoti_torch_get_device_index(like.get(), &index));
  return empty_strided(type, sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()), device, index);
}

inline Tensor new_vector(const Tensor& like, int64_t length, ScalarType type) {
  return new_tensor(like, type, {length}, {1});
}

// A map of x's samples and dtype: channels_last, or else NCHW.
inline Tensor new_map(const Tensor& x, int64_t c, int64_t h, int64_t w, bool last) {
  return new_tensor(x, x.scalar_type(), {x.size(0), c, h, w},
                    last ? Integers{c * h * w, 1, w * c, c} : Integers{c * h * w, h * w, w, 1});
}

inline Tensor new_map_like(const Tensor& x) {
  return new_map(x, x.size(1), x.size(2), x.size(3), x.strides()[1] == 1 && x.size(1) > 1);
}

inline Map map_of(const Tensor& x) {
  const auto strides = x.strides();
  const bool even = strides[0] % 2 == 0 && strides[2] % 2 == 0 && strides[3] % 2 == 0;
  const bool words = strides[1] == 1 && even && reinterpret_cast<uintptr_t>(x.data_ptr()) % 4 == 0;
  return {x.data_ptr(), strides[0], strides[1], strides[2], strides[3], words};
}

inline Type type_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::BFloat16 ? Type::kBFloat16 : Type::kFloat16;
}

inline Shape shape_of(const Tensor& x) { return {static_cast<int>(x.size(1)), static_cast<int>(x.size(2))}; }

// `units` and `numbers` as csrc/cpu/resident/engine.h describes them.
inline Branch branch_of(const Tensors& parameters, const Integers& units, const Numbers& numbers) {
  Branch branch{};
  branch.count = static_cast<int>(units.size() / resident::kUnitIntegers);
  size_t next = 0;
  for (int u = 0; u < branch.count; ++u) {
    const int64_t* given = &units[u * resident::kUnitIntegers];
    const double* number = &numbers[u * resident::kUnitNumbers];
    const int64_t bits = given[6];
    const auto take = [&](int64_t bit) -> Vector {
      if (!(bits & bit)) return {nullptr, 0};
      const Tensor& found = parameters[next++];
      return {found.data_ptr(), found.strides()[0]};
    };
    Unit& unit = branch.unit[u];
    unit.norm = static_cast<int>(given[0]), unit.groups = static_cast<int>(given[1]);
    unit.activation = static_cast<int>(given[2]);
    unit.eps = static_cast<float>(number[0]), unit.p = static_cast<float>(number[1]);
    unit.q = static_cast<float>(number[2]);
    unit.norm_weight = take(resident::kWeight), unit.norm_bias = take(resident::kBias);
    unit.mean = take(resident::kRunning), unit.variance = take(resident::kRunning);
    const auto strides = parameters[next].strides();
    for (int d = 0; d < 4; ++d) unit.weight_strides[d] = strides[d];
    unit.weight = take(resident::kConvWeight).data, unit.bias = take(resident::kConvBias);
  }
  return branch;
}

// Places of maps in the order of threads, and behind them numbers: one tensor, for each takes as long as a launch.
class Store {
 public:
  // For maps of x, or of another shape.
  Store(const Tensor& x, int places, int64_t numbers) : Store(x, shape_of(x), places, numbers) {}
  Store(const Tensor& x, Shape shape, int places, int64_t numbers)
      : tensor(
            new_vector(x, maps(x, shape, places) + numbers * static_cast<int64_t>(sizeof(float)), ScalarType::Byte)) {
    unset(at(), tensor.size(0));
  }
  explicit Store(const Tensor& found) : tensor(found) {}

  char* at() const { return static_cast<char*>(tensor.data_ptr()); }
  float* numbers(const Tensor& x, int places) const { return numbers(x, shape_of(x), places); }
  float* numbers(const Tensor& x, Shape shape, int places) const {
    return reinterpret_cast<float*>(at() + maps(x, shape, places));
  }

  // The bytes of so many places.
  static int64_t maps(const Tensor& x, Shape shape, int places) {
    return places * x.size(0) * static_cast<int64_t>(kept_bytes(shape));
  }

  Tensor tensor;
};

// The statistics of so many evaluations.
inline int64_t statistics_of(const Tensor& x, int evaluations, int units) {
  return static_cast<int64_t>(evaluations) * units * x.size(0) * 4 * x.size(1);
}

// How many norms of a branch are batch norms in training, which couple the samples.
inline int batch_norms(const Branch& branch) {
  int count = 0;
  for (int u = 0; u < branch.count; ++u) count += branch.unit[u].norm == kBatchNorm;
  return count;
}

// What the samples exchange at these norms.
inline int64_t exchange_of(const Tensor& x, const Branch& branch) {
  return batch_norms(branch) > 0 ? 2 * x.size(0) * kMostSums * x.size(1) : 0;
}

// Their mean and variance at each of so many evaluations, for running statistics.
inline Tensor new_measured(const Tensor& x, Branch& branch, int64_t evaluations) {
  const Tensor made = new_vector(x, evaluations * batch_norms(branch) * 2 * x.size(1), ScalarType::Float);
  branch.measured = static_cast<float*>(made.data_ptr());
  return made;
}

// A backward's sums of so many norms' gradients, from so many blocks.
inline int64_t sums_of(const Tensor& x, int rows, int norms) {
  return static_cast<int64_t>(rows) * norms * 2 * x.size(1);
}

using Gradients = std::tuple<Tensor, Tensors>;  // of x and of the parameters

// A parameter's gradient, contiguous, that nobody has written yet.
inline Tensor new_gradient(const Tensor& p) {
  Integers sizes, strides(p.dim(), 1);
  for (int64_t d = 0; d < p.dim(); ++d) sizes.push_back(p.size(d));
  for (int64_t d = p.dim() - 1; d-- > 0;) strides[d] = strides[d + 1] * sizes[d + 1];
  return new_tensor(p, p.scalar_type(), sizes, strides);
}

// Memory whose maps only the convolutions' gradients read: when these are made, it is free.
struct Read {
  char* at;
  int64_t bytes;
};

// What the shares may take in any case: less than that is not worth fewer blocks.
inline constexpr int64_t kFewBytes = 2 << 20;

// Launches the convolutions' gradients. Their shares, which `finish` is to add up, lie where the maps have been that
// they are made of. Where few have room there, a tensor that is returned has them. Blocks take two turns at most, and
// are fewer where that is not enough.
inline Tensor make_products(const Tensor& x, Shape shape, WeightsCall& call, FinishCall& finish, const Read& first,
                            const Read& second = {nullptr, 0}) {
  const Queue queue = queue_of(x);
  const int units = call.branch.count, channels = finish.channels;
  const int64_t entries = static_cast<int64_t>(units) * (9 * channels + 1) * channels;
  const int64_t bytes = entries * static_cast<int64_t>(sizeof(float));
  const int64_t most = weight_gradients_blocks(type_of(x), shape, call, queue) / units;  // of a unit
  int64_t split = first.bytes / bytes, room = split + second.bytes / bytes;
  float *at = reinterpret_cast<float*>(first.at), *behind = reinterpret_cast<float*>(second.at);
  const int64_t least = std::min((most + 1) / 2, std::max<int64_t>(kFewBytes / bytes, 1));
  Tensor made;
  if (room < least) {
    made = new_vector(x, least * entries, ScalarType::Float);
    at = static_cast<float*>(made.data_ptr()), split = room = least;
  }
  const int64_t each = std::min(most, 2 * room), turns = each > room ? 2 : 1;
  const Shares shares{at, behind, static_cast<int>(split), static_cast<int>((each + turns - 1) / turns)};
  call.blocks = static_cast<int>(each) * units, call.shares = finish.shares = shares;
  launched(weight_gradients(type_of(x), shape, call, queue));
  return made;
}

}  // namespace fastode::cuda

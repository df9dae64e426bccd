// One call of the resident engine: parameters packed, scratch allocated, a program run on every sample, gradients
// summed.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../storage.h"
#include "descent.h"
#include "scheme.h"

namespace fastode::resident {

// A branch as the operators take it. `units` holds kUnitIntegers per unit: norm code, groups, activation code, output
// channels (0 without a convolution), kernel height, kernel width, and which of the four parameters are present (bits:
// norm weight, norm bias, running mean and variance, convolution weight, convolution bias); `numbers` holds eps, p and
// q per unit. `parameters` lists the present ones in this order.
struct BranchArguments {
  const std::vector<Tensor>& parameters;
  const std::vector<int64_t>& units;
  const std::vector<double>& numbers;
};

inline constexpr int64_t kUnitIntegers = 7, kUnitNumbers = 3;
enum Present : int64_t { kWeight = 1, kBias = 2, kRunning = 4, kConvWeight = 8, kConvBias = 16 };

// Calls f with the pointer in the tensor's own type; a float64 program reads float64 and float32, others all but
// float64.
template <class A, class F>
void with_data(const Tensor& tensor, const F& f) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &type));
  if (type == aoti_torch_dtype_float32()) return f(static_cast<float*>(tensor.data_ptr()));
  if constexpr (std::is_same_v<A, double>)
    f(static_cast<double*>(tensor.data_ptr()));
  else
    f(static_cast<bfloat16*>(tensor.data_ptr()));
}

template <class A>
constexpr ScalarType scalar_type() {
  return std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
}

// What a program asks of the parameters: the weights of transposed convolutions, gradients, and the weights of a last
// convolution that ends the branch.
struct Wanted {
  bool transposed = true, gradients = false, last = true;
};

// The parameters of a branch in the program's type, padded and packed.
template <class A>
class Packed {
 public:
  Packed(const BranchArguments& arguments, const Tensor& x, const Wanted& wanted);

  // The gradients of `parameters` (those of running statistics stay empty), each in its parameter's dtype.
  std::vector<Tensor> gradients(const A* accumulators, int64_t workers) const;

  BranchSpec<A> spec;
  int64_t statistics = 0;  // elements per evaluation: two rows for each batch norm

 private:
  void read(Arena& arena, const Wanted& wanted);

  BranchArguments arguments_;
  int64_t channels_;
  bool lowers_;  // convolutions multiply in bfloat16, as PyTorch's do for such tensors
  Tensor storage_;
};

template <class T>
Feature<T> feature_of(const Tensor& x) {
  const auto strides = x.strides();
  return {
      static_cast<T*>(x.data_ptr()), x.size(1), x.size(2), x.size(3), strides[0], strides[1], strides[2], strides[3]};
}

// How many samples go through a program together: more for small maps, whose weights would otherwise be read for few
// pixels, and more of those that are `stored` in fewer bytes.
int64_t group_for(int64_t samples, int64_t workers, int64_t pixels, int64_t stored);

template <class A>
struct Call {
  const Packed<A>& packed;
  const Tensor& x;
  const Tensor* cotangent;  // null: forward
  Tensor result;
  Kept* kept;                  // null: nothing is kept
  A* statistics = nullptr;     // null: none
  A* gradients = nullptr;      // [workers, spec.gradients], zero
  double* products = nullptr;  // [workers, products_stride], zero
  int64_t products_stride = 0;
};

inline int64_t workers_for(int64_t samples) {
  return std::max<int64_t>(1, std::min<int64_t>(samples, torch::stable::get_num_threads()));
}

// The user's tensor as a program's map, if it has the program's type and its channels lie as vectors.
template <class S, class T>
Map<S> map_of(const Feature<T>& feature) {
  constexpr int64_t lanes = kLanes<Number<S>>;
  if constexpr (std::is_same_v<std::remove_const_t<T>, S>) {
    if (feature.channel == 1 && feature.channels % lanes == 0)
      return {
          {const_cast<S*>(feature.data), feature.row, feature.pixel, lanes}, feature.sample, feature.channels / lanes};
  }
  return {};
}

// On tensors of T, with maps stored as S.
template <template <class> class Program, class S, class T, class Rule, class A>
void run_typed(const Call<A>& call, const Rule& rule) {
  const BranchSpec<A>& spec = call.packed.spec;
  const int64_t samples = call.x.size(0), workers = workers_for(samples);
  const bool forward = call.cotangent == nullptr;
  const Plane<A> plane(call.x.size(2), call.x.size(3), spec.halo);
  Schedule schedule(samples, workers, group_for(samples, workers, plane.pixels(), sizeof(S)));
  Memory<S> memory(plane, schedule, spec.couples_samples, call.kept);
  Branch<S> branch(spec, schedule, memory, spec.gradients ? call.gradients : nullptr, Program<S>::need(rule));

  Wishes<S> wishes;
  wishes.parameters = spec.gradients > 0;
  if (forward && call.packed.statistics) {
    wishes.statistics = call.statistics;
    wishes.statistics_stride = call.packed.statistics;
  }
  wishes.products_stride = call.products_stride;
  if (call.products_stride) wishes.products = call.products;

  const auto read = [&](const Tensor& tensor) {
    const Feature<const T> feature = feature_of<const T>(tensor);
    Map<S> map = map_of<S>(feature);
    if (!map) {
      map = memory.take(blocks_of<A>(feature.channels));
      schedule.each([=, &plane](const Range& range) {
        for (int64_t i = 0; i < range.count; ++i) load_sample(plane, feature, range.first + i, map.at(range, i));
      });
    }
    map.pinned = true;
    return map;
  };
  Ends<S> ends;
  ends.input = read(call.x);
  if (!forward) ends.cotangent = read(*call.cotangent);
  const Feature<T> result = feature_of<T>(call.result);
  ends.result = map_of<S>(result);
  const bool apart = !ends.result;
  if (apart) ends.result = memory.take(ends.input.blocks);
  memory.give(ends.result);
  Program<S>::record(branch, ends, rule, wishes);
  if (apart)
    schedule.each([=, &plane](const Range& range) {
      for (int64_t i = 0; i < range.count; ++i) store_sample(plane, ends.result.at(range, i), result, range.first + i);
    });
  schedule.flush();
  memory.check();
  if (call.kept) call.kept->check();
}

}  // namespace fastode::resident

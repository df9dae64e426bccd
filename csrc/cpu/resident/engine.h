// One call of the resident engine: parameters packed, scratch allocated, a program run on every sample, gradients
// summed.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../storage.h"
#include "programs.h"

namespace fastode::resident {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
  if (tensor.scalar_type() == ScalarType::Float) return f(static_cast<float*>(tensor.data_ptr()));
  if constexpr (std::is_same_v<A, double>)
    f(static_cast<double*>(tensor.data_ptr()));
  else
    f(static_cast<bfloat16*>(tensor.data_ptr()));
}

template <class A>
constexpr ScalarType scalar_type() {
  return std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_vector(const Tensor& like, int64_t length, ScalarType type, bool zero = false) {
  const torch::headeronly::IntHeaderOnlyArrayRef sizes(&length, 1);
  return zero ? torch::stable::new_zeros(like, sizes, type) : torch::stable::new_empty(like, sizes, type);
}

// The parameters of a branch in the program's type, padded and packed.
template <class A>
class Packed {
 public:
  Packed(const BranchArguments& arguments, const Tensor& x, bool backward, bool gradients);

  // The gradients of `parameters` (those of running statistics stay empty), each in its parameter's dtype.
  std::vector<Tensor> gradients(const Tensor& accumulators, int64_t workers) const;

  BranchSpec<A> spec;
  int64_t statistics = 0;  // elements per evaluation: two rows for each batch norm

 private:
  void read(Arena& arena, bool backward, bool gradients);

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
// pixels.
int64_t group_for(int64_t samples, int64_t workers, int64_t pixels);

template <class A>
struct Call {
  const Packed<A>& packed;
  const Tensor& x;
  const Tensor* cotangent;  // null: forward
  Tensor result;
  Store* kept;             // null: nothing is kept
  Tensor statistics = {};  // may be empty
  Tensor gradients = {};   // [workers, spec.gradients], zero; may be empty
  Tensor products = {};    // [workers, products_stride], zero; may be empty
  int64_t products_stride = 0;
};

inline int64_t workers_for(int64_t samples) {
  return std::max<int64_t>(1, std::min<int64_t>(samples, torch::stable::get_num_threads()));
}

template <template <class> class Program, class A, class T, class Rule>
void run_typed(const Call<A>& call, const Rule& rule) {
  const BranchSpec<A>& spec = call.packed.spec;
  const int64_t samples = call.x.size(0), workers = workers_for(samples);
  const Plane<A> plane(call.x.size(2), call.x.size(3), spec.halo);
  const int64_t group = group_for(samples, workers, plane.pixels());
  const bool coupled = spec.couples_samples, forward = call.cotangent == nullptr;
  const Feature<const T> x = feature_of<const T>(call.x),
                         cotangent = feature_of<const T>(forward ? call.x : *call.cotangent);
  const Feature<T> result = feature_of<T>(call.result);

  const auto wishes_of = [&](int64_t worker) {
    Wishes<A> wishes;
    wishes.parameters = spec.gradients > 0;
    if (forward && call.packed.statistics) {
      wishes.statistics = static_cast<A*>(call.statistics.data_ptr());
      wishes.statistics_stride = call.packed.statistics;
    }
    wishes.products_stride = call.products_stride;
    if (!forward && call.products_stride)
      wishes.products = static_cast<double*>(call.products.data_ptr()) + worker * call.products_stride;
    return wishes;
  };
  const auto executor_of = [&](int64_t worker) {
    Executor<A> executor{coupled ? samples : group, coupled ? workers : 1, group};
    executor.gradient_stride = spec.gradients;
    if (spec.gradients) executor.gradients = static_cast<A*>(call.gradients.data_ptr()) + worker * spec.gradients;
    return executor;
  };
  const auto run_on = [&](Program<A>& program, int64_t first, int64_t count) {
    Branch<A>& branch = program.branch;
    branch.set_tile(first, count);
    if (forward) branch.clear_halos(true);
    branch.each([&](const Range& range) {
      for (int64_t i = 0; i < range.count; ++i) {
        const int64_t n = first + range.first + i;
        load_sample(plane, x, n, program.input.at(range, i));
        if (!forward) load_sample(plane, cotangent, n, program.cotangent.at(range, i));
      }
    });
    program.run();
    branch.each([&](const Range& range) {
      for (int64_t i = 0; i < range.count; ++i)
        store_sample(plane, program.result.at(range, i), result, first + range.first + i);
    });
  };

  // A first program only counts what a tile needs, and makes the batch's pieces.
  Arena count(nullptr);
  Store own(call.x);
  Program<A>(spec, plane, executor_of(0), Memory{count, call.kept, coupled ? &own : nullptr, samples}, rule,
             wishes_of(0));
  own.rewind();
  const int64_t bytes = count.used();
  const Tensor scratch =
      new_vector(call.x, (coupled ? 1 : workers) * bytes / static_cast<int64_t>(sizeof(A)), scalar_type<A>());
  const auto work = [&](int64_t w, int64_t begin, int64_t end) {
    Arena arena(static_cast<char*>(scratch.data_ptr()) + w * bytes);
    Store kept = call.kept ? *call.kept : Store(call.x);
    kept.rewind();
    const Memory memory{arena, call.kept ? &kept : nullptr, coupled ? &own : nullptr, samples};
    Program<A> program(spec, plane, executor_of(w), memory, rule, wishes_of(w));
    program.branch.clear_halos(false);
    const int64_t tile = coupled ? samples : group;
    for (int64_t n = begin; n < end; n += tile) run_on(program, n, std::min(tile, end - n));
  };
  if (coupled) return work(0, 0, samples);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) work(w, w * samples / workers, (w + 1) * samples / workers);
  });
}

}  // namespace fastode::resident

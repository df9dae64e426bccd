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
  // Of each unit the stride, negative where the kernel is that of a mean over windows; null: all are 1.
  const std::vector<int64_t>* strides = nullptr;
};

// Calls f with the pointer in the tensor's own type; a float64 program reads float64 and float32, others all but
// float64.
template <class A, class F>
void with_data(const Tensor& tensor, const F& f) {
  int32_t type;
  checked(aoti_torch_get_dtype(tensor.get(), &type));
  if (type == aoti_torch_dtype_float32()) return f(static_cast<float*>(tensor.data_ptr()));
  if constexpr (std::is_same_v<A, double>)
    f(static_cast<double*>(tensor.data_ptr()));
  else
    f(static_cast<bfloat16*>(tensor.data_ptr()));
}

// Whether convolutions of maps like x multiply in bfloat16, as PyTorch's do for such tensors.
inline bool lowers(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16 && has_tiles(); }

// What a program asks of the parameters: the weights of transposed convolutions, gradients, and the weights of a last
// convolution that ends the branch.
struct Wanted {
  bool transposed = true, gradients = false, last = true, straight = true;  // straight: of any convolution forwards
};

// The parameters of a branch in the program's type, padded and packed.
template <class A>
class Packed {
 public:
  Packed(const BranchArguments& arguments, const Tensor& x, const Wanted& wanted)
      : Packed(arguments, x.size(0), x.size(1), Plane<A>(x.size(2), x.size(3), 0),
               lowers(x) && x.size(2) * x.size(3) >= kTilePixels, wanted) {}
  // For so many samples and channels on such a plane, whose maps are stored in bfloat16 or not.
  Packed(const BranchArguments& arguments, int64_t samples, int64_t channels, const Plane<A>& plane, bool narrow,
         const Wanted& wanted);

  // The gradients of `parameters` (those of running statistics stay empty), each in its parameter's dtype.
  std::vector<Tensor> gradients(const A* accumulators, int64_t parts) const;

  BranchSpec<A> spec;
  int64_t statistics = 0;  // elements per evaluation: two rows for each batch norm

 private:
  void read(Arena& arena, const Wanted& wanted);

  BranchArguments arguments_;
  int64_t samples_, channels_;
  Plane<A> plane_;
  bool narrow_;
  CallMemory memory_;
};

extern template class Packed<float>;
extern template class Packed<double>;

template <class T>
Feature<T> feature_of(const Tensor& x) {
  const auto strides = x.strides();
  return {
      static_cast<T*>(x.data_ptr()), x.size(1), x.size(2), x.size(3), strides[0], strides[1], strides[2], strides[3]};
}

// How many samples go through a program together: more of small maps, so that the weights are read for enough pixels,
// more of many channels, whose weights are larger than their maps, and more of those that are `stored` in fewer bytes.
int64_t group_for(int64_t samples, int64_t workers, int64_t pixels, int64_t stored, int64_t channels);

// In how many parts a batch is gone through, as many for each worker, where each part adds up so many bytes by itself:
// more than workers, so that one that is held up leaves parts to the others, but few enough to be added up in the end.
int64_t parts_for(int64_t samples, int64_t workers, int64_t group, int64_t bytes);

template <class A>
struct Call {
  const Packed<A>& packed;
  const Tensor& x;
  const Tensor* cotangent;  // null: forward
  Tensor result;
  Kept* kept;                  // null: nothing is kept
  A* statistics = nullptr;     // null: none
  int64_t parts = 0;           // of the batch, which add up their own; 0: nothing is added up
  A* gradients = nullptr;      // [parts, spec.gradients]
  double* products = nullptr;  // [parts, products_stride], zero
  int64_t products_stride = 0;
};

inline int64_t workers_for(int64_t samples) { return std::max<int64_t>(1, std::min(samples, thread_count())); }

// What a program with maps stored as S needs of the branch, and how it is recorded.
template <class S>
struct Recording {
  Need need;
  std::function<void(Branch<S>&, const Ends<S>&, const Wishes<S>&)> record;
};

// Records a program and runs it on every sample of tensors of T.
template <class S, class T, class A>
void run_recorded(const Call<A>& call, const Recording<S>& recording);

}  // namespace fastode::resident

// Running statistics of batch norms, moved as fastode/dispatch/running.py does it with PyTorch's operators.
#pragma once
#include "../running.h"
#include "block_node.h"

namespace fastode {

// The norms that one call meets, evaluation by evaluation, and where its operator writes what each has met.
class Running {
 public:
  struct Row {
    Tensor mean, variance, count;  // count: of the batches
    int64_t at, channels;          // in the operator's vector: the mean, and behind it the biased variance
    double factor, unbiased;       // running <- (1 - factor) running + factor now; of a variance now times unbiased
  };

  void add(Row row) { rows_.push_back(std::move(row)); }

  // Whether they are plain vectors of this dtype, which are moved here.
  bool usable(at::ScalarType dtype) const {
    if (dtype != at::kFloat && dtype != at::kDouble) return false;
    for (const Row& row : rows_) {
      for (const Tensor* each : {&row.mean, &row.variance})
        if (!plain(*each, dtype) || each->numel() != row.channels) return false;
      if (!plain(row.count, at::kLong) || row.count.numel() != 1) return false;
    }
    return true;
  }

  // False, and nothing is done, where the vector is another one than they were made for.
  bool move(const Tensor& met) const {
    if (!usable(met.scalar_type()) || !plain(met, met.scalar_type())) return false;
    for (const Row& row : rows_)
      if (row.at + 2 * row.channels > met.numel()) return false;
    met.scalar_type() == at::kDouble ? move_all<double>(met) : move_all<float>(met);
    return true;
  }

 private:
  static bool plain(const Tensor& tensor, at::ScalarType dtype) {
    return tensor.defined() && is_plain(tensor) && tensor.is_cpu() && tensor.layout() == at::kStrided &&
           tensor.scalar_type() == dtype && tensor.is_contiguous() && !tensor.is_inference();
  }

  template <class A>
  void move_all(const Tensor& met) const {
    const A* from = met.const_data_ptr<A>();
    for (const Row& row : rows_) {
      lerp(row, row.mean, from + row.at, A(1));
      lerp(row, row.variance, from + row.at + row.channels, static_cast<A>(row.unbiased));
      *row.count.mutable_data_ptr<int64_t>() += 1;
      row.count.unsafeGetTensorImpl()->bump_version();
    }
  }

  // Its version stays, as PyTorch's kernels leave it: the graph of an earlier call that was left to PyTorch has saved
  // the statistics, and would refuse its backward, which does not read them in training mode.
  template <class A>
  static void lerp(const Row& row, const Tensor& running, const A* now, A scale) {
    move_running(running.mutable_data_ptr<A>(), now, scale, row.factor, row.channels);
  }

  std::vector<Row> rows_;
};

}  // namespace fastode

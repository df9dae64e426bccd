// Whole blocks on resident samples, recorded as a few sweeps of a branch. A program reads `input` and `cotangent` and
// leaves its answer in `result`, which lies where it should in the end and which it may use as scratch before. Where
// the memory has a place for what is kept, a forward program leaves some of its evaluations there, and the backward
// one, made with the same pieces, finds them instead of computing them again.
#pragma once

#include "branch.h"

namespace fastode::resident {

// What a program is asked for beside its result: gradients of the parameters; statistics of batch norms, evaluation by
// evaluation; and per part of the batch the inner products that make up the gradient of a scheme's coefficients [2,
// stages, stages].
template <class T>
struct Wishes {
  using A = Number<T>;
  bool parameters = false;
  A* statistics = nullptr;
  int64_t statistics_stride = 0;
  double* products = nullptr;
  int64_t products_stride = 0;

  A* statistics_of(int64_t evaluation) const {
    return statistics ? statistics + evaluation * statistics_stride : nullptr;
  }
};

// Where a program's input and output lie.
template <class A>
struct Ends {
  Map<A> input, cotangent, result;
};

}  // namespace fastode::resident

// The resident operators on the test machine: the schemas of csrc/ops.cpp in a namespace of their own, for CPU tensors.
// tests/simulator.py defines those that an implementation here names. Each file of this folder is a unit that is
// compiled by itself, so the programs of csrc/cuda have one each.
#include "operators.h"

namespace fastode::cuda {

void* stream_of(const Tensor&) { return nullptr; }

}  // namespace fastode::cuda

STABLE_TORCH_LIBRARY_IMPL(fastode_simt, CPU, m) { fastode::cuda::implement(m); }

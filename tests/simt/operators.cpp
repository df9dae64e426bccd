// The resident operators on the test machine: the schemas of csrc/ops.cpp in a namespace of their own, for CPU tensors.
// tests/simulator.py defines those that an implementation here names. Each file of this folder is a unit that is
// compiled by itself, so the programs of csrc/cuda have one each.
#include "operators.h"

#include <cstring>

#include "control.h"

namespace fastode::cuda {

Queue queue_of(const Tensor&) { return {device::simt::blocks_at_a_time(), nullptr}; }

// Here both read all memory: tables of two stages are read by the programs, as if learned, and the others by the host.
bool on_card(const Tensor& table) { return table.size(1) == 2; }

void unset(void* begin, int64_t bytes) {
  if (bytes > 0) std::memset(begin, 0xff, static_cast<size_t>(bytes));
}

}  // namespace fastode::cuda

STABLE_TORCH_LIBRARY_IMPL(fastode_simt, CPU, m) { fastode::cuda::implement(m); }

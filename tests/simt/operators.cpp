// The resident operators on the test machine: the schemas of csrc/ops.cpp in a namespace of their own, for CPU tensors.
// tests/simulator.py defines those that an m.impl here names. Each file of this folder is a unit that is compiled by
// itself, so kernels of csrc/cuda had better be included by several.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(fastode_simt, CPU, m) { static_cast<void>(m); }

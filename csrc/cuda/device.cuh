// What device code may use of the machine: the same names for nvcc and, in tests, for a simulator on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastode::device {

// How a program is launched.
struct Launch {
  int blocks;
  int threads;
  size_t shared_bytes;
  int cluster = 1;
  bool cooperative = false;
  void* stream = nullptr;
};

// Two 16-bit floats of one word, the lower half first.
struct Pair {
  float low, high;
};

}  // namespace fastode::device

#ifdef __CUDACC__
#include "device_nvcc.cuh"
#else
#include "simt.h"
#endif

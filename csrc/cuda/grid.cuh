// The barrier of a whole grid, in a cooperative launch: grid_barrier(). Apart from device.cuh, because under nvcc its
// header takes four seconds to read, and few programs need it.
#pragma once

#include "device.cuh"

#ifdef __CUDACC__
#include <cooperative_groups.h>

namespace fastode::device {

// The driver has its counter, so that launches at the same time, and replays of a graph, need none of their own.
FASTODE_DEVICE void grid_barrier() { cooperative_groups::this_grid().sync(); }

}  // namespace fastode::device
#endif

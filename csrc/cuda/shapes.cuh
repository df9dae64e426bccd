// The maps for which programs are compiled, and the launch of one.
#pragma once

#include <algorithm>

#include "branch.cuh"

namespace fastode::device {

inline constexpr size_t kMostShared = 227 * 1024;  // bytes that a block can have, from sm_90 on

// Calls f<Tile>() for a shape, or not at all.
template <class T, class F>
void with_tile(cuda::Shape shape, const F& f) {
#define FASTODE_TILE(channels_, side_, warps, units)                                           \
  static_assert(Memory<Tile<T, channels_, side_, warps>>::bytes(units) <= kMostShared);        \
  if (shape.channels == channels_ && shape.side == side_) f.template operator()<Tile<T, channels_, side_, warps>>();
  FASTODE_TILES(FASTODE_TILE)
#undef FASTODE_TILE
}

// Launches Program<Tile> with a block for each sample, but no more than run at a time: a block reads all parameters.
template <template <class> class Program, class T, class Call>
const char* launch_program(cuda::Shape shape, const Call& call, const cuda::Queue& queue) {
  const CurrentDevice here(queue.device);
  const char* reason = "there is no program for such maps";
  with_tile<T>(shape, [&]<class Tile>() {
    const size_t bytes = Memory<Tile>::bytes(call.branch.count);
    Launch how{call.samples, Tile::kThreads, bytes, 1, false, queue.stream, queue.device};
    const int most = most_blocks<Program<Tile>, Call>(how);
    if (most > 0) how.blocks = std::min(how.blocks, most);
    reason = launch<Program<Tile>>(how, call);
  });
  return reason;
}

template <template <class> class Program, class Call>
const char* launch_program(cuda::Type type, cuda::Shape shape, const Call& call, const cuda::Queue& queue) {
  return type == cuda::Type::kBFloat16 ? launch_program<Program, BFloat16>(shape, call, queue)
                                       : launch_program<Program, Float16>(shape, call, queue);
}

}  // namespace fastode::device

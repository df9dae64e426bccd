// The maps for which programs are compiled.
#pragma once

#include "branch.cuh"

namespace fastode::device {

// Calls f<Tile>() for a shape, or not at all; true if it did.
template <class T, class F>
bool with_tile(cuda::Shape shape, const F& f) {
  const auto is = [&](int channels, int side) { return shape.channels == channels && shape.side == side; };
  if (is(16, 32)) return f.template operator()<Tile<T, 16, 32, 8>>(), true;
  if (is(16, 16)) return f.template operator()<Tile<T, 16, 16, 8>>(), true;
  if (is(16, 8)) return f.template operator()<Tile<T, 16, 8, 4>>(), true;
  if (is(32, 16)) return f.template operator()<Tile<T, 32, 16, 8>>(), true;
  if (is(32, 8)) return f.template operator()<Tile<T, 32, 8, 8>>(), true;
  if (is(64, 16)) return f.template operator()<Tile<T, 64, 16, 8>>(), true;
  if (is(64, 8)) return f.template operator()<Tile<T, 64, 8, 8>>(), true;
  return false;
}

// Launches Program<Tile> with a block for each sample, as many as there are.
template <template <class> class Program, class T, class Call>
const char* launch_program(cuda::Shape shape, const Call& call, void* stream) {
  const char* reason = "there is no program for such maps";
  with_tile<T>(shape, [&]<class Tile>() {
    const size_t bytes = Memory<Tile>::bytes(call.branch.count);
    reason = launch<Program<Tile>>(Launch{call.samples, Tile::kThreads, bytes, 1, false, stream}, call);
  });
  return reason;
}

template <template <class> class Program, class Call>
const char* launch_program(cuda::Type type, cuda::Shape shape, const Call& call, void* stream) {
  return type == cuda::Type::kBFloat16 ? launch_program<Program, BFloat16>(shape, call, stream)
                                       : launch_program<Program, Float16>(shape, call, stream);
}

}  // namespace fastode::device

// The cooperative launch of a program for branches with batch norms in training.
#pragma once

#include "batch.cuh"
#include "shapes.cuh"

namespace fastode::device {

// Calls f<Program<Tile>>() with the launch for such maps, whose blocks are all there at once.
template <template <class> class Program, class Call, class F>
void plan_coupled(cuda::Type type, cuda::Shape shape, int samples, int units, const cuda::Queue& queue, const F& f) {
  if (type != cuda::Type::kBFloat16) return;
  const CurrentDevice here(queue.device);
  with_tile<BFloat16>(shape, [&]<class Tile>() {
    Launch how = plan<Program<Tile>, Call>(samples, Memory<Tile>::bytes(units, units), queue);
    how.cooperative = true;
    f.template operator()<Program<Tile>>(how);
  });
}

template <template <class> class Program, class Call>
const char* launch_coupled(cuda::Type type, cuda::Shape shape, const Call& call, int samples, int units,
                           const cuda::Queue& queue) {
  const char* reason = kNoProgram;
  plan_coupled<Program, Call>(type, shape, samples, units, queue,
                              [&]<class P>(const Launch& how) { reason = launch<P>(how, call); });
  return reason;
}

// How many blocks that launch has.
template <template <class> class Program, class Call>
int coupled_blocks(cuda::Type type, cuda::Shape shape, int samples, int units, const cuda::Queue& queue) {
  int blocks = 0;
  plan_coupled<Program, Call>(type, shape, samples, units, queue,
                              [&]<class P>(const Launch& how) { blocks = how.blocks; });
  return blocks;
}

}  // namespace fastode::device

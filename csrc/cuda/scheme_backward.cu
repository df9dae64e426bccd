#include "scheme.cuh"
#include "shapes.cuh"

namespace fastode::cuda {

const char* scheme_backward(Type type, Shape shape, const BackwardCall& call, const Queue& queue) {
  const SchemeCall& scheme = call.scheme;
  return device::launch_by_sample<device::SchemeBackward>(type, shape, call, scheme.samples, scheme.branch.count,
                                                          queue);
}

int scheme_backward_blocks(Type type, Shape shape, const BackwardCall& call, const Queue& queue) {
  const device::CurrentDevice here(queue.device);
  const int units = call.scheme.branch.count;
  int blocks = 0;
  device::with_tile(type, shape, [&]<class Tile>() {
    const size_t bytes = device::Memory<Tile>::bytes(units, units);
    blocks = device::plan<device::SchemeBackward<Tile>, BackwardCall>(call.scheme.samples, bytes, queue).blocks;
  });
  return blocks;
}

}  // namespace fastode::cuda

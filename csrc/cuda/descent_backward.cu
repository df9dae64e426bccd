#include "descent.cuh"
#include "shapes.cuh"

namespace fastode::cuda {

const char* descent_backward(Type type, Shape shape, const DescentCall& call, const Queue& queue) {
  return device::launch_by_sample<device::DescentBackward>(type, shape, call, call.samples, call.branch.count, queue);
}

int descent_backward_blocks(Type type, Shape shape, const DescentCall& call, const Queue& queue) {
  const device::CurrentDevice here(queue.device);
  const int units = call.branch.count;
  int blocks = 0;
  device::with_tile(type, shape, [&]<class Tile>() {
    const size_t bytes = device::Memory<Tile>::bytes(units, units);
    blocks = device::plan<device::DescentBackward<Tile>, DescentCall>(call.samples, bytes, queue).blocks;
  });
  return blocks;
}

}  // namespace fastode::cuda

#include "batch_descent.cuh"
#include "batch_shapes.cuh"

namespace fastode::cuda {

const char* batch_descent_backward(Type type, Shape shape, const DescentCall& call, const Queue& queue) {
  return device::launch_coupled<device::BatchDescentBackward>(type, shape, call, call.samples, call.branch.count,
                                                              queue);
}

int batch_descent_backward_blocks(Type type, Shape shape, const DescentCall& call, const Queue& queue) {
  return device::coupled_blocks<device::BatchDescentBackward, DescentCall>(type, shape, call.samples, call.branch.count,
                                                                           queue);
}

}  // namespace fastode::cuda

#include "batch_descent.cuh"
#include "shapes.cuh"

namespace fastode::cuda {

const char* batch_descent_backward(Type type, Shape shape, const DescentCall& call, const Queue& queue) {
  return device::launch_by_sample<device::BatchDescentBackward>(type, shape, call, call.samples, call.branch.count,
                                                                queue);
}

int batch_descent_backward_blocks(Type type, Shape shape, const DescentCall& call, const Queue& queue) {
  return device::blocks_by_sample<device::BatchDescentBackward, DescentCall>(type, shape, call.samples,
                                                                             call.branch.count, queue);
}

}  // namespace fastode::cuda

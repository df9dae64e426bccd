#include "batch_descent.cuh"
#include "shapes.cuh"

namespace fastode::cuda {

const char* batch_descent_forward(Type type, Shape shape, const DescentCall& call, const Queue& queue) {
  return device::launch_by_sample<device::BatchDescentForward>(type, shape, call, call.samples, call.branch.count,
                                                               queue);
}

}  // namespace fastode::cuda

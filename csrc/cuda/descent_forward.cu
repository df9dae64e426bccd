#include "descent.cuh"
#include "shapes.cuh"

namespace fastode::cuda {

const char* descent_forward(Type type, Shape shape, const DescentCall& call, const Queue& queue) {
  return device::launch_by_sample<device::DescentForward>(type, shape, call, call.samples, call.branch.count, queue);
}

}  // namespace fastode::cuda

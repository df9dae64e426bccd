#include "descent.cuh"
#include "shapes.cuh"

namespace fastode::cuda {

const char* descent_forward(Type type, Shape shape, const DescentCall& call, const Queue& queue) {
  return device::launch_program<device::DescentForward>(type, shape, call, queue);
}

}  // namespace fastode::cuda

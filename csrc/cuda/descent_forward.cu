#include "descent.cuh"
#include "shapes.cuh"

namespace fastode::cuda {

const char* descent_forward(Type type, Shape shape, const DescentCall& call, void* stream) {
  return device::launch_program<device::DescentForward>(type, shape, call, stream);
}

}  // namespace fastode::cuda

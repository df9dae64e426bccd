#include "scheme.cuh"
#include "shapes.cuh"

namespace fastode::cuda {

const char* scheme_backward(Type type, Shape shape, const SchemeCall& call, const Queue& queue) {
  return device::launch_program<device::SchemeBackward>(type, shape, call, queue);
}

}  // namespace fastode::cuda

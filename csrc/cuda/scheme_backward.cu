#include "scheme.cuh"
#include "shapes.cuh"

namespace fastode::cuda {

const char* scheme_backward(Type type, Shape shape, const SchemeCall& call, void* stream) {
  return device::launch_program<device::SchemeBackward>(type, shape, call, stream);
}

}  // namespace fastode::cuda

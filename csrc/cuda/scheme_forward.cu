#include "scheme.cuh"
#include "shapes.cuh"

namespace fastode::cuda {

const char* scheme_forward(Type type, Shape shape, const SchemeCall& call, const Queue& queue) {
  return device::launch_by_sample<device::SchemeForward>(type, shape, call, call.samples, call.branch.count, queue);
}

}  // namespace fastode::cuda

#include "march.cuh"
#include "shapes.cuh"

namespace fastode::cuda {

const char* march_forward(Type type, Shape shape, const MarchCall& call, const Queue& queue) {
  return device::launch_by_sample<device::MarchForward>(type, shape, call, call.samples, kPairNorms, queue);
}

}  // namespace fastode::cuda

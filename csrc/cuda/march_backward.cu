#include "march.cuh"
#include "shapes.cuh"

namespace fastode::cuda {

const char* march_backward(Type type, Shape shape, const MarchBackCall& call, const Queue& queue) {
  return device::launch_by_sample<device::MarchBackward>(type, shape, call, call.march.samples, kPairNorms, queue);
}

int march_backward_blocks(Type type, Shape shape, const MarchBackCall& call, const Queue& queue) {
  return device::blocks_by_sample<device::MarchBackward, MarchBackCall>(type, shape, call.march.samples, kPairNorms,
                                                                        queue);
}

}  // namespace fastode::cuda

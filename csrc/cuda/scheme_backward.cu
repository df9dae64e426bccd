#include "scheme.cuh"
#include "shapes.cuh"

namespace fastode::cuda {

const char* scheme_backward(Type type, Shape shape, const BackwardCall& call, const Queue& queue) {
  const SchemeCall& scheme = call.scheme;
  return device::launch_by_sample<device::SchemeBackward>(type, shape, call, scheme.samples, scheme.branch.count,
                                                          queue);
}

int scheme_backward_blocks(Type type, Shape shape, const BackwardCall& call, const Queue& queue) {
  const SchemeCall& scheme = call.scheme;
  return device::blocks_by_sample<device::SchemeBackward, BackwardCall>(type, shape, scheme.samples,
                                                                        scheme.branch.count, queue);
}

}  // namespace fastode::cuda

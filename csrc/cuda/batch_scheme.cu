#include "batch_scheme.cuh"
#include "shapes.cuh"

namespace fastode::cuda {

const char* batch_scheme_forward(Type type, Shape shape, const SchemeCall& call, const Queue& queue) {
  return device::launch_by_sample<device::BatchSchemeForward>(type, shape, call, call.samples, call.branch.count,
                                                              queue);
}

const char* batch_scheme_backward(Type type, Shape shape, const BackwardCall& call, const Queue& queue) {
  const SchemeCall& scheme = call.scheme;
  return device::launch_by_sample<device::BatchSchemeBackward>(type, shape, call, scheme.samples, scheme.branch.count,
                                                               queue);
}

int batch_scheme_backward_blocks(Type type, Shape shape, const BackwardCall& call, const Queue& queue) {
  const SchemeCall& scheme = call.scheme;
  return device::blocks_by_sample<device::BatchSchemeBackward, BackwardCall>(type, shape, scheme.samples,
                                                                             scheme.branch.count, queue);
}

}  // namespace fastode::cuda

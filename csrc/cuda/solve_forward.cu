#include "shapes.cuh"
#include "solve.cuh"

namespace fastode::cuda {

const char* solve_forward(Type type, Shape shape, const SolveCall& call, const Queue& queue) {
  const device::CurrentDevice here(queue.device);
  const char* reason = device::kNoProgram;
  device::with_tile(type, shape, [&]<class Tile>() {
    using Program = device::SolveForward<Tile>;
    device::Launch how = device::plan<Program, SolveCall>(call.samples, Program::bytes(kPairNorms), queue);
    how.cooperative = !call.alone;
    reason = device::launch<Program>(how, call);
  });
  return reason;
}

}  // namespace fastode::cuda

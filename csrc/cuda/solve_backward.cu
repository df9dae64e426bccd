#include "shapes.cuh"
#include "solve_backward.cuh"

namespace fastode::cuda {

namespace {

// Calls f<Program>() with its launch.
template <class F>
void with_launch(Type type, Shape shape, const SolveBackCall& call, const Queue& queue, const F& f) {
  const device::CurrentDevice here(queue.device);
  device::with_tile(type, shape, [&]<class Tile>() {
    using Program = device::SolveBackward<Tile>;
    device::Launch how = device::plan<Program, SolveBackCall>(call.solve.samples, Program::bytes(kPairNorms), queue);
    how.cooperative = call.through && !call.solve.alone;
    f.template operator()<Program>(how);
  });
}

}  // namespace

const char* solve_backward(Type type, Shape shape, const SolveBackCall& call, const Queue& queue) {
  const char* reason = device::kNoProgram;
  with_launch(type, shape, call, queue,
              [&]<class Program>(const device::Launch& how) { reason = device::launch<Program>(how, call); });
  return reason;
}

int solve_backward_blocks(Type type, Shape shape, const SolveBackCall& call, const Queue& queue) {
  int blocks = 0;
  with_launch(type, shape, call, queue, [&]<class Program>(const device::Launch& how) { blocks = how.blocks; });
  return blocks;
}

}  // namespace fastode::cuda

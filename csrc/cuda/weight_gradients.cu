#include "shapes.cuh"
#include "weights.cuh"

namespace fastode::cuda {

namespace {

// As many blocks for each unit.
template <class Tile>
device::Launch plan_of(const WeightsCall& call, const Queue& queue) {
  using Program = device::WeightGradients<Tile>;
  const int units = call.branch.count;
  device::Launch how = device::plan<Program, WeightsCall>(Program::most_items(call), Program::bytes(units), queue);
  how.blocks = std::max(1, how.blocks / units) * units;
  how.cooperative = true;
  return how;
}

}  // namespace

const char* weight_gradients(Type type, Shape shape, const WeightsCall& call, const Queue& queue) {
  const device::CurrentDevice here(queue.device);
  const char* reason = device::kNoProgram;
  device::with_tile(type, shape, [&]<class Tile>() {
    device::Launch how = plan_of<Tile>(call, queue);
    how.blocks = call.blocks;
    reason = device::launch<device::WeightGradients<Tile>>(how, call);
  });
  return reason;
}

int weight_gradients_blocks(Type type, Shape shape, const WeightsCall& call, const Queue& queue) {
  const device::CurrentDevice here(queue.device);
  int blocks = 0;
  device::with_tile(type, shape, [&]<class Tile>() { blocks = plan_of<Tile>(call, queue).blocks; });
  return blocks;
}

const char* finish_gradients(Type type, Shape, const FinishCall& call, const Queue& queue) {
  const device::CurrentDevice here(queue.device);
  const char* reason = nullptr;
  device::with_type(type, [&]<class T>() {
    using Program = device::FinishGradients<T>;
    const int blocks = (Program::entries(call) + Program::kAcross - 1) / Program::kAcross;
    const device::Launch how{blocks, Program::threads, Program::bytes(), 1, false, queue.stream, queue.device};
    reason = device::launch<Program>(how, call);
  });
  return reason;
}

}  // namespace fastode::cuda

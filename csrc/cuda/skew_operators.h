// The resident operators of the skew pair over the programs: its solution by equal steps, forwards.
#pragma once

#include <tuple>

#include "calls.h"

namespace fastode::cuda {

// `integers` and `numbers` as csrc/cpu/resident/skew_engine.h describes them.
inline Pair pair_of(const Tensors& parameters, const Integers& integers, const Numbers& numbers) {
  Pair pair{};
  pair.activation = static_cast<int>(integers[1]);
  pair.gamma = static_cast<float>(numbers[0]);
  pair.p = static_cast<float>(numbers[1]), pair.q = static_cast<float>(numbers[2]);
  pair.weight = parameters[0].data_ptr();
  const auto strides = parameters[0].strides();
  for (int d = 0; d < 4; ++d) pair.weight_strides[d] = strides[d];
  size_t next = 1;
  for (int which = 0; which < kPairNorms; ++which) {
    const int64_t* given = &integers[2 + 3 * which];
    const auto take = [&](int64_t bit) -> Vector {
      if (!(given[2] & bit)) return {nullptr, 0};
      const Tensor& found = parameters[next++];
      return {found.data_ptr(), found.strides()[0]};
    };
    PairNorm& norm = pair.norm[which];
    norm.mode = static_cast<int>(given[0]), norm.groups = static_cast<int>(given[1]);
    norm.eps = static_cast<float>(numbers[3 + which]);
    norm.weight = take(resident::kWeight), norm.bias = take(resident::kBias);
    norm.mean = take(resident::kRunning), norm.variance = take(resident::kRunning);
  }
  return pair;
}

// `table`: the scheme's rows, then its weights, times the step; `given`: [steps][stages][2], whether the result depends
// on ẏ and on ż. Towards the end fewer do: the steps before use the same ones, as do the last ones.
inline void read_march(MarchCall& call, const Numbers& table, int64_t steps, const Integers& given) {
  const int stages = static_cast<int>(given.size() / (2 * static_cast<size_t>(steps)));
  if (stages > kMostStages) throw std::runtime_error("a scheme has more stages than the programs take");
  call.stages = stages, call.steps = static_cast<int>(steps);
  for (int i = 0; i <= stages; ++i)
    for (int j = 0; j < stages; ++j) call.table[i][j] = static_cast<float>(table[static_cast<size_t>(i * stages + j)]);
  const auto used = [&](int64_t step) {
    Used found{0, 0};
    for (int i = 0; i < stages; ++i) {
      const int64_t* both = &given[static_cast<size_t>(2 * (step * stages + i))];
      found.y |= static_cast<uint32_t>(both[0] != 0) << i, found.z |= static_cast<uint32_t>(both[1] != 0) << i;
    }
    return found;
  };
  const auto same = [](const Used& one, const Used& other) { return one.y == other.y && one.z == other.z; };
  call.used[0] = used(0), call.used[1] = used(steps - 1);
  call.turn = call.steps - 1;
  while (call.turn > 0 && same(used(call.turn - 1), call.used[1])) --call.turn;
  for (int step = 0; step < call.turn; ++step)
    if (!same(used(step), call.used[0])) throw std::runtime_error("steps before the last use slopes of their own");
}

inline std::tuple<Tensor, Tensors> solve_forward(const Tensor& x, const Tensors& parameters, const Integers& integers,
                                                 const Numbers& numbers, const Numbers& table, int64_t steps,
                                                 const Integers& used, bool, bool last) {
  const Tensor y = new_map(x, last);
  MarchCall call{};
  call.samples = static_cast<int>(x.size(0));
  call.pair = pair_of(parameters, integers, numbers);
  call.x = map_of(x), call.result = map_of(y);
  read_march(call, table, steps, used);
  const int places = 4 + 2 * call.stages;
  const Store own(x, places, 0);
  call.room = {own.at(), nullptr, places, x.size(0)};
  launched(cuda::march_forward(type_of(x), shape_of(x), call, queue_of(x)));
  return {y, {}};
}

}  // namespace fastode::cuda

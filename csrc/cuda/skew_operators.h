// The resident operators of the skew pair over the programs: its solution by equal steps, forwards and backwards.
#pragma once

#include <algorithm>
#include <tuple>

#include "calls.h"

namespace fastode::cuda {

// `integers` and `numbers` as csrc/cpu/resident/skew_engine.h describes them.
inline Pair pair_of(const Tensors& parameters, const Integers& integers, const Numbers& numbers) {
  Pair pair{};
  pair.stride = static_cast<int>(integers[0]);
  for (int half = 0; half < 2; ++half) pair.channels[half] = static_cast<int>(parameters[0].size(half));
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

// The programs' maps in which a pair's lie: the narrowest there are.
inline Shape shape_of(const Tensor& x, const Pair& pair) {
  const int least = std::max(pair.channels[0], pair.channels[1] * pair.stride * pair.stride);
  Shape shape{16, static_cast<int>(x.size(2)) / pair.stride};
  while (shape.channels < kMostMapChannels && (shape.channels < least || kept_bytes(shape) == 0)) shape.channels += 16;
  return shape;
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
  for (int group = 0; group < 2; ++group) {
    int count = 0;
    for (int i = 0; i < stages; ++i) {
      call.before[group][i] = count;
      count += static_cast<int>((call.used[group].y >> i & 1) + (call.used[group].z >> i & 1));
    }
    call.width[group] = count;
  }
}

// How many slopes a solution uses.
inline int slopes_of(const MarchCall& call) {
  return call.turn * call.width[0] + (call.steps - call.turn) * call.width[1];
}

// A solution as `read_march` has read it; `keep`: with places for what a backward reads.
inline MarchCall march_call(const Tensor& x, const Tensor& result, const Tensors& parameters, const Integers& integers,
                            const Numbers& numbers, const Numbers& table, int64_t steps, const Integers& used,
                            bool keep) {
  MarchCall call{};
  call.samples = static_cast<int>(x.size(0));
  call.pair = pair_of(parameters, integers, numbers);
  call.x = map_of(x), call.result = map_of(result);
  read_march(call, table, steps, used);
  call.room.samples = x.size(0);
  call.room.split = keep ? slopes_of(call) + 2 * (call.steps - 1) : 0;
  return call;
}

inline std::tuple<Tensor, Tensors> march_solution(const Tensor& x, const Tensors& parameters, const Integers& integers,
                                                  const Numbers& numbers, const Numbers& table, int64_t steps,
                                                  const Integers& used, int64_t keep, bool last) {
  const int64_t stride = integers[0];
  const Tensor y = new_map(x, parameters[0].size(0), x.size(2) / stride, x.size(3) / stride, last);
  MarchCall call = march_call(x, y, parameters, integers, numbers, table, steps, used, keep);
  const Shape shape = shape_of(x, call.pair);
  const int places = call.room.split;
  const int64_t evaluations = static_cast<int64_t>(call.steps) * call.stages;
  const Store kept(x, shape, places, keep ? 2 * kPairNorms * evaluations * x.size(0) * shape.channels : 0);
  const Store own(x, shape, 4 + 2 * call.stages, 0);
  call.room.kept = kept.at(), call.room.own = own.at();
  call.statistics = keep ? kept.numbers(x, shape, places) : nullptr;
  launched(cuda::march_forward(type_of(x), shape, call, queue_of(x)));
  return {y, keep ? Tensors{kept.tensor} : Tensors{}};
}

// What adds up the shares of so many blocks, but for those of W.
inline FinishCall finish_of(const Pair& pair, Shape shape, bool weight, bool norms, const float* sums, int64_t rows) {
  return {weight,
          norms ? kPairNorms : 0,
          shape.channels,
          pair.stride,
          {pair.channels[0], pair.channels[1]},
          {},
          sums,
          static_cast<int>(rows),
          {},
          nullptr,
          nullptr};
}

// The gradients of W and of the norms' parameters, as far as they are asked for, and the others empty. `finish` gets
// where those of the norms go, and W's.
inline Tensors new_pair_gradients(const Tensors& parameters, const Integers& integers, bool weight, bool norms,
                                  FinishCall& finish) {
  Tensors bars;
  const auto add = [&](bool asked) -> void* {
    const Tensor& p = parameters[bars.size()];
    bars.push_back(asked ? new_gradient(p) : new_vector(p, 0, p.scalar_type()));
    return asked ? bars.back().data_ptr() : nullptr;
  };
  finish.unit[0].weight = add(weight);
  for (int which = 0; which < kPairNorms; ++which) {
    const int64_t bits = integers[4 + 3 * which];
    UnitGradients& norm = finish.unit[which];
    if (bits & resident::kWeight) norm.norm_weight = add(norms);
    if (bits & resident::kBias) norm.norm_bias = add(norms);
    for (int i = 0; bits & resident::kRunning && i < 2; ++i) add(false);
  }
  return bars;
}

// The gradients of x and, where they are asked for, of W and of the norms' parameters.
inline Gradients march_gradients(const Tensor& x, const Tensor& cotangent, const Tensors& kept_pieces,
                                 const Tensors& parameters, const Integers& integers, const Numbers& numbers,
                                 const Numbers& table, int64_t steps, const Integers& used, bool weight, bool norms) {
  Tensors pieces = kept_pieces;
  if (pieces.empty())
    pieces = std::get<1>(march_solution(x, parameters, integers, numbers, table, steps, used, true, false));
  const Store kept(pieces[0]);
  const Tensor bar = new_map_like(x);
  MarchBackCall call{};
  MarchCall& march = call.march = march_call(x, bar, parameters, integers, numbers, table, steps, used, true);
  const Shape shape = shape_of(x, march.pair);
  march.statistics = kept.numbers(x, shape, march.room.split);
  call.cotangent = map_of(cotangent);
  const PairNorm* norm = march.pair.norm;
  call.points = weight || norms || norm[0].mode == kGroupNorm || norm[1].mode == kGroupNorm;
  const int scratch = 6 + 2 * march.stages, slopes = slopes_of(march);
  call.products = weight ? march.room.split + scratch : -1;
  const int rows = norms ? march_backward_blocks(type_of(x), shape, call, queue_of(x)) : 0;
  const int slots = scratch + (weight ? 2 * slopes : 0);
  const int64_t sums = static_cast<int64_t>(rows) * kPairNorms * 2 * shape.channels;
  const Store own(x, shape, slots, sums + (weight ? 4 * slopes * x.size(0) * shape.channels : 0));
  march.room.kept = kept.at(), march.room.own = own.at();
  call.sums = norms ? own.numbers(x, shape, slots) : nullptr;
  call.plain = own.numbers(x, shape, slots) + sums;
  launched(cuda::march_backward(type_of(x), shape, call, queue_of(x)));
  FinishCall finish = finish_of(march.pair, shape, weight, norms, call.sums, rows);
  Tensors bars = new_pair_gradients(parameters, integers, weight, norms, finish);
  if (!weight && !norms) return {bar, bars};
  Tensor made;
  if (weight) {
    // Of a unit without a norm and an activation; the maps of all slopes lie behind each other, as those of samples do.
    WeightsCall products{march.samples * slopes, 1, 0, {}, march.room, {}, {}};
    products.branch.count = 1, products.branch.unit[0].groups = 1, products.branch.statistics = call.plain;
    products.product[0] = {0, 0, {call.products}, {-1}, {call.products + slopes}, {1}};
    made = make_products(x, shape, products, finish, {own.at(), Store::maps(x, shape, slots)});
  }
  launched(finish_gradients(type_of(x), shape, finish, queue_of(x)));
  return {bar, bars};
}

}  // namespace fastode::cuda

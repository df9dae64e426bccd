// The resident operator of the skew pair's solution with steps by error, over the programs.
#pragma once

#include <algorithm>
#include <tuple>

#include "../step_control.h"
#include "skew_operators.h"

namespace fastode::cuda {

// `limits` has two numbers more than on the CPU: of how many attempts the log is to have room, and of how many steps a
// backward is to know the sizes; one of each at least.
inline void read_solver(SolveCall& call, const Numbers& table, const Numbers& solver, const Integers& limits,
                        bool per_sample) {
  const resident::Embedded scheme = resident::embedded_of(table, solver, limits);
  if (scheme.stages > kMostStages) throw std::runtime_error("a scheme has more stages than the programs take");
  const int stages = call.stages = static_cast<int>(scheme.stages);
  for (int i = 0; i < stages; ++i) {
    call.b[i] = scheme.b[i], call.error[i] = scheme.error[i], call.middle[i] = scheme.middle[i];
    for (int j = 0; j < stages; ++j) call.table[i][j] = static_cast<float>(scheme.a[i * stages + j]);
  }
  call.ends_in_solution = scheme.ends_in_solution, call.alone = per_sample;
  call.rtol = scheme.rtol, call.atol = scheme.atol, call.t1 = scheme.t1, call.first_step = scheme.first_step;
  call.order = scheme.order, call.most = scheme.most;
  call.logged = std::max<int64_t>(limits.at(4), 1), call.most_taken = std::max<int64_t>(limits.at(5), 1);
}

// What a solve keeps for its backward: maps, then what it did, then the sizes of its steps.
inline void place_kept(SolveCall& call, const Tensor& x, Shape shape, const Store& kept) {
  call.room.kept = kept.at(), call.room.split = 4 * kSolveSlots;
  call.taken = reinterpret_cast<SolveTaken*>(kept.numbers(x, shape, call.room.split));
  call.sizes = reinterpret_cast<float*>(call.taken + (call.alone ? call.samples : 1));
}

// A solve as it is asked for, of x and its result or of their cotangents.
inline SolveCall solve_call(const Tensor& x, const Tensor& result, const Tensors& parameters, const Integers& integers,
                            const Numbers& numbers, const Numbers& table, const Numbers& solver, const Integers& limits,
                            bool per_sample) {
  SolveCall call{};
  call.samples = static_cast<int>(x.size(0));
  call.pair = pair_of(parameters, integers, numbers);
  call.x = map_of(x), call.result = map_of(result);
  call.room.samples = call.samples;
  read_solver(call, table, solver, limits, per_sample);
  return call;
}

inline void refuse_exact(int64_t through) {
  if (through > 1) throw std::runtime_error("there is no program for a derivative through every step's size");
}

// Nothing is read back: a solve that does not reach t₁ leaves NaN, and its log says why.
inline std::tuple<Tensor, Tensor, Tensors> solve_solution(const Tensor& x, const Tensors& parameters,
                                                          const Integers& integers, const Numbers& numbers,
                                                          const Numbers& table, const Numbers& solver,
                                                          const Integers& limits, bool per_sample, int64_t keep,
                                                          int64_t through, bool raises) {
  refuse_exact(through);
  const int64_t stride = integers[0], samples = x.size(0), solves = per_sample ? samples : 1;
  const Tensor y = new_map(x, parameters[0].size(0), x.size(2) / stride, x.size(3) / stride, false);
  SolveCall call = solve_call(x, y, parameters, integers, numbers, table, solver, limits, per_sample);
  const int64_t each = resident::kLogHead + call.logged * resident::kLogEach;
  const Tensor log = new_vector(x, raises ? 0 : solves * each, ScalarType::Double);
  call.log = raises ? nullptr : static_cast<double*>(log.data_ptr());
  const Shape shape = shape_of(x, call.pair);
  Tensors pieces;
  if (keep) {
    const int64_t numbers_each = static_cast<int64_t>(sizeof(SolveTaken) / sizeof(float)) + call.most_taken;
    const Store kept(x, shape, 4 * kSolveSlots, solves * numbers_each);
    place_kept(call, x, shape, kept);
    pieces.push_back(kept.tensor);
  }
  const int places = 6 + 2 * call.stages;
  const Store own(x, shape, places, 2 * samples * kSolveSums);
  call.room.own = own.at();
  call.exchange = own.numbers(x, shape, places);
  launched(cuda::solve_forward(type_of(x), shape, call, queue_of(x)));
  return {y, log, pieces};
}

// The gradients of x and, where they are asked for, of W and of the norms' parameters.
inline Gradients solve_gradients(const Tensor& x, const Tensor& cotangent, const Tensor&, const Tensors& kept_pieces,
                                 const Tensors& parameters, const Integers& integers, const Numbers& numbers,
                                 const Numbers& table, const Numbers& solver, const Integers& limits, bool per_sample,
                                 int64_t through, bool weight, bool norms) {
  refuse_exact(through);
  Tensors pieces = kept_pieces;
  if (pieces.empty())
    pieces = std::get<2>(
        solve_solution(x, parameters, integers, numbers, table, solver, limits, per_sample, true, through, true));
  const Store kept(pieces[0]);
  const Tensor bar = new_map_like(x);
  SolveBackCall call{};
  SolveCall& solve = call.solve;
  solve = solve_call(x, bar, parameters, integers, numbers, table, solver, limits, per_sample);
  const Shape shape = shape_of(x, solve.pair);
  place_kept(solve, x, shape, kept);
  call.cotangent = map_of(cotangent);
  call.through = through == 1 && solve.first_step == 0, call.weight = weight;
  const Queue queue = queue_of(x);
  const int64_t blocks = solve_backward_blocks(type_of(x), shape, call, queue), channels = shape.channels;
  const Store own(x, shape, 4, 2 * x.size(0) * kSolveSums);
  solve.room.own = own.at(), solve.exchange = own.numbers(x, shape, 4);
  // A block's places: those of a step, of what slopes leave, and of the factors of products.
  const int64_t places = 6 + (weight ? 8 : 4) * solve.stages, map = static_cast<int64_t>(kept_bytes(shape));
  const int64_t statistics = 2 * kPairNorms * channels * solve.stages, sums = norms ? 2 * kPairNorms * channels : 0;
  const int64_t products = weight ? (9 * channels + 1) * channels : 0;
  const int64_t floats = (statistics + sums + products) * static_cast<int64_t>(sizeof(float));
  const Store scratch(new_vector(x, blocks * (places * map + floats), ScalarType::Byte));
  unset(scratch.at(), scratch.tensor.size(0));
  call.room = {nullptr, scratch.at(), 0, blocks};
  call.statistics = reinterpret_cast<float*>(scratch.at() + blocks * places * map);
  call.sums = norms ? call.statistics + blocks * statistics : nullptr;
  call.partial = call.statistics + blocks * (statistics + sums);
  launched(cuda::solve_backward(type_of(x), shape, call, queue));
  FinishCall finish = finish_of(solve.pair, shape, weight, norms, call.sums, blocks);
  finish.shares = {call.partial, nullptr, static_cast<int>(blocks), static_cast<int>(blocks)};
  Tensors bars = new_pair_gradients(parameters, integers, weight, norms, finish);
  if (weight || norms) launched(finish_gradients(type_of(x), shape, finish, queue));
  return {bar, bars};
}

}  // namespace fastode::cuda

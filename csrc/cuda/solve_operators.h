// The resident operator of the skew pair's solution with steps by error, over the programs.
#pragma once

#include <tuple>

#include "../step_control.h"
#include "skew_operators.h"

namespace fastode::cuda {

// `limits` may have one number more than on the CPU: of how many attempts the log is to have room, of one at least.
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
  call.logged = limits.size() > 4 && limits[4] > 1 ? limits[4] : 1;
}

// Nothing is read back: a solve that does not reach t₁ leaves NaN, and its log says why.
inline std::tuple<Tensor, Tensor, Tensors> solve_solution(const Tensor& x, const Tensors& parameters,
                                                          const Integers& integers, const Numbers& numbers,
                                                          const Numbers& table, const Numbers& solver,
                                                          const Integers& limits, bool per_sample, bool keep,
                                                          int64_t through, bool raises) {
  if (keep || through != 0)
    throw std::runtime_error("there is no program for the gradients of a solution with steps by error");
  const int64_t stride = integers[0], samples = x.size(0);
  const Tensor y = new_map(x, parameters[0].size(0), x.size(2) / stride, x.size(3) / stride, false);
  SolveCall call{};
  call.samples = static_cast<int>(samples);
  call.pair = pair_of(parameters, integers, numbers);
  call.x = map_of(x), call.result = map_of(y);
  read_solver(call, table, solver, limits, per_sample);
  const int64_t each = resident::kLogHead + call.logged * resident::kLogEach;
  const Tensor log = new_vector(x, raises ? 0 : (per_sample ? samples : 1) * each, ScalarType::Double);
  call.log = raises ? nullptr : static_cast<double*>(log.data_ptr());
  const Shape shape = shape_of(x, call.pair);
  const int places = 6 + 2 * call.stages;
  const Store own(x, shape, places, 2 * samples * kSolveSums);
  call.room.samples = samples, call.room.own = own.at();
  call.exchange = own.numbers(x, shape, places);
  launched(cuda::solve_forward(type_of(x), shape, call, queue_of(x)));
  return {y, log, {}};
}

}  // namespace fastode::cuda

// Included by one .cpp per arithmetic type, which instantiates the programs.
#pragma once

#include "engine.h"

namespace fastode::resident {

template <template <class> class Program, class S, class Rule>
Recording<S> recording_of(const Rule& rule) {
  return {Program<S>::need(rule), [&rule](Branch<S>& branch, const Ends<S>& ends, const Wishes<S>& wishes) {
            Program<S>::record(branch, ends, rule, wishes);
          }};
}

template <template <class> class Program, class A, class Rule>
void run(const Call<A>& call, const Rule& rule) {
  if constexpr (kOnTiles<A>)
    if (call.packed.spec.narrow) return run_recorded<bfloat16, bfloat16>(call, recording_of<Program, bfloat16>(rule));
  if constexpr (std::is_same_v<A, float>)
    if (call.x.scalar_type() == ScalarType::BFloat16)
      return run_recorded<A, bfloat16>(call, recording_of<Program, A>(rule));
  run_recorded<A, A>(call, recording_of<Program, A>(rule));
}

}  // namespace fastode::resident

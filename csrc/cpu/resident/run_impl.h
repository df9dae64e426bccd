// Included by one .cpp per program family and arithmetic type.
#pragma once

#include "engine.h"

namespace fastode::resident {

template <template <class> class Program, class A, class Rule>
void run(const Call<A>& call, const Rule& rule) {
  with_data<A>(call.x, [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    if constexpr (std::is_same_v<T, bfloat16>) {
      if constexpr (std::is_same_v<A, float>)
        call.packed.spec.narrow ? run_typed<Program, T, T>(call, rule) : run_typed<Program, A, T>(call, rule);
    } else if constexpr (std::is_same_v<A, float> || std::is_same_v<T, double>) {
      run_typed<Program, A, T>(call, rule);
    }
  });
}

}  // namespace fastode::resident

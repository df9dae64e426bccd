// What the resident operators of several files read their arguments by.
#pragma once

#include <optional>
#include <sstream>
#include <tuple>

#include "control.h"
#include "engine.h"

namespace fastode::resident {

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using Numbers = std::vector<double>;
using MaybeTensor = std::optional<Tensor>;

// Calls f with a number of the type that x is computed in.
template <class F>
auto with_arithmetic(const Tensor& x, const F& f) {
  return x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

// What fastode.SolveError says, where no Python can.
inline void throw_failure(const Numbers& log) {
  for (const double* at = log.data(); at < log.data() + log.size();) {
    const SolveLog solve = SolveLog::read(at);
    if (solve.end == kReached) continue;
    std::ostringstream words;
    words << "SOBlock: "
          << (solve.end == kMostAttempts ? "max_steps attempts did not reach t1"
              : solve.end == kNotFinite  ? "the state is not finite"
                                         : "the step is not finite, or too small to move the time")
          << " at t = " << solve.t << " with h = " << solve.h << "; without torch.compile the error says more";
    throw std::runtime_error(words.str());
  }
}

inline Numbers numbers_of(const Tensor& tensor) {
  const double* from = static_cast<const double*>(tensor.data_ptr());
  return Numbers(from, from + tensor.numel());
}

// A log as a tensor; with `raises` an empty one, and a solve that cannot go on raises here.
inline Tensor written(Numbers log, bool raises) {
  if (raises) throw_failure(log), log.clear();
  const Tensor found = new_vector(static_cast<int64_t>(log.size()), ScalarType::Double);
  std::copy(log.begin(), log.end(), static_cast<double*>(found.data_ptr()));
  return found;
}

}  // namespace fastode::resident

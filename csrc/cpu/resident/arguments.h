// What the resident operators of several files read their arguments by.
#pragma once

#include <optional>
#include <sstream>
#include <tuple>

#include "control.h"
#include "engine.h"
#include "ticket.h"

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

inline Tensor tensor_of(const Numbers& numbers) {
  const Tensor made = new_vector(static_cast<int64_t>(numbers.size()), ScalarType::Double);
  std::copy(numbers.begin(), numbers.end(), static_cast<double*>(made.data_ptr()));
  return made;
}

// A log as a tensor; with `raises` an empty one, and a solve that cannot go on raises here.
inline Tensor written(const Numbers& log, bool raises) {
  if (!raises) return tensor_of(log);
  throw_failure(log);
  return tensor_of({});
}

// What a solve leaves to backward: a ticket stands for its log, too.
inline Tensors left_of_solve(Tensors kept, const Numbers& log, int64_t keep) {
  if (keep == kKeepTicket) kept.push_back(tensor_of(log));
  return left_behind(std::move(kept), keep);
}

// What it has left, and its log where that lies with it.
inline Tensors found_of_solve(const Tensors& kept, Numbers& log) {
  Tensors found = found_again(kept);
  if (!is_ticket(kept) || found.empty()) return found;
  log = numbers_of(found.back());
  found.pop_back();
  return found;
}

}  // namespace fastode::resident

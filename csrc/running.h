// How running statistics of norms move, with the rounding of torch.lerp.
#pragma once

#include <cmath>
#include <cstdint>

namespace fastode {

// running <- (1 - factor) running + factor (scale now)
template <class A>
void move_running(A* running, const A* now, A scale, double to_now, int64_t channels) {
  const A factor = static_cast<A>(to_now), rest = factor - A(1);
  const bool near = std::abs(factor) < A(0.5);
  for (int64_t c = 0; c < channels; ++c) {
    // A product that no compiler makes one with the difference.
    const A end = std::fma(now[c], scale, A(0)), way = end - running[c];
    running[c] = near ? std::fma(factor, way, running[c]) : std::fma(rest, way, end);
  }
}

}  // namespace fastode

// The threads of torch behind two functions, so that kernels are compiled without its headers.
#pragma once

#include <cstdint>
#include <functional>

namespace fastode {

int64_t thread_count();

// Calls f(begin, end) for stretches that make up [0, count), each at least `grain` long but for the last.
void in_parallel(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& f);

}  // namespace fastode

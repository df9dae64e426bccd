#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace fastode {

int64_t thread_count() { return torch::stable::get_num_threads(); }

void in_parallel(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
  torch::stable::parallel_for(0, count, grain, f);
}

}  // namespace fastode

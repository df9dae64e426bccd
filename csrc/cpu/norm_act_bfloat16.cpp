#include "norm_act_impl.h"

namespace fastode {

template struct Kernels<bfloat16>;

}  // namespace fastode

#include "norm_act_tangent_impl.h"

namespace fastode {

template struct Kernels<float>;
template struct Kernels<bfloat16>;

}  // namespace fastode

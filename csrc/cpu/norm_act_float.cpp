#include "norm_act_tangent_impl.h"

namespace fastode {

template struct Kernels<float>;

}  // namespace fastode

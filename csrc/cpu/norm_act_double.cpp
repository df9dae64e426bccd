#include "norm_act_tangent_impl.h"

namespace fastode {

template struct Kernels<double>;

}  // namespace fastode

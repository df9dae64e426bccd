#include "norm_act_impl.h"

namespace fastode {

template struct Kernels<float>;

}  // namespace fastode

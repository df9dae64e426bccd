#include "norm_act_impl.h"

namespace fastode {

template struct Kernels<double>;

}  // namespace fastode

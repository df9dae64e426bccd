#include "norm_act_sweeps_impl.h"

namespace fastode {

template struct Sweeps<float>;

}  // namespace fastode

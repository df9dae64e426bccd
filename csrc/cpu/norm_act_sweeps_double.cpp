#include "norm_act_sweeps_impl.h"

namespace fastode {

template struct Sweeps<double>;

}  // namespace fastode

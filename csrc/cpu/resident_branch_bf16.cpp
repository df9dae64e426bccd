#include "resident/sweeps_impl.h"

namespace fastode::resident {

template class Branch<bfloat16>;

}  // namespace fastode::resident

#include "resident/engine_impl.h"
#include "resident/sweeps_impl.h"

namespace fastode::resident {

template class Branch<double>;
template class Packed<double>;

}  // namespace fastode::resident

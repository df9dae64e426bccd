#include "resident/engine_impl.h"
#include "resident/sweeps_impl.h"

namespace fastode::resident {

template class Branch<float>;
template class Packed<float>;

}  // namespace fastode::resident

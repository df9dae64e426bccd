#include "resident/engine_impl.h"
#include "resident/sweeps_impl.h"

namespace fastode::resident {

template class Branch<double>;
template class Packed<double>;
template void run_recorded<double, double>(const Call<double>&, const Recording<double>&);

}  // namespace fastode::resident

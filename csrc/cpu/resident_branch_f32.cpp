#include "resident/engine_impl.h"
#include "resident/sweeps_impl.h"

namespace fastode::resident {

template class Branch<float>;
template class Packed<float>;
template void run_recorded<float, float>(const Call<float>&, const Recording<float>&);
template void run_recorded<float, bfloat16>(const Call<float>&, const Recording<float>&);

}  // namespace fastode::resident

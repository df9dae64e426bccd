#include "resident/run_impl.h"

namespace fastode::resident {

template void run<DescentForward>(const Call<float>&, const Descent&);
template void run<DescentBackward>(const Call<float>&, const Descent&);

}  // namespace fastode::resident

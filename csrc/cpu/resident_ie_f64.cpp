#include "resident/run_impl.h"

namespace fastode::resident {

template void run<DescentForward>(const Call<double>&, const Descent&);
template void run<DescentBackward>(const Call<double>&, const Descent&);

}  // namespace fastode::resident

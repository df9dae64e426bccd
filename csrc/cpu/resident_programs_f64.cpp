#include "resident/run_impl.h"

namespace fastode::resident {

template void run<DescentForward>(const Call<double>&, const Descent&);
template void run<DescentBackward>(const Call<double>&, const Descent&);
template void run<SchemeForward>(const Call<double>&, const Scheme&);
template void run<SchemeBackward>(const Call<double>&, const Scheme&);

}  // namespace fastode::resident

#include "resident/run_impl.h"

namespace fastode::resident {

template void run<DescentForward>(const Call<float>&, const Descent&);
template void run<DescentBackward>(const Call<float>&, const Descent&);
template void run<SchemeForward>(const Call<float>&, const Scheme&);
template void run<SchemeBackward>(const Call<float>&, const Scheme&);

}  // namespace fastode::resident

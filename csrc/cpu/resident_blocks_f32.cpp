// Branches, chains and the programs of one-step blocks: in one unit, because they instantiate much in common.
#include "resident/chain_impl.h"
#include "resident/engine_impl.h"
#include "resident/run_impl.h"
#include "resident/sweeps_impl.h"

namespace fastode::resident {

template class Branch<float>;
template class Packed<float>;
template void run_recorded<float, float>(const Call<float>&, const Recording<float>&);
template void run_recorded<float, bfloat16>(const Call<float>&, const Recording<float>&);
template void run_chain<float>(const ChainArguments&, const ChainCall&, std::vector<Tensor>&, Tensor*,
                               std::vector<Tensor>*);
template void run<DescentForward>(const Call<float>&, const Descent&);
template void run<DescentBackward>(const Call<float>&, const Descent&);
template void run<SchemeForward>(const Call<float>&, const Scheme&);
template void run<SchemeBackward>(const Call<float>&, const Scheme&);

}  // namespace fastode::resident

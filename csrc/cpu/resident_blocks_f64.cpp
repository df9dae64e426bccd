// Branches, chains and the programs of one-step blocks: in one unit, because they instantiate much in common.
#include "resident/chain_impl.h"
#include "resident/engine_impl.h"
#include "resident/run_impl.h"
#include "resident/sweeps_impl.h"

namespace fastode::resident {

template class Branch<double>;
template class Packed<double>;
template void run_recorded<double, double>(const Call<double>&, const Recording<double>&);
template void run_chain<double>(const ChainArguments&, const ChainCall&, std::vector<Tensor>&, Tensor*,
                                std::vector<Tensor>*);
template void run<DescentForward>(const Call<double>&, const Descent&);
template void run<DescentBackward>(const Call<double>&, const Descent&);
template void run<SchemeForward>(const Call<double>&, const Scheme&);
template void run<SchemeBackward>(const Call<double>&, const Scheme&);

}  // namespace fastode::resident

#include "resident/chain_impl.h"

namespace fastode::resident {

template void run_chain<double>(const ChainArguments&, const ChainCall&, std::vector<Tensor>&, Tensor*,
                                std::vector<Tensor>*);

}  // namespace fastode::resident

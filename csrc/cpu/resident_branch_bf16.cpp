#include "simd.h"

#if FASTODE_TILES

#include "resident/chain_impl.h"
#include "resident/sweeps_impl.h"

namespace fastode::resident {

template class Branch<bfloat16>;
template void run_recorded<bfloat16, bfloat16>(const Call<float>&, const Recording<bfloat16>&);
template void run_chain<bfloat16>(const ChainArguments&, const ChainCall&, std::vector<Tensor>&, Tensor*,
                                  std::vector<Tensor>*);

}  // namespace fastode::resident

#endif

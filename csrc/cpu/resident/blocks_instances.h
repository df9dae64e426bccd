// What resident_blocks_<type>.cpp instantiates in arithmetic of A: branches, chains and the programs of one-step
// blocks, in one unit, because they instantiate much in common.
#pragma once

#include "chain_impl.h"
#include "engine_impl.h"
#include "run_impl.h"
#include "sweeps_impl.h"

#define FASTODE_INSTANTIATE_BLOCKS(A)                                                                \
  template class Branch<A>;                                                                          \
  template class Packed<A>;                                                                          \
  template void run_recorded<A, A>(const Call<A>&, const Recording<A>&);                             \
  template void run_chain<A>(const ChainArguments&, const ChainCall&, std::vector<Tensor>&, Tensor*, \
                             std::vector<Tensor>*);                                                  \
  template void run<DescentForward>(const Call<A>&, const Descent&);                                 \
  template void run<DescentBackward>(const Call<A>&, const Descent&);                                \
  template void run<SchemeForward>(const Call<A>&, const Scheme&);                                   \
  template void run<SchemeBackward>(const Call<A>&, const Scheme&)

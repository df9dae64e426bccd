#include "resident/skew_conv_impl.h"
#include "resident/skew_engine_impl.h"
#include "resident/skew_errors_impl.h"
#include "resident/skew_impl.h"
#include "resident/skew_packed_impl.h"
#include "resident/skew_passes_impl.h"
#include "resident/skew_solve_impl.h"

namespace fastode::resident {

template class PackedPair<double>;
template void run_pair(const PackedPair<double>&, const PairCall&, PairKept*, const Tensor&);
template void run_march(const PackedPair<double>&, const March&, const MarchCall&, std::vector<Tensor>*, const Tensor&);
template void run_solve(const PackedPair<double>&, const Embedded&, const SolveCall&, std::vector<double>&,
                        std::vector<Tensor>&, const Tensor&);

}  // namespace fastode::resident

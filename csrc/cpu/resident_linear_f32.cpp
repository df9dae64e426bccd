#include "resident/linear_impl.h"
#include "resident/skew_errors_impl.h"
#include "resident/skew_passes_impl.h"

namespace fastode::resident {

template class PackedLinear<float>;
template void run_linear(const PackedLinear<float>&, const LinearCall&, const Tensor&);
template void run_linear_solve(const PackedLinear<float>&, const Embedded&, const SolveCall&, std::vector<double>&,
                               std::vector<Tensor>&, const Tensor&);

}  // namespace fastode::resident

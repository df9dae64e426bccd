#include "resident/linear_impl.h"
#include "resident/skew_errors_impl.h"
#include "resident/skew_passes_impl.h"

namespace fastode::resident {

template class PackedLinear<double>;
template void run_linear(const PackedLinear<double>&, const LinearCall&, const Tensor&);
template void run_linear_solve(const PackedLinear<double>&, const Embedded&, const SolveCall&, std::vector<double>&,
                               std::vector<Tensor>&, const Tensor&);

}  // namespace fastode::resident

#include "resident/linear_impl.h"
#include "resident/rows_impl.h"

namespace fastode::resident {

template void row_products(const double*, int64_t, int64_t, int64_t, const double*, double*);
template void sum_of_rows(const double*, int64_t, int64_t, int64_t, const double*, double*);
template class PackedLinear<double>;
template void run_linear(const PackedLinear<double>&, const LinearCall&, const Tensor&);
template void run_linear_solve(const PackedLinear<double>&, const Embedded&, const SolveCall&, std::vector<double>&,
                               std::vector<Tensor>&, const Tensor&);

}  // namespace fastode::resident

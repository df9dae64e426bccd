#include "resident/linear_impl.h"
#include "resident/rows_impl.h"

namespace fastode::resident {

template void row_products(const float*, int64_t, int64_t, int64_t, const float*, float*);
template void sum_of_rows(const float*, int64_t, int64_t, int64_t, const float*, float*);
template class PackedLinear<float>;
template void run_linear(const PackedLinear<float>&, const LinearCall&, const Tensor&);
template void run_linear_solve(const PackedLinear<float>&, const Embedded&, const SolveCall&, std::vector<double>&,
                               std::vector<Tensor>&, const Tensor&);

}  // namespace fastode::resident

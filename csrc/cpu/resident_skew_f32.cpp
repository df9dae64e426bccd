// Skew pairs and linear fields: in one unit, because they are solved by the same functions.
#include "resident/linear_impl.h"
#include "resident/rows_impl.h"
#include "resident/skew_conv_impl.h"
#include "resident/skew_engine_impl.h"
#include "resident/skew_errors_impl.h"
#include "resident/skew_impl.h"
#include "resident/skew_packed_impl.h"
#include "resident/skew_passes_impl.h"
#include "resident/skew_solve_impl.h"

namespace fastode::resident {

template void advance(const Plane<float>&, int64_t, const View<float>&, const Slope<float>*, int64_t,
                      const View<float>&);
template double scaled_squares(const Plane<float>&, int64_t, const View<float>&, const Slope<float>*, int64_t,
                               const Tolerance<float>&);
template double zero_of(const Plane<float>&, int64_t, const View<float>&);
template void pull_error(const Plane<float>&, int64_t, float, const View<float>&, const Slope<float>*, int64_t,
                         const Tolerance<float>&, const ErrorBars<float>&);
template void pull_scaled_squares(const Plane<float>&, int64_t, float, const View<float>&, const Tolerance<float>&,
                                  const View<float>&, const View<float>&);
template void run_solves(const FieldSizes&, int64_t, const Embedded&, const SolveCall&, std::vector<double>&,
                         std::vector<Tensor>&, const MakeSolver<float>&);
template class PackedPair<float>;
template void run_pair(const PackedPair<float>&, const PairCall&, PairKept*, const Tensor&);
template void run_march(const PackedPair<float>&, const March&, const MarchCall&, std::vector<Tensor>*, const Tensor&);
template void run_solve(const PackedPair<float>&, const Embedded&, const SolveCall&, std::vector<double>&,
                        std::vector<Tensor>&, const Tensor&);
template void row_products(const float*, int64_t, int64_t, int64_t, const float*, float*);
template void sum_of_rows(const float*, int64_t, int64_t, int64_t, const float*, float*);
template class PackedLinear<float>;
template void run_linear(const PackedLinear<float>&, const LinearCall&, const Tensor&);
template void run_linear_solve(const PackedLinear<float>&, const Embedded&, const SolveCall&, std::vector<double>&,
                               std::vector<Tensor>&, const Tensor&);

}  // namespace fastode::resident

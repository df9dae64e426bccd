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

template void advance(const Plane<double>&, int64_t, const View<double>&, const Slope<double>*, int64_t,
                      const View<double>&);
template double scaled_squares(const Plane<double>&, int64_t, const View<double>&, const Slope<double>*, int64_t,
                               const Tolerance<double>&);
template double zero_of(const Plane<double>&, int64_t, const View<double>&);
template void pull_error(const Plane<double>&, int64_t, double, const View<double>&, const Slope<double>*, int64_t,
                         const Tolerance<double>&, const ErrorBars<double>&);
template void pull_scaled_squares(const Plane<double>&, int64_t, double, const View<double>&, const Tolerance<double>&,
                                  const View<double>&, const View<double>&);
template void run_solves(const FieldSizes&, int64_t, const Embedded&, const SolveCall&, std::vector<double>&,
                         std::vector<Tensor>&, const MakeSolver<double>&);
template class PackedPair<double>;
template void run_pair(const PackedPair<double>&, const PairCall&, PairKept*, const Tensor&);
template void run_march(const PackedPair<double>&, const March&, const MarchCall&, std::vector<Tensor>*, const Tensor&);
template void run_solve(const PackedPair<double>&, const Embedded&, const SolveCall&, std::vector<double>&,
                        std::vector<Tensor>&, const Tensor&);
template void row_products(const double*, int64_t, int64_t, int64_t, const double*, double*);
template void sum_of_rows(const double*, int64_t, int64_t, int64_t, const double*, double*);
template class PackedLinear<double>;
template void run_linear(const PackedLinear<double>&, const LinearCall&, const Tensor&);
template void run_linear_solve(const PackedLinear<double>&, const Embedded&, const SolveCall&, std::vector<double>&,
                               std::vector<Tensor>&, const Tensor&);

}  // namespace fastode::resident

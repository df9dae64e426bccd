// What resident_skew_<type>.cpp instantiates in arithmetic of A: skew pairs and linear fields, in one unit, because
// they are solved by the same functions.
#pragma once

#include "linear_impl.h"
#include "rows_impl.h"
#include "skew_conv_impl.h"
#include "skew_engine_impl.h"
#include "skew_errors_impl.h"
#include "skew_impl.h"
#include "skew_packed_impl.h"
#include "skew_passes_impl.h"
#include "skew_solve_impl.h"

#define FASTODE_INSTANTIATE_SKEW(A)                                                                                    \
  template void advance(const Plane<A>&, int64_t, const View<A>&, const Slope<A>*, int64_t, const View<A>&);           \
  template double scaled_squares(const Plane<A>&, int64_t, const View<A>&, const Slope<A>*, int64_t,                   \
                                 const Tolerance<A>&);                                                                 \
  template double zero_of(const Plane<A>&, int64_t, const View<A>&);                                                   \
  template void pull_error(const Plane<A>&, int64_t, A, const View<A>&, const Slope<A>*, int64_t, const Tolerance<A>&, \
                           const ErrorBars<A>&);                                                                       \
  template void pull_scaled_squares(const Plane<A>&, int64_t, A, const View<A>&, const Tolerance<A>&, const View<A>&,  \
                                    const View<A>&);                                                                   \
  template void run_solves(const FieldSizes&, int64_t, const Embedded&, const SolveCall&, std::vector<double>&,        \
                           std::vector<Tensor>&, const MakeSolver<A>&);                                                \
  template class PackedPair<A>;                                                                                        \
  template void run_pair(const PackedPair<A>&, const PairCall&, PairKept*, const Tensor&);                             \
  template void run_march(const PackedPair<A>&, const March&, const MarchCall&, std::vector<Tensor>*, const Tensor&);  \
  template void run_solve(const PackedPair<A>&, const Embedded&, const SolveCall&, std::vector<double>&,               \
                          std::vector<Tensor>&, const Tensor&);                                                        \
  template void row_products(const A*, int64_t, int64_t, int64_t, const A*, A*);                                       \
  template void sum_of_rows(const A*, int64_t, int64_t, int64_t, const A*, A*);                                        \
  template class PackedLinear<A>;                                                                                      \
  template void run_linear(const PackedLinear<A>&, const LinearCall&, const Tensor&);                                  \
  template void run_linear_solve(const PackedLinear<A>&, const Embedded&, const SolveCall&, std::vector<double>&,      \
                                 std::vector<Tensor>&, const Tensor&)

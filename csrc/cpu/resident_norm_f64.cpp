#include "resident/norm_impl.h"

namespace fastode::resident {

using P = Plane<double>;
using R = NormRows<double>;
using U = Unary<double>;
using C = Combine<double>;

template void moments(const P&, int64_t, const double*, double*, double*);
template void apply(const P&, int64_t, const R&, const U&, const double*, double*, const C&);
template void cotangent_first(const P&, int64_t, const R&, const U&, const double*, const double*, double*, double*);
template void cotangent_last(const P&, int64_t, const R&, const double*, const double*, double*, const C&);
template void tangent_sums(const P&, int64_t, const R&, const double*, const double*, double*);
template void tangent_apply(const P&, int64_t, const R&, const U&, const double*, const double*, double*, const C&);
template void second_first(const P&, int64_t, const R&, const U&, const double*, const double*, double*, double*,
                           double*);
template void second_last(const P&, int64_t, const R&, const double*, const double*, const double*, const double*,
                          double*, double*, const C&);
template void combine_maps(const P&, int64_t, double*, const C&);
template void add_channel_sums(const P&, int64_t, const double*, double*);
template double inner_product(const P&, int64_t, const double*, const double*);

}  // namespace fastode::resident

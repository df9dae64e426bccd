#include "resident/norm_impl.h"

namespace fastode::resident {

using P = Plane<double>;
using R = NormRows<double>;
using U = Unary<double>;
using C = Combine<double>;
using M = View<double>;

template void moments(const P&, int64_t, const M&, double*, double*);
template void apply(const P&, int64_t, const R&, const U&, const M&, const M&, const C&);
template void cotangent_first(const P&, int64_t, const R&, const U&, const M&, const M&, const M&, double*);
template void cotangent_last(const P&, int64_t, const R&, const M&, const M&, const M&, const C&);
template void tangent_sums(const P&, int64_t, const R&, const M&, const M&, double*);
template void tangent_apply(const P&, int64_t, const R&, const U&, const M&, const M&, const M&, const C&);
template void second_first(const P&, int64_t, const R&, const U&, const M&, const M&, const M&, const M&, double*);
template void second_last(const P&, int64_t, const R&, const M&, const M&, const M&, const M&, const M&, const M*,
                          const C&);
template void combine_maps(const P&, int64_t, const M&, const C&);
template void add_channel_sums(const P&, int64_t, const M&, double*);
template double inner_product(const P&, int64_t, const M&, const M&);

}  // namespace fastode::resident

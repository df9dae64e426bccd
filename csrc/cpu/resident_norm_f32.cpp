#include "resident/norm_impl.h"

namespace fastode::resident {

using P = Plane<float>;
using R = NormRows<float>;
using U = Unary<float>;
using C = Combine<float>;
using M = View<float>;

template void moments(const P&, int64_t, const M&, float*, float*);
template void apply(const P&, int64_t, const R&, const U&, const M&, const M&, const C&);
template void cotangent_first(const P&, int64_t, const R&, const U&, const M&, const M&, const M&, float*);
template void cotangent_last(const P&, int64_t, const R&, const M&, const M&, const M&, const C&);
template void tangent_sums(const P&, int64_t, const R&, const M&, const M&, float*);
template void tangent_apply(const P&, int64_t, const R&, const U&, const M&, const M&, const M&, const C&);
template void second_first(const P&, int64_t, const R&, const U&, const M&, const M&, const M&, const M&, float*);
template void second_last(const P&, int64_t, const R&, const M&, const M&, const M&, const M&, const M&, const M*,
                          const C&);
template void combine_maps(const P&, int64_t, const M&, const C&);
template void add_channel_sums(const P&, int64_t, const M&, float*);
template double inner_product(const P&, int64_t, const M&, const M&);

}  // namespace fastode::resident

#include "resident/norm_bf16_impl.h"

namespace fastode::resident {

using P = Plane<float>;
using R = NormRows<float>;
using U = Unary<float>;
using C = Combine<float>;

template void moments(const P&, int64_t, const float*, float*, float*);
template void apply(const P&, int64_t, const R&, const U&, const float*, float*, const C&);
template void cotangent_first(const P&, int64_t, const R&, const U&, const float*, const float*, float*, float*);
template void cotangent_last(const P&, int64_t, const R&, const float*, const float*, float*, const C&);
template void tangent_sums(const P&, int64_t, const R&, const float*, const float*, float*);
template void tangent_apply(const P&, int64_t, const R&, const U&, const float*, const float*, float*, const C&);
template void second_first(const P&, int64_t, const R&, const U&, const float*, const float*, float*, float*, float*);
template void second_last(const P&, int64_t, const R&, const float*, const float*, const float*, const float*, float*,
                          float*, const C&);
template void combine_maps(const P&, int64_t, float*, const C&);
template void add_channel_sums(const P&, int64_t, const float*, float*);
template double inner_product(const P&, int64_t, const float*, const float*);

}  // namespace fastode::resident

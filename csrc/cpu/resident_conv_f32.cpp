#include "resident/conv_impl.h"

namespace fastode::resident {

template void pack_weights(const ConvShape&, bool, const float*, const int64_t*, float*);
template void pack_weights(const ConvShape&, bool, const bfloat16*, const int64_t*, float*);
template void convolve(const Plane<float>&, const ConvShape&, const float*, const float*, const ConvJob<float>*,
                       int64_t, Ahead*);
template void weight_gradient(const Plane<float>&, const ConvShape&, const GradientPair<float>*, int64_t, float*);
template void unpack_gradient(const ConvShape&, const float*, int64_t, int64_t, float*);
template void unpack_gradient(const ConvShape&, const float*, int64_t, int64_t, bfloat16*);

}  // namespace fastode::resident

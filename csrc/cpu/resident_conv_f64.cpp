#include "resident/conv_impl.h"

namespace fastode::resident {

template void pack_weights(const ConvShape&, bool, const double*, const int64_t*, double*);
template void pack_weights(const ConvShape&, bool, const float*, const int64_t*, double*);
template void convolve(const Plane<double>&, const ConvShape&, const double*, const double*, const ConvJob<double>*,
                       int64_t, Ahead*);
template void weight_gradient(const Plane<double>&, const ConvShape&, const GradientPair<double>*, int64_t, double*);
template void unpack_gradient(const ConvShape&, const double*, int64_t, int64_t, double*);
template void unpack_gradient(const ConvShape&, const double*, int64_t, int64_t, float*);

}  // namespace fastode::resident

// The passes of norm.h for maps stored as T. Included by one .cpp per type, which instantiates them.
#pragma once

#include "norm_impl.h"

#define FASTODE_INSTANTIATE_NORMS(T)                                                                                   \
  template void moments(const Plane<Number<T>>&, int64_t, const View<T>&, Number<T>*, Number<T>*);                     \
  template void apply(const Plane<Number<T>>&, int64_t, const NormRows<Number<T>>&, const Unary<Number<T>>&,           \
                      const View<T>&, const View<T>&, const Combine<T>&);                                              \
  template void join(const Plane<Number<T>>&, int64_t, const NormRows<Number<T>>&, const View<T>&, Number<T>,          \
                     const NormRows<Number<T>>*, const View<T>&, const View<T>&);                                      \
  template void pull_activation(const Plane<Number<T>>&, int64_t, const Unary<Number<T>>&, const View<T>&,             \
                                const View<T>&, const View<T>&);                                                       \
  template void cotangent_first(const Plane<Number<T>>&, int64_t, const NormRows<Number<T>>&, const Unary<Number<T>>&, \
                                const View<T>&, const View<T>&, const View<T>&, Number<T>*);                           \
  template void cotangent_last(const Plane<Number<T>>&, int64_t, const NormRows<Number<T>>&, const View<T>&,           \
                               const View<T>&, const View<T>&, const Combine<T>&);                                     \
  template void tangent_sums(const Plane<Number<T>>&, int64_t, const NormRows<Number<T>>&, const View<T>&,             \
                             const View<T>&, Number<T>*);                                                              \
  template void tangent_apply(const Plane<Number<T>>&, int64_t, const NormRows<Number<T>>&, const Unary<Number<T>>&,   \
                              const View<T>&, const View<T>&, const View<T>&, const Combine<T>&);                      \
  template void second_first(const Plane<Number<T>>&, int64_t, const NormRows<Number<T>>&, const Unary<Number<T>>&,    \
                             const View<T>&, const View<T>&, const View<T>&, const View<T>&, Number<T>*);              \
  template void second_last(const Plane<Number<T>>&, int64_t, const NormRows<Number<T>>&, const View<T>&,              \
                            const View<T>&, const View<T>&, const View<T>&, const View<T>&, const View<T>*,            \
                            const Combine<T>&);                                                                        \
  template void combine_maps(const Plane<Number<T>>&, int64_t, const View<T>&, const Combine<T>&);                     \
  template void add_channel_sums(const Plane<Number<T>>&, int64_t, const View<T>&, Number<T>*);                        \
  template double inner_product(const Plane<Number<T>>&, int64_t, const View<T>&, const View<T>&)

// The means of strided.h, for maps stored as T. Included by one .cpp per type, which instantiates them.
#pragma once

#include "strided.h"

namespace fastode::resident {

template <class T>
void average(const Plane<Number<T>>& out, const ConvShape& shape, const ConvJob<T>& job) {
  using A = Number<T>;
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<A>;
  const A share = A(1) / static_cast<A>(shape.kernel_h * shape.kernel_w);
  for (int64_t b = 0; b < blocks_of<A>(shape.out_channels); ++b) {
    // What lies behind the input's channels is zero, in the block that they end in, too.
    const int64_t present = std::clamp<int64_t>(shape.in_channels - b * lanes, 0, lanes);
    A shares[lanes];
    for (int64_t lane = 0; lane < lanes; ++lane) shares[lane] = lane < present ? share : A(0);
    const V scale = load<V>(shares);
    for (int64_t y = 0; y < out.height; ++y)
      for (int64_t x = 0; x < out.width; ++x) {
        V sum = {};
        for (int64_t ky = 0; present > 0 && ky < shape.kernel_h; ++ky)
          for (int64_t kx = 0; kx < shape.kernel_w; ++kx)
            sum += load_stored(job.in.pixel_at(b, y * shape.stride + ky, x * shape.stride + kx));
        V value = sum * scale * job.combine.scale;
        for (int t = 0; t < job.combine.count; ++t)
          value += job.combine.coef[t] * load_stored(job.combine.term[t].pixel_at(b, y, x));
        store_stored(job.out.pixel_at(b, y, x), value);
      }
  }
}

template <class T>
void average_back(const Plane<Number<T>>& in, const Plane<Number<T>>& out, const ConvShape& shape,
                  const ConvJob<T>& job) {
  using A = Number<T>;
  const A share = A(1) / static_cast<A>(shape.kernel_h * shape.kernel_w);
  // The windows that a row or column of the input lies in.
  const auto windows = [&](int64_t at, int64_t kernel, int64_t count, const auto& f) {
    const int64_t first = at < kernel ? 0 : (at - kernel) / shape.stride + 1;
    for (int64_t w = first; w < count && w * shape.stride <= at; ++w) f(w);
  };
  for (int64_t b = 0; b < blocks_of<A>(shape.in_channels); ++b)
    for (int64_t y = 0; y < in.height; ++y)
      for (int64_t x = 0; x < in.width; ++x) {
        Vec<A> sum = {};
        windows(y, shape.kernel_h, out.height, [&](int64_t wy) {
          windows(x, shape.kernel_w, out.width, [&](int64_t wx) { sum += load_stored(job.in.pixel_at(b, wy, wx)); });
        });
        store_stored(job.out.pixel_at(b, y, x), sum * share);
      }
}

#define FASTODE_AVERAGE(keyword, T)                                                                      \
  keyword template void average(const Plane<Number<T>>&, const ConvShape&, const ConvJob<T>&);           \
  keyword template void average_back(const Plane<Number<T>>&, const Plane<Number<T>>&, const ConvShape&, \
                                     const ConvJob<T>&)

}  // namespace fastode::resident

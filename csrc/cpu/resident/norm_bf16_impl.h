// The norms' passes that feed a convolution on tiles. Included by the float32 norms' .cpp, after norm_impl.h.
#pragma once

#include "conv_bf16.h"
#include "norm_impl.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace fastode::resident {
namespace {

inline void store_rounded(bfloat16* to, Vec<float> value) {
#if defined(__AVX512BF16__)
  const auto rounded = _mm512_cvtneps_pbh((__m512)value);
  std::memcpy(to, &rounded, sizeof(rounded));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) to[lane] = narrow(value[lane]);
#endif
}

template <class F>
void with_narrow_store(const Plane<float>& plane, int64_t channels, bfloat16* out, const F& f) {
  const Narrow narrow(plane, channels);
  clear_narrow_halo(plane, channels, out);
  const int64_t origin = plane.origin / Narrow::lanes, row = plane.row / Narrow::lanes;
  f([=](int64_t b, int64_t y, int64_t x, Vec<float> value) {
    store_rounded(out + narrow.begin(b) + (origin + y * row + x) * narrow.depth, value);
  });
}

}  // namespace

void apply(const Plane<float>& plane, int64_t channels, const NormRows<float>& rows, const Unary<float>& act,
           const View<float>& h, bfloat16* out) {
  with_narrow_store(plane, channels, out, [&](const auto& place) {
    each_value(Area{plane.height, plane.width}, blocks_of<float>(channels), rows, act, h, place);
  });
}

void tangent_apply(const Plane<float>& plane, int64_t channels, const NormRows<float>& rows, const Unary<float>& act,
                   const View<float>& h, const View<float>& t, bfloat16* out) {
  with_narrow_store(plane, channels, out, [&](const auto& place) {
    each_tangent(Area{plane.height, plane.width}, blocks_of<float>(channels), rows, act, h, t, place);
  });
}

}  // namespace fastode::resident

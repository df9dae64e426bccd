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
  if (narrow.depth == Narrow::lanes)
    f([=](int64_t, int64_t i, Vec<float> value) { store_rounded(out + i, value); });
  else
    f([=, size = plane.size](int64_t b, int64_t i, Vec<float> value) {
      store_rounded(out + narrow.begin(b) + (i - b * size) * 2, value);
    });
}

}  // namespace

void apply(const Plane<float>& plane, int64_t channels, const NormRows<float>& rows, const Unary<float>& act,
           const float* h, bfloat16* out) {
  with_narrow_store(plane, channels, out,
                    [&](const auto& put) { each_value(plane, blocks_of<float>(channels), rows, act, h, put); });
}

void tangent_apply(const Plane<float>& plane, int64_t channels, const NormRows<float>& rows, const Unary<float>& act,
                   const float* h, const float* t, bfloat16* out) {
  with_narrow_store(plane, channels, out,
                    [&](const auto& put) { each_tangent(plane, blocks_of<float>(channels), rows, act, h, t, put); });
}

}  // namespace fastode::resident

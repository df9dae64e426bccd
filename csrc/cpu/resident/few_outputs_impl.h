// Convolutions of 3x3 and stride 1 to an image's channels, as its gradient is, by dot products of pairs. Included by
// conv_bf16_impl.h.
#pragma once

#include "dot_products.h"
#include "pack_bf16_impl.h"

namespace fastode::resident {
namespace {

// As a vector of outputs four of sixteen numbers would be used. Here a vector has the outputs of the three taps of a
// kernel's row, so that a position is multiplied once for all nine of them, and what each pixel gets is added up later.
constexpr int kFewOutputs = 4, kTaps = 3;
constexpr int64_t kFewWidth = 64, kFewPairs = 64;  // at most: columns, and pairs of input channels

bool suits_few_outputs(const Plane<float>& plane, const ConvShape& shape) {
  return shape.kernel_h == kTaps && shape.kernel_w == kTaps && shape.out_channels <= kFewOutputs &&
         shape.in_channels > Narrow::lanes && shape.in_channels <= 2 * kFewPairs && plane.width <= kFewWidth;
}

class FewOutputs {
 public:
  FewOutputs(const Plane<float>& plane, const ConvShape& shape, const bfloat16* packed)
      : height_(plane.height), width_(plane.width), pairs_(Steps(shape).pairs) {
    const Steps steps(shape);
    const PackedOrder order(steps, 1);
    for (int64_t ky = 0; ky < kTaps; ++ky)
      for (int64_t pair = 0; pair < pairs_; ++pair)
        for (int64_t kx = 0; kx < kTaps; ++kx)
          std::memcpy(weights_[pair][ky] + kx * kFewOutputs,
                      packed + (ky * kTaps + kx) * order.step + pair * order.pair, kFewOutputs * sizeof(int32_t));
  }

  void operator()(const ConvJob<bfloat16>& job, const float* bias) {
    for (int64_t y = 0; y <= height_; ++y) {
      if (y < height_) multiply(job.in.pixel_at(0, y, 0), job.in.pixel, products_[y % kTaps]);
      if (y > 0) add_up(job, bias, y - 1);
    }
  }

 private:
  static constexpr int R = 8;
  using Row = float[kFewWidth + R + 1][kTaps][kLanes<float>];  // of the columns from -1 on, where there is nothing

  void multiply(const bfloat16* in, int64_t pixel, Row& row) const {
    for (int64_t x = 0; x < width_; x += R, in += R * pixel) {
      __m512 total[R][kTaps];
      FASTODE_UNROLL for (auto& position : total) for (auto& sum : position) sum = _mm512_setzero_ps();
      const char* at = reinterpret_cast<const char*>(in);
      for (int64_t pair = 0; pair < pairs_; ++pair, at += sizeof(int32_t)) {
        __m512bh factors[kTaps];
        FASTODE_UNROLL for (int k = 0; k < kTaps; ++k) factors[k] = (__m512bh)_mm512_load_si512(weights_[pair][k]);
        FASTODE_UNROLL for (int r = 0; r < R; ++r) {
          const __m512bh one = pair_in_all(at + 2 * r * pixel);
          FASTODE_UNROLL for (int k = 0; k < kTaps; ++k) total[r][k] = _mm512_dpbf16_ps(total[r][k], one, factors[k]);
        }
      }
      put_sums_at(total, {row[x + 1][0], kTaps * kLanes<float>, kLanes<float>});
    }
    std::memset(row[0], 0, sizeof(row[0]));
    std::memset(row[width_ + 1], 0, sizeof(row[0]));
  }

  void add_up(const ConvJob<bfloat16>& job, const float* bias, int64_t y) const {
    using V = Vec<float>;
    const int64_t first = std::max<int64_t>(0, 1 - y), last = std::min<int64_t>(kTaps, height_ + 1 - y);
    const V offset = bias ? load<V>(bias) : V{};
    const Combine<bfloat16>& combine = job.combine;
    for (int64_t x = 0; x < width_; ++x) {
      __m128 sum = _mm_setzero_ps();
      for (int64_t ky = first; ky < last; ++ky)
        FASTODE_UNROLL for (int kx = 0; kx < kTaps; ++kx) sum =
            _mm_add_ps(sum, _mm_load_ps(products_[(y + ky - 1) % kTaps][x + kx][ky] + kx * kFewOutputs));
      V value = ((V)_mm512_zextps128_ps512(sum) + offset) * combine.scale;
      for (int t = 0; t < combine.count; ++t) value += combine.coef[t] * load_stored(combine.term[t].pixel_at(0, y, x));
      store_stored(job.out.pixel_at(0, y, x), value);
    }
  }

  const int64_t height_, width_, pairs_;
  alignas(64) int32_t weights_[kFewPairs][kTaps][kLanes<float>] = {};
  alignas(64) Row products_[kTaps];
};

}  // namespace
}  // namespace fastode::resident

// Weights for products of bfloat16 matrices, packed in the order of their steps. Included by conv_bf16_impl.h.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "conv_bf16.h"
#include "packing.h"
#include "products.h"

namespace fastode::resident {
namespace {

// The steps of a convolution's sum: 32 channels of one tap, or 16 channels of two neighbouring taps.
struct Steps {
  bool paired;
  int64_t blocks, high, wide;
  bool half;  // there is no second tap, or no second block of 16 channels, in the last step

  explicit Steps(const ConvShape& shape)
      : paired(shape.in_channels <= Narrow::lanes),
        blocks(paired ? 1 : divide_up(shape.in_channels, kTileDepth)),
        high(shape.kernel_h),
        wide(paired ? divide_up(shape.kernel_w, 2) : shape.kernel_w),
        half((paired ? shape.kernel_w : divide_up(shape.in_channels, Narrow::lanes)) % 2) {}

  int64_t count() const { return blocks * high * wide; }
  // Pairs of a step's weights that may be other than zero.
  int64_t pairs(int64_t block, int64_t x) const {
    return half && (paired ? x + 1 == wide : block + 1 == blocks) ? kTileRows / 2 : kTileRows;
  }
};

// Pairs of two input channels' weights for some output channels, `stride` apart; `high` is null where it is zero.
inline void pack_pairs(const bfloat16* low, const bfloat16* high, int64_t stride, int64_t lanes, bfloat16* to) {
  for (int64_t lane = 0; lane < lanes; ++lane) {
    to[2 * lane] = low[lane * stride];
    if (high) to[2 * lane + 1] = high[lane * stride];
  }
}

inline void pack_pairs(const float* low, const float* high, int64_t stride, int64_t lanes, bfloat16* to) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i places = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(stride)));
  const auto mask = static_cast<__mmask16>((1 << lanes) - 1);
  typedef uint16_t Halves __attribute__((vector_size(32)));
  typedef uint32_t Pairs __attribute__((vector_size(64)));
  const auto rounded = [&](const float* from) {
    const __m512 values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, places, from, sizeof(float));
    return __builtin_convertvector((Halves)_mm512_cvtneps_pbh(values), Pairs);
  };
  Pairs pairs = rounded(low);
  if (high) pairs |= rounded(high) << 16;
  std::memcpy(to, &pairs, sizeof(pairs));
}

inline int64_t group_of(int64_t tiles) { return tiles % 2 == 0 ? 2 : 1; }

}  // namespace

int64_t tile_weights_size(const ConvShape& shape) {
  return blocks_of<float>(shape.out_channels) * Steps(shape).count() * kTileElements / 2;
}

namespace {

// One kernel's weights for a group of output tiles. Order: [step][output tile][pair of summed numbers][output
// channel][of the pair]. Returns the end.
template <class T>
bfloat16* pack_kernel(const ConvShape& shape, const WeightView<T>& weight, int64_t first, int64_t group, bfloat16* to) {
  const Steps steps(shape);
  const int64_t depth = shape.in_channels <= 16 ? 16 : 32;
  std::fill_n(to, group * steps.count() * kTileElements, bfloat16{0});
  for (int64_t block = 0; block < steps.blocks; ++block)
    for (int64_t ky = 0; ky < steps.high; ++ky)
      for (int64_t step = 0; step < steps.wide; ++step)
        for (int64_t tile = first; tile < first + group; ++tile, to += kTileElements)
          for (int64_t k = 0; k < kTileDepth; k += 2) {
            const int64_t in = block * depth + k % depth, kx = step * (kTileDepth / depth) + k / depth;
            if (in >= shape.in_channels || kx >= shape.kernel_w) continue;
            const int64_t out = tile * kLanes<float>,
                          lanes = std::min<int64_t>(kLanes<float>, shape.out_channels - out);
            const T* from = weight.at + out * weight.out + in * weight.in + ky * weight.y + kx * weight.x;
            const T* next = in + 1 < shape.in_channels ? from + weight.in : nullptr;
            pack_pairs(from, next, weight.out, lanes, to + k / 2 * kTileDepth);
          }
  return to;
}

// f(first, count) for the groups of a convolution's output tiles.
template <class F>
void each_group(int64_t out_channels, const F& f) {
  const int64_t tiles = blocks_of<float>(out_channels), group = group_of(tiles);
  for (int64_t first = 0; first < tiles; first += group) f(first, group);
}

// The kernel of a parity, and that which pulls back to it.
ConvShape forward_part(const ConvShape& shape, const ParityTaps& rows, const ParityTaps& columns) {
  return {shape.in_channels, shape.out_channels, rows.count, columns.count};
}
ConvShape backward_part(const ConvShape& shape, const ParityTaps& rows, const ParityTaps& columns) {
  return {shape.out_channels, shape.in_channels, rows.count, columns.count};
}

}  // namespace

template <class T>
void pack_tile_weights(const ConvShape& shape, bool flip, const T* weight, const int64_t* strides, float* packed) {
  const WeightView<T> view(flip ? shape.transposed() : shape, weight, strides);
  const WeightView<T> seen = flip ? view.back(shape.kernel_h - 1, shape.kernel_w - 1, 1) : view;
  bfloat16* to = reinterpret_cast<bfloat16*>(packed);
  each_group(shape.out_channels,
             [&](int64_t first, int64_t group) { to = pack_kernel(shape, seen, first, group, to); });
}

int64_t strided_tile_weights_size(const ConvShape& shape, bool back) {
  int64_t size = 0;
  each_parity(shape, [&](int64_t, int64_t, const ParityTaps& rows, const ParityTaps& columns) {
    size += tile_weights_size((back ? backward_part : forward_part)(shape, rows, columns));
  });
  return size;
}

template <class T>
void pack_strided_tile_weights(const ConvShape& shape, bool back, const T* weight, const int64_t* strides,
                               float* packed) {
  const WeightView<T> view(shape, weight, strides);
  bfloat16* to = reinterpret_cast<bfloat16*>(packed);
  if (back)
    return each_parity(shape, [&](int64_t, int64_t, const ParityTaps& rows, const ParityTaps& columns) {
      const ConvShape part = backward_part(shape, rows, columns);
      const WeightView<T> seen = view.back(rows.last, columns.last, 2);
      each_group(part.out_channels,
                 [&](int64_t first, int64_t group) { to = pack_kernel(part, seen, first, group, to); });
    });
  each_group(shape.out_channels, [&](int64_t first, int64_t group) {
    each_parity(shape, [&](int64_t, int64_t, const ParityTaps& rows, const ParityTaps& columns) {
      WeightView<T> seen = view;
      seen.at += rows.first * view.y + columns.first * view.x, seen.y *= 2, seen.x *= 2;
      to = pack_kernel(forward_part(shape, rows, columns), seen, first, group, to);
    });
  });
}

template void pack_strided_tile_weights(const ConvShape&, bool, const float*, const int64_t*, float*);
template void pack_strided_tile_weights(const ConvShape&, bool, const bfloat16*, const int64_t*, float*);
template void pack_tile_weights(const ConvShape&, bool, const float*, const int64_t*, float*);
template void pack_tile_weights(const ConvShape&, bool, const bfloat16*, const int64_t*, float*);

}  // namespace fastode::resident

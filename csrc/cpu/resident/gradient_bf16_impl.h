// The weight gradient on tiles. Included after conv_bf16_impl.h.
#pragma once

#include "conv_bf16_impl.h"

namespace fastode::resident {

// The weight gradient sums over pixels. Its left factor is the input as rows of channels along the pixels of the plane,
// so a tap is an offset; its right factor is the cotangent with neighbouring pixels paired, 32 pixels to a tile.
namespace {

struct PixelTiles {
  int64_t first, chunks,
      pitch;  // first pixel and number of cotangent tiles; length of an input row, which ends in zeros

  explicit PixelTiles(const Plane<float>& plane)
      : first(origin_of(plane)), chunks(divide_up(plane.height * row_of(plane), kTileDepth)) {
    const int64_t length = first + chunks * kTileDepth + plane.halo * row_of(plane) + plane.halo;
    pitch =
        (divide_up(std::max(length, pixels_of(plane)), kTileDepth) | 1) * kTileDepth;  // odd: rows in different sets
  }
};

typedef int16_t Pairs __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(64)));  // pairs, one per lane

// Pixels p and p + 1 of a block as 16 pairs, rounded; zero behind the plane.
inline Words pair_of(const float* block, int64_t p, int64_t pixels) {
  using V = Vec<float>;
  constexpr int64_t lanes = kLanes<float>;
  alignas(64) bfloat16 rounded[2 * lanes];
  store_narrow(rounded, p < pixels ? load<V>(block + p * lanes) : V{},
               p + 1 < pixels ? load<V>(block + (p + 1) * lanes) : V{});
  Pairs value;
  std::memcpy(&value, rounded, sizeof(value));
  const Pairs pairs = __builtin_shufflevector(value, value, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8,
                                              24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return reinterpret_cast<Words>(pairs);
}

// Transposes 16 x 16 words in four rounds of shuffles.
inline void transpose(Words* r) {
  Words t[16];
  FASTODE_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  const auto low = [](Words a, Words b) {
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  };
  const auto high = [](Words a, Words b) {
    return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  };
  FASTODE_UNROLL for (int i = 0; i < 16; i += 4) {
    r[i] = low(t[i], t[i + 2]);
    r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]);
    r[i + 3] = high(t[i + 1], t[i + 3]);
  }
  const auto even = [](Words a, Words b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  };
  const auto odd = [](Words a, Words b) {
    return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  };
  FASTODE_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = even(r[i], r[i + 4]);
    t[i + 4] = odd(r[i], r[i + 4]);
    t[i + 8] = even(r[i + 8], r[i + 12]);
    t[i + 12] = odd(r[i + 8], r[i + 12]);
  }
  FASTODE_UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = even(t[i], t[i + 8]);
    r[i + 8] = odd(t[i], t[i + 8]);
    r[i + 4] = even(t[i + 4], t[i + 12]);
    r[i + 12] = odd(t[i + 4], t[i + 12]);
  }
}

// to: [block][channel][pitch]
void transpose_input(const Plane<float>& plane, int64_t blocks, const PixelTiles& tiles, const float* in,
                     bfloat16* to) {
  for (int64_t b = 0; b < blocks; ++b, in += plane.size, to += kTileRows * tiles.pitch)
    for (int64_t p = 0; p < tiles.pitch; p += kTileDepth) {
      Words rows[16];
      FASTODE_UNROLL for (int i = 0; i < 16; ++i) rows[i] = pair_of(in, p + 2 * i, pixels_of(plane));
      transpose(rows);
      FASTODE_UNROLL for (int i = 0; i < 16; ++i) std::memcpy(to + i * tiles.pitch + p, rows + i, sizeof(Words));
    }
}

// to: [block][chunk] tiles
void pair_cotangent(const Plane<float>& plane, int64_t blocks, const PixelTiles& tiles, const float* in, bfloat16* to) {
  for (int64_t b = 0; b < blocks; ++b, in += plane.size)
    for (int64_t p = tiles.first; p < tiles.first + tiles.chunks * kTileDepth; p += 2, to += kTileDepth) {
      const Words pairs = pair_of(in, p, pixels_of(plane));
      std::memcpy(to, &pairs, sizeof(pairs));
    }
}

struct GradientRun {
  const bfloat16 *in, *cotangent;  // of the first pair
  int64_t pairs, in_pair, cotangent_pair, chunks, in_bytes, cotangent_block, gradient_bytes;
};

// Adds M x N tiles: of 16 input channels at one tap each, from offset[m] of the input, times N times 16 output
// channels.
template <int M, int N>
void add_gradient(const GradientRun& run, const int64_t* offset, float* const* gradient, int64_t out_stride) {
  static_assert((N == 2 && M <= 2) || (N == 1 && M <= 3));
  constexpr int b = 4;
  tile_load<0>(gradient[0], run.gradient_bytes);
  if constexpr (N == 2) tile_load<1>(gradient[0] + out_stride, run.gradient_bytes);
  if constexpr (M > 1) tile_load<N>(gradient[1], run.gradient_bytes);
  if constexpr (M > 1 && N == 2) tile_load<N + 1>(gradient[1] + out_stride, run.gradient_bytes);
  if constexpr (M > 2) tile_load<2>(gradient[2], run.gradient_bytes);
  for (int64_t n = 0; n < run.pairs; ++n) {
    const bfloat16 *in = run.in + n * run.in_pair, *cotangent = run.cotangent + n * run.cotangent_pair;
    for (int64_t k = 0; k < run.chunks; ++k, in += kTileDepth, cotangent += kTileElements) {
      tile_load<b>(cotangent, 64);
      if constexpr (N == 2) tile_load<b + 1>(cotangent + run.cotangent_block, 64);
      tile_load<6>(in + offset[0], run.in_bytes);
      tile_multiply<0, 6, b>();
      if constexpr (N == 2) tile_multiply<1, 6, b + 1>();
      if constexpr (M > 1) {
        tile_load<7>(in + offset[1], run.in_bytes);
        tile_multiply<N, 7, b>();
        if constexpr (N == 2) tile_multiply<N + 1, 7, b + 1>();
      }
      if constexpr (M > 2) {
        tile_load<5>(in + offset[2], run.in_bytes);
        tile_multiply<2, 5, b>();
      }
    }
  }
  tile_store<0>(gradient[0], run.gradient_bytes);
  if constexpr (N == 2) tile_store<1>(gradient[0] + out_stride, run.gradient_bytes);
  if constexpr (M > 1) tile_store<N>(gradient[1], run.gradient_bytes);
  if constexpr (M > 1 && N == 2) tile_store<N + 1>(gradient[1] + out_stride, run.gradient_bytes);
  if constexpr (M > 2) tile_store<2>(gradient[2], run.gradient_bytes);
}

}  // namespace

int64_t tile_scratch_size(const Plane<float>& plane, int64_t in_channels, int64_t out_channels, int64_t pairs) {
  const PixelTiles tiles(plane);
  const int64_t input = blocks_of<float>(in_channels) * kTileRows * tiles.pitch;
  const int64_t cotangent = blocks_of<float>(out_channels) * tiles.chunks * kTileElements;
  return pairs * (input + cotangent) * static_cast<int64_t>(sizeof(bfloat16));
}

void weight_gradient(const Plane<float>& plane, const ConvShape& shape, const GradientPair<float>* pairs, int64_t count,
                     float* gradient, void* scratch) {
  const PixelTiles tiles(plane);
  const int64_t in_blocks = blocks_of<float>(shape.in_channels), out_blocks = blocks_of<float>(shape.out_channels);
  const int64_t in_pair = in_blocks * kTileRows * tiles.pitch,
                cotangent_pair = out_blocks * tiles.chunks * kTileElements;
  bfloat16* inputs = static_cast<bfloat16*>(scratch);
  bfloat16* cotangents = inputs + count * in_pair;
  for (int64_t n = 0; n < count; ++n) {
    transpose_input(plane, in_blocks, tiles, pairs[n].in.at - plane.origin, inputs + n * in_pair);
    pair_cotangent(plane, out_blocks, tiles, pairs[n].cotangent.at - plane.origin, cotangents + n * cotangent_pair);
  }

  const TileScope scope;
  constexpr int64_t lanes = kLanes<float>;
  const int64_t taps = shape.kernel_h * shape.kernel_w, rows = in_blocks * taps;
  const int64_t out_stride = rows * lanes * lanes, cotangent_block = tiles.chunks * kTileElements;
  GradientRun run{inputs,          cotangents,      count,
                  in_pair,         cotangent_pair,  tiles.chunks,
                  tiles.pitch * 2, cotangent_block, shape.kernel_w * lanes * 4};
  const auto walk = [&](auto many, auto group) {
    constexpr int M = many(), N = group();
    for (int64_t ob = 0; ob < out_blocks; ob += N, run.cotangent += N * cotangent_block) {
      int64_t offset[M];
      float* to[M];
      int64_t filled = 0;
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t ib = row / taps, ky = row % taps / shape.kernel_w, kx = row % shape.kernel_w;
        offset[filled] = ib * kTileRows * tiles.pitch + tiles.first + (ky - shape.kernel_h / 2) * row_of(plane) + kx -
                         shape.kernel_w / 2;
        to[filled] = gradient + ob * out_stride + ((ib * shape.kernel_h + ky) * lanes * shape.kernel_w + kx) * lanes;
        if (++filled == M) add_gradient<M, N>(run, offset, to, out_stride), filled = 0;
      }
      for (int64_t i = 0; i < filled; ++i) add_gradient<1, N>(run, offset + i, to + i, out_stride);
    }
  };
  if (group_of(out_blocks) == 2)
    walk(std::integral_constant<int, 2>{}, std::integral_constant<int, 2>{});
  else
    walk(std::integral_constant<int, 3>{}, std::integral_constant<int, 1>{});
}

}  // namespace fastode::resident

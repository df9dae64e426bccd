// The weight gradient on tiles. Included after conv_bf16_impl.h.
#pragma once

#include "conv_bf16_impl.h"

namespace fastode::resident {

// The weight gradient sums over positions: the pixels of an image and, in turn, of the samples that lie together. Its
// left factor is the input as rows of channels along the positions, a copy for each of the kernel's columns, so that a
// kernel's row is an offset by whole rows of the image: tiles that begin anywhere take six times as long to load. Its
// right factor is the cotangent with neighbouring positions paired, 32 to a tile.
namespace {

struct Positions {
  int64_t span, pad, rows;  // span: positions of an image's row; rows: of a copy, with those that the kernel adds
  int64_t chunks, pitch;    // chunks: of 32 positions; pitch: of a channel of a copy

  Positions(const Plane<float>& plane, const ConvShape& shape, int64_t together)
      : span(plane.width * together),
        pad(shape.kernel_h / 2),
        rows(plane.height + 2 * pad),
        chunks(divide_up(plane.height * span, kTileDepth)),
        // Odd, so that the channels lie in different sets of the cache.
        pitch((divide_up(chunks * kTileDepth + 2 * pad * span, kTileDepth) | 1) * kTileDepth) {}

  int64_t input(const ConvShape& shape) const {
    return blocks_of<float>(shape.in_channels) * shape.kernel_w * kTileRows * pitch;
  }
  int64_t cotangent(const ConvShape& shape) const {
    return blocks_of<float>(shape.out_channels) * chunks * kTileElements;
  }
};

// The positions of some rows of a Narrow map, one after the other, and zeros behind them.
class Source {
 public:
  Source(const bfloat16* at, const Narrow& narrow, int64_t span, int64_t rows)
      : at_(at), depth_(narrow.depth), gap_(narrow.row - span * narrow.depth), span_(span), left_(span), rows_(rows) {}

  const bfloat16* next() {
    static constexpr bfloat16 zeros[Narrow::lanes] = {};
    if (rows_ == 0) return zeros;
    const bfloat16* here = at_;
    at_ += depth_;
    if (--left_ == 0) at_ += gap_, left_ = span_, --rows_;
    return here;
  }

 private:
  const bfloat16* at_;
  int64_t depth_, gap_, span_, left_, rows_;
};

typedef int16_t Numbers __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(64)));  // pairs of numbers, one per lane

// 16 channels of two neighbouring positions as 16 pairs.
inline Words pair_of(const bfloat16* low, const bfloat16* high) {
  typedef int16_t Half __attribute__((vector_size(32)));
  Half a, b;
  std::memcpy(&a, low, sizeof(a));
  std::memcpy(&b, high, sizeof(b));
  const Numbers pairs = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9,
                                                25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
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

// to: [channel][pitch], of one block and column of the kernel.
void transpose_input(const Positions& positions, Source from, bfloat16* to) {
  for (int64_t p = 0; p < positions.pitch; p += kTileDepth) {
    Words rows[16];
    for (int i = 0; i < 16; ++i) {
      const bfloat16* low = from.next();
      rows[i] = pair_of(low, from.next());
    }
    transpose(rows);
    FASTODE_UNROLL for (int i = 0; i < 16; ++i) std::memcpy(to + i * positions.pitch + p, rows + i, sizeof(Words));
  }
}

// to: [chunk] tiles, of one block.
void pair_cotangent(const Positions& positions, Source from, bfloat16* to) {
  for (int64_t p = 0; p < positions.chunks * kTileDepth; p += 2, to += kTileDepth) {
    const bfloat16* low = from.next();
    const Words pairs = pair_of(low, from.next());
    std::memcpy(to, &pairs, sizeof(pairs));
  }
}

struct GradientRun {
  const bfloat16 *in, *cotangent;  // of the first set
  int64_t sets, in_set, cotangent_set, in_bytes, cotangent_block, gradient_bytes;
  int64_t first, last;  // chunks
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
  for (int64_t n = 0; n < run.sets; ++n) {
    const bfloat16* in = run.in + n * run.in_set + run.first * kTileDepth;
    const bfloat16* cotangent = run.cotangent + n * run.cotangent_set + run.first * kTileElements;
    for (int64_t k = run.first; k < run.last; ++k, in += kTileDepth, cotangent += kTileElements) {
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

int64_t tile_scratch_size(const Plane<float>& plane, const ConvShape& shape, int64_t together, int64_t pairs) {
  const Positions positions(plane, shape, together);
  const int64_t set = positions.input(shape) + positions.cotangent(shape);
  return divide_up(pairs, together) * set * static_cast<int64_t>(sizeof(bfloat16));
}

void weight_gradient(const Plane<float>& plane, const ConvShape& shape, int64_t together,
                     const GradientPair<bfloat16>* pairs, int64_t count, float* gradient, void* scratch) {
  constexpr int64_t lanes = kLanes<float>;
  const Positions positions(plane, shape, together);
  const Narrow input(plane, shape.in_channels, together), cotangent(plane, shape.out_channels, together);
  const int64_t in_blocks = blocks_of<float>(shape.in_channels), out_blocks = blocks_of<float>(shape.out_channels);
  const int64_t copy = kTileRows * positions.pitch, block = positions.chunks * kTileElements;
  const int64_t in_set = positions.input(shape), cotangent_set = positions.cotangent(shape);
  const int64_t sets = divide_up(count, together);
  bfloat16* inputs = static_cast<bfloat16*>(scratch);
  bfloat16* cotangents = inputs + sets * in_set;
  for (int64_t n = 0; n < sets; ++n) {
    const GradientPair<bfloat16>& pair = pairs[n * together];
    const bfloat16* corner = pair.in.at - positions.pad * input.row - shape.kernel_w / 2 * input.pixel;
    bfloat16* to = inputs + n * in_set;
    for (int64_t ib = 0; ib < in_blocks; ++ib)
      for (int64_t kx = 0; kx < shape.kernel_w; ++kx, to += copy)
        transpose_input(positions, {corner + ib * lanes + kx * input.pixel, input, positions.span, positions.rows}, to);
    for (int64_t ob = 0; ob < out_blocks; ++ob)
      pair_cotangent(positions, {pair.cotangent.at + ob * lanes, cotangent, positions.span, plane.height},
                     cotangents + n * cotangent_set + ob * block);
  }

  const TileScope scope;
  const int64_t out_stride = in_blocks * shape.kernel_h * shape.kernel_w * lanes * lanes;
  GradientRun run{inputs,        cotangents,          sets,  in_set,
                  cotangent_set, positions.pitch * 2, block, shape.kernel_w * lanes * 4};
  const auto walk = [&](auto many, auto group) {
    constexpr int M = many(), N = group();
    for (int64_t ob = 0; ob < out_blocks; ob += N, run.cotangent += N * block)
      for (int64_t ky = 0; ky < shape.kernel_h; ++ky) {
        // Those with rows whose input row exists.
        run.first = std::max<int64_t>(0, positions.pad - ky) * positions.span / kTileDepth;
        const int64_t last = std::min(plane.height, plane.height + positions.pad - ky);
        run.last = divide_up(last * positions.span, kTileDepth);
        int64_t offset[M];
        float* to[M];
        int64_t filled = 0;
        for (int64_t ib = 0; ib < in_blocks; ++ib)
          for (int64_t kx = 0; kx < shape.kernel_w; ++kx) {
            offset[filled] = (ib * shape.kernel_w + kx) * copy + ky * positions.span;
            to[filled] =
                gradient + ob * out_stride + ((ib * shape.kernel_h + ky) * lanes * shape.kernel_w + kx) * lanes;
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

// Included by one .cpp, where the compiler has AMX or the dot products, after gradient_bf16_impl.h.
#pragma once

#include "gradient_bf16_impl.h"
#include "skew_bf16.h"

namespace fastode::resident {
namespace {

struct RowRun {
  const std::vector<int64_t>& rows;  // elements from where a tile begins
  const Steps& steps;                // of a row
  int64_t step;                      // elements
  int64_t pixel_bytes;
  const bfloat16* weights;
  Ahead* ahead;
};

constexpr int64_t kSoon = 4;  // lines of the next maps that are asked for at a step

// As multiply(), of rows of taps that lie anywhere.
template <int M, int N>
void multiply_rows(const RowRun& run, const bfloat16* const* in, float* sums) {
  const int64_t wide = run.steps.wide, count = static_cast<int64_t>(run.rows.size()) * wide;
  const char* soon = run.ahead ? run.ahead->take(count * kSoon) : nullptr;
  const int64_t soon_step = soon ? Ahead::line : 0;
  if (!soon) soon = reinterpret_cast<const char*>(run.weights);
  multiply_steps<M, N>(
      count, true,
      [&](const TileRows&, const auto& step, const auto&) {
        const bfloat16* weights = run.weights;
        for (int64_t offset : run.rows) {
          if constexpr (kPairwise) {
            multiply_taps<N>(run.steps, weights, offset, run.step, 0, run.steps.taps, true, step);
            weights += run.steps.blocks * wide * N * kTileElements;
            continue;
          }
          for (int64_t x = 0; x < wide; ++x, offset += run.step, weights += N * kTileElements)
            step(weights, offset, kTileRows);
        }
      },
      in, run.pixel_bytes, sums,
      [&] { FASTODE_UNROLL for (int i = 0; i < kSoon; ++i, soon += soon_step) __builtin_prefetch(soon, 0, 2); });
}

// out = combine(sums) on `count` neighbouring pixels.
inline void put_sums(const float* sums, int64_t b, int64_t y, int64_t x, int64_t count, const View<float>& out,
                     const Combine<float>& combine) {
  using V = Vec<float>;
  for (int64_t i = 0; i < count; ++i) {
    V value = load<V>(sums + i * kLanes<float>) * combine.scale;
    for (int t = 0; t < combine.count; ++t) value += combine.coef[t] * load<V>(combine.term[t].pixel_at(b, y, x + i));
    store<V>(out.pixel_at(b, y, x + i), value);
  }
}

// The output pixels in tiles of 16: cut out of the rows if they divide the width, else out of the rows and their halos
// laid end to end, whose sums in the halo are dropped.
struct PixelTiling {
  int64_t width, row, per_row, count, end;

  explicit PixelTiling(const Plane<float>& plane)
      : width(plane.width),
        row(plane.row / kLanes<float>),
        per_row(plane.width % kTileRows == 0 ? plane.width / kTileRows : 0),
        count(per_row ? plane.height * per_row : divide_up(plane.height * row, kTileRows)),
        end(plane.height * row) {}

  int64_t first(int64_t tile) const {
    return per_row ? tile / per_row * row + tile % per_row * kTileRows : tile * kTileRows;
  }

  // Calls f(row of the tile, y, x, how many) for every run of pixels inside the image.
  template <class F>
  void runs(int64_t tile, const F& f) const {
    const int64_t start = first(tile), stop = std::min(start + kTileRows, end);
    int64_t pixel = start, y = start / row, x = start % row;
    if (per_row) return f(0, y, x, kTileRows);
    while (pixel < stop) {
      const int64_t run = std::min(width - x, stop - pixel);
      if (run > 0) f(pixel - start, y, x, run);
      pixel += row - x;
      x = 0, ++y;
    }
  }
};

// Every output channel of the pixels of `plane`, which is a band; `in` is where its first pixel's sums begin.
void convolve_rows(RowRun run, const Plane<float>& plane, int64_t out_channels, int64_t depth, const bfloat16* in,
                   const View<float>& out, const Combine<float>& combine) {
  const TileScope scope;
  const PixelTiling tiling(plane);
  const int64_t blocks = blocks_of<float>(out_channels);
  const auto walk = [&](auto many, auto group) {
    constexpr int N = group();
    const auto tiles = [&](auto count, int64_t tile, int64_t block) {
      constexpr int M = count();
      alignas(64) float sums[M * N * kSumElements];
      const bfloat16* from[M];
      for (int m = 0; m < M; ++m) from[m] = in + tiling.first(tile + m) * depth;
      multiply_rows<M, N>(run, from, sums);
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n)
          tiling.runs(tile + m, [&](int64_t at, int64_t y, int64_t x, int64_t pixels) {
            put_sums(sums + (m * N + n) * kSumElements + at * kLanes<float>, block + n, y, x, pixels, out, combine);
          });
    };
    for (int64_t block = 0; block < blocks; block += N) {
      int64_t tile = 0;
      for (; tile + many() <= tiling.count; tile += many()) tiles(many, tile, block);
      for (; tile < tiling.count; ++tile) tiles(std::integral_constant<int, 1>{}, tile, block);
      const int64_t of_row = kPairwise ? run.steps.blocks : 1;
      run.weights += static_cast<int64_t>(run.rows.size()) * of_row * run.steps.wide * N * kTileElements;
    }
  };
  if (group_of(blocks) == 2)
    walk(std::integral_constant<int, 2>{}, std::integral_constant<int, 2>{});
  else
    walk(std::integral_constant<int, 4>{}, std::integral_constant<int, 1>{});
}

// Pixels p and p + 1 of a block as 16 pairs; zero from `end` on.
inline Words pair_at(const bfloat16* block, int64_t p, int64_t end, int64_t depth) {
  typedef int16_t Half __attribute__((vector_size(32)));
  Half one = {}, two = {};
  if (p < end) std::memcpy(&one, block + p * depth, sizeof(one));
  if (p + 1 < end) std::memcpy(&two, block + (p + 1) * depth, sizeof(two));
  const Numbers pairs = __builtin_shufflevector(one, two, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24,
                                                9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return reinterpret_cast<Words>(pairs);
}

struct TapRun {
  const bfloat16 *in, *cotangent;
  int64_t chunks, in_bytes, cotangent_block, gradient_bytes;
};

// Adds M x N tiles: of 16 input channels at one tap each, from offset[m] of the input, times N times 16 output
// channels.
template <int M, int N>
void add_taps(const TapRun& run, const int64_t* offset, float* const* gradient, int64_t out_stride) {
  add_chunks<M, N>(
      [&](int, const auto& chunk) {
        const bfloat16 *in = run.in, *cotangent = run.cotangent;
        for (int64_t k = 0; k < run.chunks; ++k, in += kTileDepth, cotangent += kTileElements)
          chunk(in, cotangent, kTileRows);
      },
      kTileRows, offset, run.in_bytes, run.cotangent_block, gradient, run.gradient_bytes, out_stride);
}

}  // namespace

SkewTiles::SkewTiles(const SkewShape& shape)
    : on_(true),
      shape_(shape),
      y_(shape.y_plane<float>(), shape.channels),
      z_(shape.y_plane<float>(), shape.in_channels) {
  const auto rows_of = [](const ConvShape& conv, const TileMap& map, int64_t shift, std::vector<int64_t>& rows) {
    const Steps steps(conv);
    for (int64_t block = 0; block < (kPairwise ? 1 : steps.blocks); ++block)
      for (int64_t y = 0; y < steps.high; ++y) rows.push_back(shift + block * kTileDepth + y * map.row * map.depth);
  };
  const ConvShape back = part().transposed();
  if (shape.stride == 1) {
    const int64_t pad = shape.halo() * (z_.row + 1);
    rows_of(part(), z_, -pad * z_.depth, down_rows_);
    rows_of(back, y_, -pad * y_.depth, up_rows_);
    return;
  }
  // Row k of W meets row 2 i + k - 1 of z: rows i and i + 1 of the even ones, i - 1 and i of the odd ones.
  for (int64_t py = 0; py < 2; ++py)
    for (int64_t px = 0; px < 2; ++px)
      rows_of(part(), z_, (2 * py + px) * z_.size - (py * z_.row + px) * z_.depth, down_rows_);
  rows_of(back, y_, 0, up_rows_);
}

ConvShape SkewTiles::part() const {
  const int64_t kernel = shape_.kernel / shape_.stride;
  return {shape_.in_channels, shape_.channels, kernel, kernel};
}

int64_t SkewTiles::down_size() const { return shape_.stride * shape_.stride * tile_weights_size(part()); }
int64_t SkewTiles::up_size() const { return shape_.stride * shape_.stride * tile_weights_size(part().transposed()); }

template <class T>
void SkewTiles::pack(const T* weight, const int64_t* strides, float* down, float* up) const {
  if (shape_.stride == 1) {
    pack_tile_weights(part(), false, weight, strides, down);
    return pack_tile_weights(part().transposed(), true, weight, strides, up);
  }
  const int64_t lanes = kLanes<float>, outputs = lanes * group_of(blocks_of<float>(shape_.channels));
  const int64_t second[4] = {strides[0], strides[1], 2 * strides[2], 2 * strides[3]};
  const int64_t back[4] = {strides[1], strides[0], -2 * strides[2], -2 * strides[3]};
  const auto tap = [&](int64_t y, int64_t x) { return weight + y * strides[2] + x * strides[3]; };
  for (int64_t out = 0; out < shape_.channels; out += outputs)
    for (int64_t py = 0; py < 2; ++py)
      for (int64_t px = 0; px < 2; ++px) {
        const ConvShape group{shape_.in_channels, std::min(outputs, shape_.channels - out), 2, 2};
        pack_tile_weights(group, false, tap(1 - py, 1 - px) + out * strides[0], second, down);
        down += tile_weights_size(group);
      }
  const ConvShape transposed = part().transposed();
  for (int64_t py = 0; py < 2; ++py)
    for (int64_t px = 0; px < 2; ++px, up += tile_weights_size(transposed))
      pack_tile_weights(transposed, false, tap(3 - py, 3 - px), back, up);
}

template void SkewTiles::pack(const float*, const int64_t*, float*, float*) const;
template void SkewTiles::pack(const bfloat16*, const int64_t*, float*, float*) const;

void SkewTiles::round(bool y, const View<float>& from, int64_t first, int64_t rows, bfloat16* to) const {
  using V = Vec<float>;
  const TileMap& map = y ? y_ : z_;
  const int64_t blocks = blocks_of<float>(y ? shape_.channels : shape_.in_channels), step = y ? 1 : shape_.stride;
  for (int64_t row = first; row < first + rows; ++row)
    for (int64_t px = 0; px < step; ++px) {
      bfloat16* pixel = to + (row % step * step + px) * map.size + (map.origin + row / step * map.row) * map.depth;
      for (int64_t x = px; x < shape_.width * step; x += step, pixel += map.depth)
        for (int64_t b = 0; b < blocks; b += 2) {
          const V low = load<V>(from.pixel_at(b, row - first, x));
          if (b + 1 < blocks) {
            const auto both = _mm512_cvtne2ps_pbh((__m512)load<V>(from.pixel_at(b + 1, row - first, x)), (__m512)low);
            std::memcpy(pixel + b * kLanes<float>, &both, sizeof(both));
          } else {
            const auto one = _mm512_cvtneps_pbh((__m512)low);
            std::memcpy(pixel + b * kLanes<float>, &one, sizeof(one));
          }
        }
    }
}

void SkewTiles::down(const float* packed, const bfloat16* z, int64_t first, int64_t rows, const View<float>& out,
                     const Combine<float>& combine, Ahead* ahead) const {
  const Steps steps(part());
  const RowRun run{
      down_rows_, steps, std::max(kTileDepth, z_.depth), z_.depth * 2, reinterpret_cast<const bfloat16*>(packed),
      ahead};
  convolve_rows(run, {rows, shape_.width, shape_.halo()}, shape_.channels, z_.depth,
                z + (z_.origin + first * z_.row) * z_.depth, out, combine);
}

void SkewTiles::up(const float* packed, const bfloat16* y, int64_t first, int64_t rows, const View<float>& out,
                   const Combine<float>& combine, Ahead* ahead) const {
  const ConvShape transposed = part().transposed();
  const Steps steps(transposed);
  RowRun run{up_rows_, steps, std::max(kTileDepth, y_.depth), y_.depth * 2, reinterpret_cast<const bfloat16*>(packed),
             ahead};
  const Plane<float> band(rows, shape_.width, shape_.halo());
  const bfloat16* in = y + (y_.origin + first * y_.row) * y_.depth;
  if (shape_.stride == 1) return convolve_rows(run, band, shape_.in_channels, y_.depth, in, out, combine);
  // Row 2 i + parity of z meets the rows i - 1 and i of y, or i and i + 1.
  for (int64_t py = 0; py < 2; ++py)
    for (int64_t px = 0; px < 2; ++px, run.weights += 2 * tile_weights_size(transposed)) {
      Combine<float> part = combine;
      for (int i = 0; i < part.count; ++i) part.term[i] = parity(part.term[i], py, px);
      convolve_rows(run, band, shape_.in_channels, y_.depth, in + ((py - 1) * y_.row + px - 1) * y_.depth,
                    parity(out, py, px), part);
    }
}

int64_t SkewTiles::pitch() const {
  return (divide_up(2 * y_.origin + chunks() * kTileDepth, kTileDepth) | 1) * kTileDepth;  // odd: in different sets
}

int64_t SkewTiles::gradient_scratch() const {
  if (shape_.stride == 1) return divide_up(tile_scratch_size(shape_.y_plane<float>(), part(), 1, 1), 2);
  return 4 * blocks_of<float>(shape_.in_channels) * kTileRows * pitch() +
         blocks_of<float>(shape_.channels) * chunks() * kTileElements;
}

void SkewTiles::weight_gradient(const bfloat16* z, const bfloat16* y, float* gradient, bfloat16* scratch) const {
  if (shape_.stride == 1) {  // where a TileMap is a Narrow map
    const Plane<float> plane = shape_.y_plane<float>();
    const auto view = [&](const bfloat16* map, int64_t channels) {
      return Narrow(plane, channels, 1).view(const_cast<bfloat16*>(map));
    };
    const GradientPair<bfloat16> pair{view(z, shape_.in_channels), view(y, shape_.channels)};
    return resident::weight_gradient(plane, part(), 1, &pair, 1, gradient, scratch);
  }
  const TileScope scope;
  constexpr int64_t lanes = kLanes<float>;
  const int64_t in_blocks = blocks_of<float>(shape_.in_channels), out_blocks = blocks_of<float>(shape_.channels);
  const int64_t pitch = this->pitch(), chunks = this->chunks();
  bfloat16* to = scratch;
  for (int64_t plane = 0; plane < 4; ++plane)
    for (int64_t b = 0; b < in_blocks; ++b, to += kTileRows * pitch) {
      const bfloat16* block = z + plane * z_.size + b * lanes;
      for (int64_t p = 0; p < pitch; p += kTileDepth) {
        Words words[16];
        FASTODE_UNROLL for (int i = 0; i < 16; ++i) words[i] = pair_at(block, p + 2 * i, z_.size / z_.depth, z_.depth);
        transpose(words);
        FASTODE_UNROLL for (int i = 0; i < 16; ++i) std::memcpy(to + i * pitch + p, words + i, sizeof(Words));
      }
    }
  const bfloat16* cotangents = to;
  for (int64_t b = 0; b < out_blocks; ++b)
    for (int64_t p = 0; p < chunks * kTileDepth; p += 2, to += kTileDepth) {
      const Words pairs = pair_at(y + b * lanes, y_.origin + p, y_.size / y_.depth, y_.depth);
      std::memcpy(to, &pairs, sizeof(pairs));
    }

  const int64_t kernel = shape_.kernel, block = chunks * kTileElements;
  const int64_t out_stride = in_blocks * kernel * kernel * lanes * lanes;
  TapRun run{scratch, cotangents, chunks, pitch * 2, block, kernel * lanes * 4};
  // Which plane tap k meets, and which row or column of it.
  const auto parity_of = [](int64_t k) { return (k + 1) % 2; };
  const auto shift_of = [](int64_t k) { return (k + 1) / 2 - 1; };
  const auto walk = [&](auto many, auto group) {
    constexpr int M = many(), N = group();
    for (int64_t ob = 0; ob < out_blocks; ob += N, run.cotangent += N * block) {
      int64_t offset[M], filled = 0;
      float* sums[M];
      for (int64_t ib = 0; ib < in_blocks; ++ib)
        for (int64_t ky = 0; ky < kernel; ++ky)
          for (int64_t kx = 0; kx < kernel; ++kx) {
            const int64_t plane = 2 * parity_of(ky) + parity_of(kx);
            offset[filled] =
                (plane * in_blocks + ib) * kTileRows * pitch + z_.origin + shift_of(ky) * z_.row + shift_of(kx);
            sums[filled] = gradient + ob * out_stride + ((ib * kernel + ky) * lanes * kernel + kx) * lanes;
            if (++filled == M) add_taps<M, N>(run, offset, sums, out_stride), filled = 0;
          }
      for (int64_t i = 0; i < filled; ++i) add_taps<1, N>(run, offset + i, sums + i, out_stride);
    }
  };
  if (group_of(out_blocks) == 2)
    walk(std::integral_constant<int, 2>{}, std::integral_constant<int, 2>{});
  else
    walk(std::integral_constant<int, 3>{}, std::integral_constant<int, 1>{});
}

}  // namespace fastode::resident

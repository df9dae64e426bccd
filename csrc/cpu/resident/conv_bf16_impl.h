// Included by one .cpp, where the compiler has AMX.
#pragma once

#include "conv_bf16.h"
#include "tiles.h"

#define FASTODE_UNROLL _Pragma("GCC unroll 64")

namespace fastode::resident {
namespace {

constexpr int64_t kTileRows = 16, kTileDepth = 32;           // rows of every tile; bfloat16 numbers in a row
constexpr int64_t kTileElements = kTileRows * kTileDepth;    // of a bfloat16 tile
constexpr int64_t kSumElements = kTileRows * kLanes<float>;  // of a float32 tile

static_assert(kLanes<float> == kTileRows);

inline int64_t pixels_of(const Plane<float>& plane) { return plane.size / kLanes<float>; }
inline int64_t row_of(const Plane<float>& plane) { return plane.row / kLanes<float>; }
inline int64_t origin_of(const Plane<float>& plane) { return plane.origin / kLanes<float>; }

// 32 bfloat16 numbers, the first half from `low`.
inline void store_narrow(bfloat16* to, Vec<float> low, Vec<float> high) {
  const auto value = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  std::memcpy(to, &value, sizeof(value));
}

// The steps of a convolution's sum: 32 channels of one tap, or 16 channels of two neighbouring taps. Either way the
// next horizontal step lies kTileDepth elements further.
struct Steps {
  int64_t blocks, high, wide;

  explicit Steps(const ConvShape& shape)
      : blocks(shape.in_channels <= 16 ? 1 : divide_up(shape.in_channels, 32)),
        high(shape.kernel_h),
        wide(shape.in_channels <= 16 ? divide_up(shape.kernel_w, 2) : shape.kernel_w) {}

  int64_t count() const { return blocks * high * wide; }
};

inline bfloat16 round_to_narrow(float value) { return narrow(value); }
inline bfloat16 round_to_narrow(bfloat16 value) { return value; }

inline int64_t group_of(int64_t tiles) { return tiles % 2 == 0 ? 2 : 1; }

struct TileRun {
  Steps steps;
  int64_t block, row, pixel_bytes;
  const bfloat16* weights;
};

// sums [M][N] tiles: of M times 16 pixels, from in[m], and N times 16 output channels.
template <int M, int N>
void multiply(const TileRun& run, const bfloat16* const* in, float* sums) {
  static_assert(M * N <= 4 && N <= 2);
  constexpr int b = 4;
  tile_zero<0>();
  if constexpr (M * N > 1) tile_zero<1>();
  if constexpr (M * N > 2) tile_zero<2>();
  if constexpr (M * N > 3) tile_zero<3>();
  const bfloat16* weights = run.weights;
  for (int64_t block = 0; block < run.steps.blocks; ++block)
    for (int64_t y = 0; y < run.steps.high; ++y) {
      int64_t offset = block * run.block + y * run.row;
      for (int64_t x = 0; x < run.steps.wide; ++x, offset += kTileDepth, weights += N * kTileElements) {
        tile_load<b>(weights, 64);
        if constexpr (N == 2) tile_load<b + 1>(weights + kTileElements, 64);
        tile_load<6>(in[0] + offset, run.pixel_bytes);
        tile_multiply<0, 6, b>();
        if constexpr (N == 2) tile_multiply<1, 6, b + 1>();
        if constexpr (M > 1) {
          tile_load<7>(in[1] + offset, run.pixel_bytes);
          tile_multiply<N, 7, b>();
          if constexpr (N == 2) tile_multiply<N + 1, 7, b + 1>();
        }
        if constexpr (M > 2) {
          tile_load<5>(in[2] + offset, run.pixel_bytes);
          tile_multiply<2, 5, b>();
        }
        if constexpr (M > 3) {
          tile_load<6>(in[3] + offset, run.pixel_bytes);
          tile_multiply<3, 6, b>();
        }
      }
    }
  tile_store<0>(sums, 64);
  if constexpr (M * N > 1) tile_store<1>(sums + kSumElements, 64);
  if constexpr (M * N > 2) tile_store<2>(sums + 2 * kSumElements, 64);
  if constexpr (M * N > 3) tile_store<3>(sums + 3 * kSumElements, 64);
}

// Where a run of neighbouring pixels lies in the image.
struct Place {
  int64_t b, y, x, count;
};

// out = combine(sums + bias) on neighbouring pixels.
template <int terms>
void finish(const float* sums, const Place& place, Vec<float> bias, const Combine<float>& combine,
            const View<float>& out) {
  using V = Vec<float>;
  for (int64_t i = 0; i < place.count; ++i) {
    V value = (load<V>(sums + i * kLanes<float>) + bias) * combine.scale;
    const auto add = [&](int t) {
      value += combine.coef[t] * load<V>(combine.term[t].pixel_at(place.b, place.y, place.x + i));
    };
    if constexpr (terms >= 0) {
      FASTODE_UNROLL for (int t = 0; t < terms; ++t) add(t);
    } else {
      for (int t = 0; t < combine.count; ++t) add(t);
    }
    store<V>(out.pixel_at(place.b, place.y, place.x + i), value);
  }
}

using Finish = void (*)(const float*, const Place&, Vec<float>, const Combine<float>&, const View<float>&);

inline Finish finish_of(int terms) {
  switch (terms) {
    case 0:
      return finish<0>;
    case 1:
      return finish<1>;
    case 2:
      return finish<2>;
    case 3:
      return finish<3>;
    default:
      return finish<-1>;
  }
}

// The output pixels in tiles of 16: cut out of the rows if they divide the width, else out of the rows and their halos
// laid end to end, whose sums in the halo are dropped.
struct Tiling {
  int64_t width, row, per_row, count, end;

  explicit Tiling(const Plane<float>& plane)
      : width(plane.width),
        row(row_of(plane)),
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

template <int M, int N>
void convolve_tiles(const TileRun& run, const Tiling& tiling, int64_t tile, int64_t block, const bfloat16* in,
                    int64_t depth, const float* bias, const TileJob& job, Finish last) {
  alignas(64) float sums[M * N * kSumElements];
  const bfloat16* from[M];
  for (int m = 0; m < M; ++m) from[m] = in + tiling.first(tile + m) * depth;
  multiply<M, N>(run, from, sums);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      const float* tile_sums = sums + (m * N + n) * kSumElements;
      const Vec<float> channel_bias = bias ? load<Vec<float>>(bias + n * kLanes<float>) : Vec<float>{};
      tiling.runs(tile + m, [&](int64_t at, int64_t y, int64_t x, int64_t count) {
        last(tile_sums + at * kLanes<float>, Place{block + n, y, x, count}, channel_bias, job.combine, job.out);
      });
    }
}

}  // namespace

bool has_tiles() {
  static const bool permitted = tiles_permitted();
  return permitted;
}

void narrow_map(const Plane<float>& plane, int64_t channels, const View<float>& from, bfloat16* to) {
  const Narrow narrow(plane, channels);
  const int64_t blocks = blocks_of<float>(channels), row = row_of(plane), depth = narrow.depth;
  using V = Vec<float>;
  clear_narrow_halo(plane, channels, to);
  const auto value = [&](int64_t b, int64_t y, int64_t x) { return load<V>(from.pixel_at(b, y, x)); };
  for (int64_t b = 0; b < blocks; b += depth / Narrow::lanes) {
    bfloat16* image = to + narrow.begin(b) + origin_of(plane) * depth;
    for (int64_t y = 0; y < plane.height; ++y, image += row * depth) {
      int64_t x = 0;
      if (depth == Narrow::lanes) {  // two pixels at a time
        for (; x + 1 < plane.width; x += 2) store_narrow(image + x * depth, value(b, y, x), value(b, y, x + 1));
        for (; x < plane.width; ++x)
          for (int lane = 0; lane < Narrow::lanes; ++lane)
            image[x * depth + lane] = round_to_narrow(from.pixel_at(b, y, x)[lane]);
      } else if (b + 1 < blocks) {
        for (; x < plane.width; ++x) store_narrow(image + x * depth, value(b, y, x), value(b + 1, y, x));
      } else {
        for (; x < plane.width; ++x) store_narrow(image + x * depth, value(b, y, x), V{});
      }
    }
  }
}

void clear_narrow_halo(const Plane<float>& plane, int64_t channels, bfloat16* map) {
  const Narrow narrow(plane, channels);
  const int64_t depth = narrow.depth, row = row_of(plane), side = plane.halo * depth;
  for (int64_t b = 0; b < narrow.blocks; ++b) {
    bfloat16 *block = map + b * narrow.size, *image = block + origin_of(plane) * depth;
    std::fill(block, image, bfloat16{0});
    for (int64_t y = 0; y < plane.height && side; ++y) {
      bfloat16* right = image + (y * row + plane.width) * depth;
      std::fill(right, right + side, bfloat16{0});
    }
    std::fill(image + plane.height * row * depth, block + narrow.size, bfloat16{0});
  }
  bfloat16* end = map + narrow.blocks * narrow.size;
  std::fill(end, end + depth, bfloat16{0});
  if (depth > Narrow::lanes && blocks_of<float>(channels) % 2)
    for (bfloat16* pixel = end - narrow.size; pixel < end; pixel += depth)
      std::fill(pixel + Narrow::lanes, pixel + depth, bfloat16{0});
}

int64_t tile_weights_size(const ConvShape& shape) {
  return blocks_of<float>(shape.out_channels) * Steps(shape).count() * kTileElements / 2;
}

// Order: [group of output tiles][step][output tile][pair of summed numbers][output channel][of the pair].
template <class T>
void pack_tile_weights(const ConvShape& shape, bool flip, const T* weight, const int64_t* strides, float* packed) {
  const Steps steps(shape);
  const int64_t tiles = blocks_of<float>(shape.out_channels), group = group_of(tiles);
  const int64_t out_stride = strides[flip ? 1 : 0], in_stride = strides[flip ? 0 : 1];
  const int64_t depth = shape.in_channels <= 16 ? 16 : 32;
  bfloat16* to = reinterpret_cast<bfloat16*>(packed);
  std::fill(to, to + tiles * steps.count() * kTileElements, bfloat16{0});
  for (int64_t first = 0; first < tiles; first += group)
    for (int64_t block = 0; block < steps.blocks; ++block)
      for (int64_t ky = 0; ky < steps.high; ++ky)
        for (int64_t step = 0; step < steps.wide; ++step)
          for (int64_t tile = first; tile < first + group; ++tile, to += kTileElements)
            for (int64_t k = 0; k < kTileDepth; ++k) {
              const int64_t in = block * depth + k % depth, kx = step * (kTileDepth / depth) + k / depth;
              if (in >= shape.in_channels || kx >= shape.kernel_w) continue;
              const int64_t y = flip ? shape.kernel_h - 1 - ky : ky, x = flip ? shape.kernel_w - 1 - kx : kx;
              const int64_t out = tile * kLanes<float>,
                            lanes = std::min<int64_t>(kLanes<float>, shape.out_channels - out);
              const T* from = weight + out * out_stride + in * in_stride + y * strides[2] + x * strides[3];
              bfloat16* pairs = to + k / 2 * kTileDepth + k % 2;
              for (int64_t lane = 0; lane < lanes; ++lane) pairs[2 * lane] = round_to_narrow(from[lane * out_stride]);
            }
}

template void pack_tile_weights(const ConvShape&, bool, const float*, const int64_t*, float*);
template void pack_tile_weights(const ConvShape&, bool, const bfloat16*, const int64_t*, float*);

void convolve(const Plane<float>& plane, const ConvShape& shape, const float* packed, const float* bias,
              const TileJob* jobs, int64_t count) {
  const TileScope scope;
  const Narrow narrow(plane, shape.in_channels);
  const Tiling tiling(plane);
  const int64_t tiles = blocks_of<float>(shape.out_channels), row = row_of(plane);
  TileRun run{Steps(shape), narrow.size, row * narrow.depth, narrow.depth * 2,
              reinterpret_cast<const bfloat16*>(packed)};
  const int64_t shift = (origin_of(plane) - shape.kernel_h / 2 * row - shape.kernel_w / 2) * narrow.depth;
  const auto walk = [&](auto many, auto group) {
    constexpr int M = many(), N = group();
    for (int64_t first = 0; first < tiles; first += N) {
      for (const TileJob* job = jobs; job < jobs + count; ++job) {
        const Finish last = finish_of(job->combine.count);
        const bfloat16* in = job->in + shift;
        int64_t tile = 0;
        for (; tile + M <= tiling.count; tile += M)
          convolve_tiles<M, N>(run, tiling, tile, first, in, narrow.depth, bias, *job, last);
        for (; tile < tiling.count; ++tile)
          convolve_tiles<1, N>(run, tiling, tile, first, in, narrow.depth, bias, *job, last);
      }
      run.weights += run.steps.count() * N * kTileElements;
      if (bias) bias += N * kLanes<float>;
    }
  };
  if (group_of(tiles) == 2)
    walk(std::integral_constant<int, 2>{}, std::integral_constant<int, 2>{});
  else
    walk(std::integral_constant<int, 4>{}, std::integral_constant<int, 1>{});
}

}  // namespace fastode::resident

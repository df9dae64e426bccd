// Included by one .cpp, where the compiler has AMX.
#pragma once

#include <bit>

#include "conv_bf16.h"
#include "tiles.h"

namespace fastode::resident {
namespace {

constexpr int64_t kTileRows = 16, kTileDepth = 32;           // rows of every tile; bfloat16 numbers in a row
constexpr int64_t kTileElements = kTileRows * kTileDepth;    // of a bfloat16 tile
constexpr int64_t kSumElements = kTileRows * kLanes<float>;  // of a float32 tile

static_assert(kLanes<float> == kTileRows && Narrow::lanes == kTileRows);

// The steps of a convolution's sum: 32 channels of one tap, or 16 channels of two neighbouring taps.
struct Steps {
  bool paired;
  int64_t blocks, high, wide;

  explicit Steps(const ConvShape& shape)
      : paired(shape.in_channels <= Narrow::lanes),
        blocks(paired ? 1 : divide_up(shape.in_channels, kTileDepth)),
        high(shape.kernel_h),
        wide(paired ? divide_up(shape.kernel_w, 2) : shape.kernel_w) {}

  int64_t count() const { return blocks * high * wide; }
};

inline bfloat16 round_to_narrow(float value) { return narrow(value); }
inline bfloat16 round_to_narrow(bfloat16 value) { return value; }

constexpr int64_t kLinesAhead = 10;  // lines of the next maps that are asked for at a step

inline int64_t group_of(int64_t tiles) { return tiles % 2 == 0 ? 2 : 1; }

struct TileRun {
  Steps steps;
  int64_t row, step, position_bytes;  // elements from a kernel row or step to the next; from a tile's row to the next
  int64_t first, last;                // the kernel's rows that meet the image
  const bfloat16* weights;
};

template <int count>
inline void zero_sums() {
  tile_zero<0>();
  if constexpr (count > 1) tile_zero<1>();
  if constexpr (count > 2) tile_zero<2>();
  if constexpr (count > 3) tile_zero<3>();
}

template <int count>
inline void store_sums(float* sums) {
  tile_store<0>(sums, 64);
  if constexpr (count > 1) tile_store<1>(sums + kSumElements, 64);
  if constexpr (count > 2) tile_store<2>(sums + 2 * kSumElements, 64);
  if constexpr (count > 3) tile_store<3>(sums + 3 * kSumElements, 64);
}

// sums += the products of M tiles of 16 positions, `offset` behind in[m], with N tiles of weights.
template <int M, int N>
inline void multiply_step(const bfloat16* weights, const bfloat16* const* in, int64_t offset, int64_t position_bytes) {
  static_assert(M * N <= 4 && N <= 2);
  constexpr int b = 4;
  tile_load<b>(weights, 64);
  if constexpr (N == 2) tile_load<b + 1>(weights + kTileElements, 64);
  tile_load<6>(in[0] + offset, position_bytes);
  tile_multiply<0, 6, b>();
  if constexpr (N == 2) tile_multiply<1, 6, b + 1>();
  if constexpr (M > 1) {
    tile_load<7>(in[1] + offset, position_bytes);
    tile_multiply<N, 7, b>();
    if constexpr (N == 2) tile_multiply<N + 1, 7, b + 1>();
  }
  if constexpr (M > 2) {
    tile_load<5>(in[2] + offset, position_bytes);
    tile_multiply<2, 5, b>();
  }
  if constexpr (M > 3) {
    tile_load<6>(in[3] + offset, position_bytes);
    tile_multiply<3, 6, b>();
  }
}

// sums [M][N] tiles: of M times 16 positions, from in[m], and N times 16 output channels. Calls beside() at every step,
// for what the core can do while the tiles multiply.
template <int M, int N, class F>
void multiply(const TileRun& run, const bfloat16* const* in, float* sums, const F& beside) {
  zero_sums<M * N>();
  const int64_t kernel_row = run.steps.wide * N * kTileElements;
  for (int64_t block = 0; block < run.steps.blocks; ++block) {
    const bfloat16* weights = run.weights + (block * run.steps.high + run.first) * kernel_row;
    for (int64_t y = run.first; y < run.last; ++y) {
      int64_t offset = block * kTileDepth + y * run.row;
      for (int64_t x = 0; x < run.steps.wide; ++x, offset += run.step, weights += N * kTileElements) {
        multiply_step<M, N>(weights, in, offset, run.position_bytes);
        beside();
      }
    }
  }
  store_sums<M * N>(sums);
}

// The positions of a Narrow map in tiles of 16: cut out of its rows if they divide them, else out of the rows and their
// halos laid end to end, whose sums in the halo are dropped.
struct Tiling {
  int64_t together, width, row, per_row, height, count;
  int shift;  // of a division by `together`

  Tiling(const Plane<float>& plane, int64_t together)
      : together(together),
        width(plane.width * together),
        row((plane.width + plane.halo) * together),
        per_row(width % kTileRows == 0 ? width / kTileRows : 0),
        height(plane.height),
        count(per_row ? plane.height * per_row : divide_up(plane.height * row, kTileRows)),
        shift(std::countr_zero(static_cast<uint64_t>(together))) {}
};

// A tile's first position.
struct Cursor {
  int64_t y = 0, x = 0;

  Cursor next(const Tiling& tiling) const {
    Cursor to{y, x + kTileRows};
    for (const int64_t end = tiling.per_row ? tiling.width : tiling.row; to.x >= end; to.x -= end) ++to.y;
    return to;
  }
};

// A tile of sums and what they belong to: positions from `at`, a block of outputs, some samples.
struct Sums {
  const float* sums;
  Cursor at;
  int64_t block;
  const float* bias;  // or null
  const ConvJob<bfloat16>* jobs;
  int64_t samples;
};

// out = combine(sums + bias), for every sample's pixels inside the image
template <int terms>
void finish(const Tiling& tiling, const Sums& tile) {
  using V = Vec<float>;
  const int64_t together = tiling.together, step = together * kLanes<float>;
  const float* sums = tile.sums;
  Cursor at = tile.at;
  for (int64_t rows = kTileRows; rows > 0 && at.y < tiling.height; ++at.y, at.x = 0) {
    const int64_t end = std::min(tiling.width - at.x, rows);
    for (int64_t s = 0; s < std::min(together, end); ++s) {
      const int64_t sample = (at.x + s) & (together - 1), x = (at.x + s) >> tiling.shift;
      if (sample >= tile.samples) continue;
      const ConvJob<bfloat16>& job = tile.jobs[sample];
      const Combine<bfloat16>& combine = job.combine;
      bfloat16* out = job.out.pixel_at(tile.block, at.y, x);
      const bfloat16* term[terms > 0 ? terms : 1];
      for (int t = 0; t < terms; ++t) term[t] = combine.term[t].pixel_at(tile.block, at.y, x);
      const V bias = tile.bias ? load<V>(tile.bias) * combine.scale : V{};
      const float* from = sums + s * kLanes<float>;
      for (int64_t i = 0, pixel = 0; i < end - s; i += together, ++pixel, from += step) {
        V value = load<V>(from) * combine.scale + bias;
        if constexpr (terms >= 0) {
          FASTODE_UNROLL for (int t = 0; t < terms; ++t) value +=
              combine.coef[t] * load_stored(term[t] + pixel * combine.term[t].pixel);
        } else {
          for (int t = 0; t < combine.count; ++t)
            value += combine.coef[t] * load_stored(combine.term[t].pixel_at(tile.block, at.y, x + pixel));
        }
        store_stored(out + pixel * job.out.pixel, value);
      }
    }
    const int64_t passed = tiling.row - at.x;
    sums += passed * kLanes<float>, rows -= passed;
  }
}

using Finish = void (*)(const Tiling&, const Sums&);

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

// The products of a convolution, for groups of N times 16 outputs. What one leaves is finished beside the next one.
template <int N>
class Products {
 public:
  Products(const Tiling& tiling, Finish last, Ahead* ahead) : tiling_(tiling), last_(last), ahead_(ahead) {}
  ~Products() { settle(0); }

  // Of M tiles of a set of samples, from `in`, which are `sums` but for what differs among the tiles. Goes to the next.
  template <int M>
  void add(TileRun& run, int64_t pad, const bfloat16* in, Sums& sums) {
    const bfloat16* from[M];
    Cursor tiles[M];
    int64_t bottom = 0;
    for (int m = 0; m < M; ++m) {
      from[m] = in + (sums.at.y * tiling_.row + sums.at.x) * (run.position_bytes / 2);
      bottom = sums.at.y, tiles[m] = sums.at, sums.at = sums.at.next(tiling_);
    }
    if (!tiling_.per_row) bottom = std::min(sums.at.y, tiling_.height - 1);
    run.first = std::max<int64_t>(0, pad - bottom);
    run.last = std::min(run.steps.high, tiling_.height + pad - tiles[0].y);
    const int64_t steps = std::max<int64_t>(1, run.steps.blocks * (run.last - run.first) * run.steps.wide);
    const int share = left_ <= steps ? 1 : left_;
    float* to = sums_[turn_];
    const char* soon = ahead_ ? ahead_->take(steps * kLinesAhead) : nullptr;
    if (soon)
      multiply<M, N>(run, from, to, [&] {
        FASTODE_UNROLL for (int i = 0; i < kLinesAhead; ++i, soon += Ahead::line) __builtin_prefetch(soon, 0, 2);
        settle(left_ - share);
      });
    else
      multiply<M, N>(run, from, to, [&] { settle(left_ - share); });
    settle(0);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n, to += kSumElements)
        tiles_[left_++] = {to,        tiles[m],    sums.block + n, sums.bias ? sums.bias + n * kLanes<float> : nullptr,
                           sums.jobs, sums.samples};
    turn_ = 1 - turn_;
  }

 private:
  // Finishes all but so many.
  void settle(int remaining) {
    while (left_ > 0 && left_ > remaining) last_(tiling_, tiles_[--left_]);
  }

  const Tiling& tiling_;
  const Finish last_;
  Ahead* const ahead_;
  int left_ = 0, turn_ = 0;
  Sums tiles_[4];
  alignas(64) float sums_[2][4 * kSumElements];
};

}  // namespace

bool has_tiles() {
  static const bool permitted = tiles_permitted();
  return permitted;
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

void convolve(const Plane<float>& plane, const ConvShape& shape, int64_t together, const float* packed,
              const float* bias, const ConvJob<bfloat16>* jobs, int64_t count, Ahead* ahead) {
  const TileScope scope;
  const Narrow narrow(plane, shape.in_channels, together);
  const Tiling tiling(plane, together);
  const int64_t tiles = blocks_of<float>(shape.out_channels), pad = shape.kernel_h / 2;
  const Steps steps(shape);
  TileRun run{steps, narrow.row, steps.paired ? kTileDepth : narrow.pixel, narrow.depth * 2,
              0,     0,          reinterpret_cast<const bfloat16*>(packed)};
  const int64_t shift = -pad * narrow.row - shape.kernel_w / 2 * narrow.pixel;
  const auto walk = [&](auto many, auto group) {
    constexpr int M = many(), N = group();
    Products<N> products(tiling, finish_of(jobs->combine.count), ahead);
    for (int64_t first = 0; first < tiles; first += N) {
      for (int64_t begin = 0; begin < count; begin += together) {
        const bfloat16* in = jobs[begin].in.at + shift;
        Sums sums{nullptr,      {},
                  first,        bias ? bias + first * kLanes<float> : nullptr,
                  jobs + begin, std::min(together, count - begin)};
        int64_t tile = 0;
        for (; tile + M <= tiling.count; tile += M) products.template add<M>(run, pad, in, sums);
        for (; tile < tiling.count; ++tile) products.template add<1>(run, pad, in, sums);
      }
      run.weights += run.steps.count() * N * kTileElements;
    }
  };
  if (group_of(tiles) == 2)
    walk(std::integral_constant<int, 2>{}, std::integral_constant<int, 2>{});
  else
    walk(std::integral_constant<int, 4>{}, std::integral_constant<int, 1>{});
}

}  // namespace fastode::resident

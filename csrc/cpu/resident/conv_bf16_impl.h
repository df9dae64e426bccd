// Included by one .cpp, where the compiler has AMX or the dot products.
#pragma once

#include <bit>

#include "conv_bf16.h"
#if FASTODE_AMX
#include "tile_products.h"
#else
#include "dot_products.h"
#endif

namespace fastode::resident {
namespace {

static_assert(kLanes<float> == kTileRows && Narrow::lanes == kTileRows);

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

constexpr int64_t kLinesAhead = 10;  // lines of the next maps that are asked for at a step

inline int64_t group_of(int64_t tiles) { return tiles % 2 == 0 ? 2 : 1; }

struct TileRun {
  Steps steps;
  int64_t row, step, position_bytes;  // elements from a kernel row or step to the next; from a tile's row to the next
  int64_t first, last;                // the kernel's rows that meet the image
  const bfloat16* weights;
};

// sums [M][N] tiles: of M times 16 positions, from in[m], and N times 16 output channels. Calls beside() at every step.
template <int M, int N, class F>
void multiply(const TileRun& run, const bfloat16* const* in, float* sums, const F& beside) {
  const Steps& steps = run.steps;
  const int64_t kernel_row = steps.wide * N * kTileElements;
  multiply_steps<M, N>(
      steps.blocks * std::max<int64_t>(0, run.last - run.first) * steps.wide,
      [&](const auto& step) {
        for (int64_t block = 0; block < steps.blocks; ++block) {
          const bfloat16* weights = run.weights + (block * steps.high + run.first) * kernel_row;
          for (int64_t y = run.first; y < run.last; ++y) {
            int64_t offset = block * kTileDepth + y * run.row;
            for (int64_t x = 0; x < steps.wide; ++x, offset += run.step, weights += N * kTileElements)
              step(weights, offset, steps.pairs(block, x));
          }
        }
      },
      in, run.position_bytes, sums, beside);
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
            for (int64_t k = 0; k < kTileDepth; k += 2) {
              const int64_t in = block * depth + k % depth, kx = step * (kTileDepth / depth) + k / depth;
              if (in >= shape.in_channels || kx >= shape.kernel_w) continue;
              const int64_t y = flip ? shape.kernel_h - 1 - ky : ky, x = flip ? shape.kernel_w - 1 - kx : kx;
              const int64_t out = tile * kLanes<float>,
                            lanes = std::min<int64_t>(kLanes<float>, shape.out_channels - out);
              const T* from = weight + out * out_stride + in * in_stride + y * strides[2] + x * strides[3];
              const T* next = in + 1 < shape.in_channels ? from + in_stride : nullptr;
              pack_pairs(from, next, out_stride, lanes, to + k / 2 * kTileDepth);
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

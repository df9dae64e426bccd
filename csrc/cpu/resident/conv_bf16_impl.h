// Included by one .cpp, where the compiler has AMX or the dot products.
#pragma once

#include <bit>

#if FASTODE_AMX
#include "tile_products.h"
#else
#include "dot_products.h"
#endif
#include "pack_bf16_impl.h"
#if !FASTODE_AMX
#include "few_outputs_impl.h"
#endif

namespace fastode::resident {
namespace {

static_assert(kLanes<float> == kTileRows && Narrow::lanes == kTileRows);

constexpr int64_t kLinesAhead = 10;  // lines of the next maps that are asked for at a step

// One of the kernels whose products a convolution sums: of stride 2 there is one for each parity.
struct TileKernel {
  Steps steps;
  int64_t at, up, left;         // elements from a position to the first tap; its rows above and columns left of that
  int64_t first = 0, last = 0;  // its rows that meet the image

  int64_t count() const { return steps.blocks * std::max<int64_t>(0, last - first) * steps.wide; }
};

struct TileRun {
  int64_t row, step, position_bytes;  // elements from a kernel row or step to the next; from a tile's row to the next
  int64_t height, width;              // of the image
  const bfloat16* weights;
  std::vector<TileKernel> kernels;

  // Of the kernels' rows those that meet the image from positions on its rows [top, bottom].
  void meet(int64_t top, int64_t bottom) {
    for (TileKernel& kernel : kernels) {
      kernel.first = std::max<int64_t>(0, kernel.up - bottom);
      kernel.last = std::min(kernel.steps.high, height + kernel.up - top);
    }
  }
  // Steps of these, and of all.
  int64_t count() const {
    int64_t steps = 0;
    for (const TileKernel& kernel : kernels) steps += kernel.count();
    return steps;
  }
  int64_t all() const {
    int64_t steps = 0;
    for (const TileKernel& kernel : kernels) steps += kernel.steps.count();
    return steps;
  }
};

// The positions of a Narrow map, its first `width` in each of `height` rows, in tiles of 16: cut out of the rows if
// they divide them, else out of the rows and their halos laid end to end, whose sums in the halo are dropped.
struct Tiling {
  int64_t together, width, row, per_row, height, count;
  int shift;  // of a division by `together`

  Tiling(const Plane<float>& plane, int64_t together) : Tiling(plane, together, plane.height, plane.width) {}
  Tiling(const Plane<float>& plane, int64_t together, int64_t high, int64_t wide)
      : together(together),
        width(wide * together),
        row((plane.width + plane.halo) * together),
        per_row(width % kTileRows == 0 ? width / kTileRows : 0),
        height(high),
        count(per_row ? high * per_row : divide_up(high * row, kTileRows)),
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

// Whether `count` rows of a tile that are multiplied at once lie in one column of the image, and which one that is, or
// -1.
inline bool in_one_column(const Tiling& tiling, int count) {
  return tiling.per_row && count && tiling.together % count == 0;
}
inline int64_t column_of(const Tiling& tiling, const Cursor& tile, const TileRows& rows) {
  return in_one_column(tiling, rows.count) ? (tile.x + rows.first) >> tiling.shift : -1;
}

// Calls step() for what a kernel's steps [begin, end) of every row that meets the image sum, one block of input
// channels after the other; returns the end of the kernel's weights.
template <int N, class Step>
inline const bfloat16* multiply_blocks_of(const TileRun& run, const TileKernel& kernel, const bfloat16* all,
                                          int64_t begin, int64_t end, const Step& step) {
  const Steps& steps = kernel.steps;
  const int64_t kernel_row = steps.wide * N * kTileElements;
  for (int64_t block = 0; block < steps.blocks; ++block, all += steps.high * kernel_row)
    for (int64_t y = kernel.first; y < kernel.last; ++y) {
      const bfloat16* weights = all + y * kernel_row + begin * N * kTileElements;
      int64_t offset = kernel.at + block * kTileDepth + y * run.row + begin * run.step;
      for (int64_t x = begin; x < end; ++x, offset += run.step, weights += N * kTileElements)
        step(weights, offset, kTileRows);
    }
  return all;
}

// Calls step() for the taps [begin, end) of a kernel's row, whose steps' inputs lie `along` apart: at once if the taps'
// are neighbours and nothing lies between them.
template <int N, class Step>
inline void multiply_taps(const Steps& steps, const bfloat16* weights, int64_t offset, int64_t along, int64_t begin,
                          int64_t end, bool neighbours, const Step& step) {
  const int64_t tap = steps.tap() * N, apart = along / (steps.paired ? 2 : 1);
  weights += begin * tap, offset += begin * apart;
  if (neighbours && steps.full()) return step(weights, offset, (end - begin) * steps.pairs);
  for (int64_t x = begin; x < end; ++x, offset += apart, weights += tap) step(weights, offset, steps.pairs);
}

// The same of all blocks of a tap, or of a row's taps, at once; `alone`: neighbouring pixels are of one sample.
template <int N, class Step, class Three>
inline const bfloat16* multiply_rows_of(const TileRun& run, const TileKernel& kernel, const bfloat16* all,
                                        int64_t begin, int64_t end, bool alone, const Step& step, const Three& three) {
  const Steps& steps = kernel.steps;
  const int64_t row = steps.wide * steps.blocks * N * kTileElements;
  for (int64_t y = kernel.first; y < kernel.last; ++y) {
    const bfloat16* weights = all + y * row;
    const int64_t offset = kernel.at + y * run.row;
    if constexpr (N == 1)
      if (steps.taps == 3 && alone) {
        three(weights, steps.tap(), offset, steps.pairs);
        continue;
      }
    multiply_taps<N>(steps, weights, offset, run.step, begin, end, alone, step);
  }
  return all + steps.high * row;
}

// sums [M][N] tiles: of M times 16 positions, from in[m], and N times 16 output channels. Calls beside() at every step.
template <int M, int N, class F>
void multiply(const TileRun& run, const Tiling& tiling, const Cursor* tiles, const bfloat16* const* in, float* sums,
              const F& beside) {
  multiply_steps<M, N>(
      run.count(), !in_one_column(tiling, kRowsAtOnce<N>),
      [&](const TileRows& rows, const auto& step, const auto& three) {
        const int64_t column = column_of(tiling, tiles[rows.tile], rows);
        const bfloat16* all = run.weights;
        for (const TileKernel& kernel : run.kernels) {
          const Steps& steps = kernel.steps;
          int64_t begin = 0, end = kPairwise ? steps.taps : steps.wide;
          if (column >= 0 && !steps.paired)  // leave out the taps that meet no column
            begin = std::max(begin, kernel.left - column), end = std::min(end, run.width + kernel.left - column);
          if constexpr (kPairwise)
            all = multiply_rows_of<N>(run, kernel, all, begin, end, tiling.together == 1, step, three);
          else
            all = multiply_blocks_of<N>(run, kernel, all, begin, end, step);
        }
      },
      in, run.position_bytes, sums, beside);
}

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
      // Of what lies behind references a store might change every number.
      const int64_t out_step = job.out.pixel;
      const float scale = combine.scale;
      constexpr int known = terms > 0 ? terms : 1;
      const bfloat16* term[known];
      int64_t term_step[known];
      float coef[known];
      for (int t = 0; t < terms; ++t) {
        term[t] = combine.term[t].pixel_at(tile.block, at.y, x);
        term_step[t] = combine.term[t].pixel, coef[t] = combine.coef[t];
      }
      const V bias = tile.bias ? load<V>(tile.bias) * scale : V{};
      const float* from = sums + s * kLanes<float>;
      for (int64_t i = 0, pixel = 0; i < end - s; i += together, ++pixel, from += step, out += out_step) {
        V value = load<V>(from) * scale + bias;
        if constexpr (terms >= 0) {
          FASTODE_UNROLL for (int t = 0; t < terms; ++t) {
            value += coef[t] * load_stored(term[t]);
            term[t] += term_step[t];
          }
        } else {
          for (int t = 0; t < combine.count; ++t)
            value += combine.coef[t] * load_stored(combine.term[t].pixel_at(tile.block, at.y, x + pixel));
        }
        store_stored(out, value);
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
  void add(TileRun& run, const bfloat16* in, Sums& sums) {
    const bfloat16* from[M];
    Cursor tiles[M];
    int64_t bottom = 0;
    for (int m = 0; m < M; ++m) {
      from[m] = in + (sums.at.y * tiling_.row + sums.at.x) * (run.position_bytes / 2);
      bottom = sums.at.y, tiles[m] = sums.at, sums.at = sums.at.next(tiling_);
    }
    if (!tiling_.per_row) bottom = std::min(sums.at.y, tiling_.height - 1);
    run.meet(tiles[0].y, bottom);
    const int64_t steps = std::max<int64_t>(1, run.count());
    const int share = left_ <= steps ? 1 : left_;
    float* to = sums_[turn_];
    const char* soon = ahead_ ? ahead_->take(steps * kLinesAhead) : nullptr;
    if (soon)
      multiply<M, N>(run, tiling_, tiles, from, to, [&] {
        FASTODE_UNROLL for (int i = 0; i < kLinesAhead; ++i, soon += Ahead::line) __builtin_prefetch(soon, 0, 2);
        settle(left_ - share);
      });
    else
      multiply<M, N>(run, tiling_, tiles, from, to, [&] { settle(left_ - share); });
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

namespace {

// What a convolution of Narrow maps on `plane` sums, but for its kernels.
TileRun run_of(const Plane<float>& plane, int64_t in_channels, int64_t together, const float* packed) {
  const Narrow narrow(plane, in_channels, together);
  return {narrow.row,
          in_channels <= Narrow::lanes ? kTileDepth : narrow.pixel,
          narrow.depth * 2,
          plane.height,
          plane.width,
          reinterpret_cast<const bfloat16*>(packed),
          {}};
}

// The rest of convolve(), for any kernels.
void convolve_tiles(TileRun& run, const Tiling& tiling, int64_t out_channels, const float* bias,
                    const ConvJob<bfloat16>* jobs, int64_t count, Ahead* ahead) {
  const TileScope scope;
  const int64_t tiles = blocks_of<float>(out_channels), together = tiling.together, all = run.all();
  const auto walk = [&](auto many, auto group) {
    constexpr int M = many(), N = group();
    Products<N> products(tiling, finish_of(jobs->combine.count), ahead);
    for (int64_t first = 0; first < tiles; first += N) {
      for (int64_t begin = 0; begin < count; begin += together) {
        const bfloat16* in = jobs[begin].in.at;
        Sums sums{nullptr,      {},
                  first,        bias ? bias + first * kLanes<float> : nullptr,
                  jobs + begin, std::min(together, count - begin)};
        int64_t tile = 0;
        for (; tile + M <= tiling.count; tile += M) products.template add<M>(run, in, sums);
        for (; tile < tiling.count; ++tile) products.template add<1>(run, in, sums);
      }
      run.weights += all * N * kTileElements;
    }
  };
  if (group_of(tiles) == 2)
    walk(std::integral_constant<int, 2>{}, std::integral_constant<int, 2>{});
  else
    walk(std::integral_constant<int, 4>{}, std::integral_constant<int, 1>{});
}

}  // namespace

void convolve(const Plane<float>& plane, const ConvShape& shape, int64_t together, const float* packed,
              const float* bias, const ConvJob<bfloat16>* jobs, int64_t count, Ahead* ahead) {
#if !FASTODE_AMX
  if (suits_few_outputs(plane, shape)) {
    FewOutputs convolve(plane, shape, reinterpret_cast<const bfloat16*>(packed));
    for (const ConvJob<bfloat16>* job = jobs; job < jobs + count; ++job) convolve(*job, bias);
    return;
  }
#endif
  const Narrow narrow(plane, shape.in_channels, together);
  TileRun run = run_of(plane, shape.in_channels, together, packed);
  const int64_t up = shape.kernel_h / 2, left = shape.kernel_w / 2;
  run.kernels.push_back({Steps(shape), -up * narrow.row - left * narrow.pixel, up, left});
  convolve_tiles(run, Tiling(plane, together), shape.out_channels, bias, jobs, count, ahead);
}

void convolve_strided(const Plane<float>& out, const ConvShape& shape, int64_t together, int64_t phase,
                      const float* packed, const float* bias, const ConvJob<bfloat16>* jobs, int64_t count,
                      Ahead* ahead) {
  const Narrow narrow(out, shape.in_channels, together);
  TileRun run = run_of(out, shape.in_channels, together, packed);
  each_parity(shape, [&](int64_t py, int64_t px, const ParityTaps& rows, const ParityTaps& columns) {
    run.kernels.push_back({Steps(forward_part(shape, rows, columns)),
                           (2 * py + px) * phase - rows.above * narrow.row - columns.above * narrow.pixel, rows.above,
                           columns.above});
  });
  convolve_tiles(run, Tiling(out, together), shape.out_channels, bias, jobs, count, ahead);
}

void convolve_strided_back(const Plane<float>& in, const Plane<float>& out, const ConvShape& shape, int64_t together,
                           const float* packed, const ConvJob<bfloat16>* jobs, int64_t count, Ahead* ahead) {
  const Narrow narrow(out, shape.out_channels, together);
  // A kernel of one row or column leaves inputs that no output has seen.
  if (shape.kernel_h == 1 || shape.kernel_w == 1)
    for (int64_t n = 0; n < count; ++n)
      for (int64_t b = 0; b < blocks_of<float>(shape.in_channels); ++b)
        for (int64_t y = 0; y < in.height; ++y)
          for (int64_t x = 0; x < in.width; ++x) std::fill_n(jobs[n].out.pixel_at(b, y, x), Narrow::lanes, bfloat16{});
  each_parity(shape, [&](int64_t py, int64_t px, const ParityTaps& rows, const ParityTaps& columns) {
    const ConvShape part = backward_part(shape, rows, columns);
    ConvJob<bfloat16> parts[kMostJobs];
    for (int64_t n = 0; n < count; ++n)
      parts[n] = {jobs[n].in, parity(jobs[n].out, py, px), parity(jobs[n].combine, py, px)};
    TileRun run = run_of(out, part.in_channels, together, packed);
    run.kernels.push_back(
        {Steps(part), -rows.before * narrow.row - columns.before * narrow.pixel, rows.before, columns.before});
    packed += tile_weights_size(part);
    const int64_t height = (in.height - py + 1) / 2, width = (in.width - px + 1) / 2;
    if (height > 0 && width > 0)
      convolve_tiles(run, Tiling(out, together, height, width), part.out_channels, nullptr, parts, count, ahead);
  });
}

}  // namespace fastode::resident

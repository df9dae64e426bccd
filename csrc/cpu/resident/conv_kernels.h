// The micro-kernels. A tile of rows x pixels x output vectors stays in registers and inputs are broadcast. Where the
// weights of a tap set fit beside it, its taps share each broadcast, so a 3x3 convolution loads an input once per
// kernel row.
#pragma once

#include <utility>

#include "conv.h"

namespace fastode::resident {

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif
// Pixels of a tile of so many output vectors. Half the registers hold sums; of sixteen, twelve where that leaves enough
// for weights: with fewer than ten, two units of multiply-adds that take five cycles wait for the last sums.
template <int vectors>
inline constexpr int kArea = kRegisters == 32 ? 16 / vectors : (vectors == 2 ? 6 : 8);
template <int vectors>
inline constexpr bool kBySix = kArea<vectors> == 6;  // else by a power of two

// Prefetches what is ahead, a line at each of a loop's `steps`; where nothing is ahead, the line at `here` each time.
class Asking {
 public:
  Asking(Ahead* ahead, int64_t steps, const void* here) : line_(ahead ? ahead->take(steps) : nullptr) {
    if (line_) step_ = Ahead::line;
    if (!line_) line_ = static_cast<const char*>(here);
  }
  void at(int64_t step) const { __builtin_prefetch(line_ + step * step_, 0, 2); }

 private:
  const char* line_;
  int64_t step_ = 0;
};

template <class A>
struct TileArguments {
  const A* in;  // under the first tap of the tile's first output
  int64_t in_row, in_block;
  int64_t in_step;  // from the input of one row of the tile to that of the next
  const A* weights;
  int64_t in_channels, kernel_h, tap_sets;
  int64_t first, last;  // the kernel's rows that meet the image
  const View<A>* out;
  int64_t b, y, x;  // the tile's first output
  const A* bias;    // or null
  const Combine<A>* combine;
  const char* ahead;   // what to ask for at the first step
  int64_t ahead_step;  // bytes from there to the next step's
};

template <class A>
using TileKernel = void (*)(const TileArguments<A>&);

// `step` input pixels lie between neighbouring outputs. `whole`: the tile is as wide as the image, and the first and
// the last input pixel under it are halo.
template <class A, int vectors, int rows, int pixels, int taps, int step, bool whole>
void convolve_tile(const TileArguments<A>& k) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>, reach = (pixels - 1) * step + taps, left = whole ? 1 : 0, right = reach - left;
  constexpr bool together = !kBySix<vectors>;
  V sums[rows][pixels][vectors] = {};

  const int64_t row = k.in_row, next = k.in_step;
  const A* weights = k.weights;
  const A* block = k.in;
  const char* ahead = k.ahead;
  // Row r's input x meets tap t of output (x - t) / step.
  const auto meets = [](int x, int t) { return x >= t && (x - t) % step == 0 && (x - t) / step < pixels; };
  const auto multiply = [&](const A* in) __attribute__((always_inline)) {
    __builtin_prefetch(ahead, 0, 2);
    ahead += k.ahead_step;
    if constexpr (together) {
      V w[taps][vectors];
      FASTODE_UNROLL for (int t = 0; t < taps; ++t) {
        FASTODE_UNROLL for (int v = 0; v < vectors; ++v) w[t][v] =
            in_register(load<V>(weights + (t * vectors + v) * lanes));
      }
      FASTODE_UNROLL for (int r = 0; r < rows; ++r) {
        FASTODE_UNROLL for (int x = left; x < right; ++x) {
          const V value = in_register(splat<V>(in[r * next + x * lanes]));
          FASTODE_UNROLL for (int t = 0; t < taps; ++t) {
            if (meets(x, t)) {
              FASTODE_UNROLL for (int v = 0; v < vectors; ++v) sums[r][(x - t) / step][v] += value * w[t][v];
            }
          }
        }
      }
    } else {
      FASTODE_UNROLL for (int t = 0; t < taps; ++t) {
        const A* from = unshared(in);
        V w[vectors];
        FASTODE_UNROLL for (int v = 0; v < vectors; ++v) w[v] =
            in_register(load<V>(weights + (t * vectors + v) * lanes));
        FASTODE_UNROLL for (int r = 0; r < rows; ++r) {
          FASTODE_UNROLL for (int x = left; x < right; ++x) {
            if (meets(x, t)) {
              const V value = in_register(splat<V>(from[r * next + x * lanes]));
              FASTODE_UNROLL for (int v = 0; v < vectors; ++v) sums[r][(x - t) / step][v] += value * w[v];
            }
          }
        }
      }
    }
    weights += taps * vectors * lanes;
  };
  int64_t remaining = k.in_channels;
  if constexpr (taps == 1) {  // of a kernel of one tap nothing but channels is gone over
    if (k.kernel_h * k.tap_sets == 1)
      for (; remaining >= lanes; remaining -= lanes, block += k.in_block)
        for (int64_t c = 0; c < lanes; ++c) multiply(block + c);
  }
  for (; remaining > 0; remaining -= lanes, block += k.in_block) {
    const int64_t channels = remaining < lanes ? remaining : lanes;
    const int64_t kernel_row = k.tap_sets * channels * taps * vectors * lanes;
    weights += k.first * kernel_row;
    for (int64_t ky = k.first; ky < k.last; ++ky) {
      for (int64_t set = 0; set < k.tap_sets; ++set) {
        const A* in = block + ky * row + set * taps * lanes;
        for (int64_t c = 0; c < channels; ++c) multiply(in + c);
      }
    }
    weights += (k.kernel_h - k.last) * kernel_row;
  }

  const Combine<A>& combine = *k.combine;
  FASTODE_UNROLL for (int v = 0; v < vectors; ++v) {
    const V bias = k.bias ? load<V>(k.bias + v * lanes) : V{};
    FASTODE_UNROLL for (int r = 0; r < rows; ++r) {
      FASTODE_UNROLL for (int x = 0; x < pixels; ++x) sums[r][x][v] = (sums[r][x][v] + bias) * combine.scale;
    }
  }
  for (int i = 0; i < combine.count; ++i) {
    const View<A> term = combine.term[i];
    const A* from = term.pixel_at(k.b, k.y, k.x);
    const A coef = combine.coef[i];
    FASTODE_UNROLL for (int v = 0; v < vectors; ++v) {
      FASTODE_UNROLL for (int r = 0; r < rows; ++r) {
        FASTODE_UNROLL for (int x = 0; x < pixels; ++x) sums[r][x][v] +=
            coef * load<V>(from + v * term.block + r * term.row + x * term.pixel);
      }
    }
  }
  const View<A> out = *k.out;
  A* to = out.pixel_at(k.b, k.y, k.x);
  FASTODE_UNROLL for (int v = 0; v < vectors; ++v) {
    FASTODE_UNROLL for (int r = 0; r < rows; ++r) {
      FASTODE_UNROLL for (int x = 0; x < pixels; ++x)
          store<V>(to + v * out.block + r * out.row + x * out.pixel, sums[r][x][v]);
    }
  }
}

// Seven pixels are a tile by themselves, where that is worth its code: as 4, 2 and 1 of them most of the accumulators
// lie idle in the last ones.
template <int vectors, int taps, int step>
inline constexpr bool kSevens = vectors == 2 && taps == 3 && step == 1 && kRegisters == 32;

// Four pixels are one where the image has no more, and what its sides leave out makes up for the idle accumulators.
template <int vectors, int taps, int step>
inline constexpr bool kFours = kBySix<vectors> && taps == 3 && step == 1;

// Pixels of the next narrower tile: after 6, as 3 divides the width of few images, 2.
inline constexpr int narrower(int pixels) { return pixels == 6 ? 2 : pixels / 2; }

// Rows of a tile of `pixels`: as many as fit, half of them where a tile is of six, or one.
template <int vectors>
inline constexpr int full_rows(int pixels) {
  return kBySix<vectors> ? 6 / pixels : std::min(4, kArea<vectors> / pixels);
}
template <int vectors>
inline constexpr int half_rows(int full) {
  return kBySix<vectors> ? (full + 1) / 2 : 1;
}
template <int vectors>
inline int next_rows(int full, int64_t left) {
  const int half = half_rows<vectors>(full);
  return left >= full ? full : left >= half ? half : 1;
}

template <class A, int vectors, int taps, int step, bool whole, int here = kArea<vectors>>
TileKernel<A> tile_kernel(int pixels, int rows) {
  if constexpr (here == 0) {
    return nullptr;
  } else {
    if constexpr (here == kArea<vectors> && kSevens<vectors, taps, step>) {
      if (pixels == 7) return convolve_tile<A, vectors, 1, 7, taps, step, whole>;
    }
    if constexpr (here == kArea<vectors> && kFours<vectors, taps, step>) {
      if (pixels == 4) return convolve_tile<A, vectors, 1, 4, taps, step, whole>;
    }
    constexpr int full = full_rows<vectors>(here), half = half_rows<vectors>(full);
    if (pixels == here)
      return rows == full   ? convolve_tile<A, vectors, full, here, taps, step, whole>
             : rows == half ? convolve_tile<A, vectors, half, here, taps, step, whole>
                            : convolve_tile<A, vectors, 1, here, taps, step, whole>;
    return tile_kernel<A, vectors, taps, step, whole, narrower(here)>(pixels, rows);
  }
}

template <class A>
struct ConvPlan {
  int64_t out_height, out_width;      // of the outputs visited
  int64_t up, left;                   // input pixels from output (0, 0)'s place to its first tap
  int64_t out_blocks, group_weights;  // weights of one group of `vectors` output blocks
  const A* packed;
  int64_t in_channels, kernel_h, tap_sets;
  const A* bias;          // or null
  int64_t in_height = 0;  // 0: taps are multiplied where they meet the halo, too
};

// Whether every sample's views lie as far behind the one before as the second's behind the first.
template <class A>
bool evenly_apart(const ConvJob<A>* jobs, int64_t count) {
  const auto evenly = [&](const auto& at_of) {
    for (int64_t n = 2; n < count; ++n)
      if (at_of(jobs[n]) - at_of(jobs[n - 1]) != at_of(jobs[1]) - at_of(jobs[0])) return false;
    return true;
  };
  for (int i = 0; i < jobs->combine.count; ++i)
    if (!evenly([=](const ConvJob<A>& job) { return job.combine.term[i].at; })) return false;
  return evenly([](const ConvJob<A>& job) { return job.in.at; }) &&
         evenly([](const ConvJob<A>& job) { return job.out.at; });
}

// Row y of this sample and of those behind it, as the rows of one map.
template <class A>
ConvJob<A> across(const ConvJob<A>* jobs, int64_t y) {
  const auto turn = [y](const View<A>& here, const View<A>& next) {
    return View<A>{here.at + y * here.row, next.at - here.at, here.pixel, here.block};
  };
  ConvJob<A> job = {turn(jobs[0].in, jobs[1].in), turn(jobs[0].out, jobs[1].out), jobs->combine};
  for (int i = 0; i < job.combine.count; ++i)
    job.combine.term[i] = turn(jobs[0].combine.term[i], jobs[1].combine.term[i]);
  return job;
}

// The input under the outputs of rows [y, y + rows), the kernel's rows that meet the image there, and what to ask for
// meanwhile.
template <class A>
void place(TileArguments<A>& tile, const ConvPlan<A>& plan, const View<A>& in, int64_t y, int64_t rows, int step,
           Ahead* ahead) {
  tile.in = in.at + (y * step - plan.up) * in.row + (tile.x * step - plan.left) * kLanes<A>;
  tile.in_row = in.row, tile.in_step = step * in.row, tile.in_block = in.block;
  tile.first = 0, tile.last = plan.kernel_h;
  if (plan.in_height > 0) {
    tile.first = std::max<int64_t>(0, plan.up - (y + rows - 1) * step);
    tile.last = std::min(plan.kernel_h, plan.in_height + plan.up - y * step);
  }
  const char* soon = ahead ? ahead->take(plan.in_channels * (tile.last - tile.first) * plan.tap_sets) : nullptr;
  tile.ahead = soon ? soon : reinterpret_cast<const char*>(tile.in), tile.ahead_step = soon ? Ahead::line : 0;
}

// Of a band of inputs: a quarter of a core's own cache, which is small where registers are few.
inline constexpr int64_t kBandBytes = kRegisters == 32 ? 1 << 19 : 1 << 17;

// One slice of the weights for all jobs, or for a band of rows of one job where its map is large, then the next.
template <class A, int vectors, int taps, int step>
void run_plan(const ConvPlan<A>& plan, const ConvJob<A>* jobs, int64_t count, Ahead* ahead = nullptr) {
  constexpr int lanes = kLanes<A>;
  constexpr bool three = taps == 3 && step == 1;
  const bool padded = three && plan.tap_sets == 1 && plan.left == 1;
  TileArguments<A> tile{};
  tile.weights = plan.packed, tile.bias = plan.bias;
  tile.in_channels = plan.in_channels, tile.kernel_h = plan.kernel_h, tile.tap_sets = plan.tap_sets;
  const auto kernel = [&](int pixels, int rows) {
    const bool whole = padded && pixels == plan.out_width;
    return whole ? tile_kernel<A, vectors, taps, step, three>(pixels, rows)
                 : tile_kernel<A, vectors, taps, step, false>(pixels, rows);
  };
  // f(pixels) for the tiles of a row, of `pixels` and narrower ones; tile.x is each one's first output.
  const auto each_tile = [&](int pixels, const auto& f) {
    for (tile.x = 0; tile.x < plan.out_width; tile.x += pixels) {
      const int64_t left = plan.out_width - tile.x;
      if (kSevens<vectors, taps, step> && (left == 7 || left == 14)) pixels = 7;
      while (pixels > left) pixels = narrower(pixels);
      f(pixels);
    }
  };
  // Rows that stay in the cache while all groups of outputs read them.
  constexpr int64_t least_rows = kBySix<vectors> ? 3 : 4;
  const int64_t row_bytes = step * jobs->in.row * blocks_of<A>(plan.in_channels) * static_cast<int64_t>(sizeof(A));
  const int64_t band = std::max<int64_t>(1, kBandBytes / (row_bytes * least_rows)) * least_rows;
  const bool banded = plan.out_blocks > vectors && plan.out_height >= 2 * band;
  // A tile over one row of several samples leaves out what one over several rows cannot.
  const int width = static_cast<int>(plan.out_width);
  const bool narrow = kBySix<vectors> ? width == 4 || width <= 2 : kArea<vectors> % width == 0;
  const bool fours = kFours<vectors, taps, step> && width == 4;
  const bool stacks = !banded && plan.in_height > 0 && narrow && count > 1 && evenly_apart(jobs, count);
  const int stacked = kBySix<vectors> ? std::min(2, width) : width;
  const int most = full_rows<vectors>(stacked), least = fours ? most : 2;
  const auto visit = [&](const ConvJob<A>* first, const ConvJob<A>* end, int64_t top, int64_t bottom) {
    tile.weights = plan.packed, tile.bias = plan.bias;
    for (tile.b = 0; tile.b < plan.out_blocks; tile.b += vectors) {
      const ConvJob<A>* job = first;
      for (int many; stacks && (many = next_rows<vectors>(most, end - job)) >= least; job += many)
        for (int64_t y = top; y < bottom; ++y) {
          const ConvJob<A> row = across(job, y);
          tile.y = 0, tile.out = &row.out, tile.combine = &row.combine;
          each_tile(stacked, [&](int pixels) {
            place(tile, plan, job->in, y, 1, step, ahead);
            tile.in_step = row.in.row;
            kernel(pixels, many)(tile);
          });
        }
      for (; job < end; ++job) {
        tile.out = &job->out, tile.combine = &job->combine;
        each_tile(fours ? 4 : kArea<vectors>, [&](int pixels) {
          const int full = full_rows<vectors>(pixels);
          int64_t rows;
          for (tile.y = top; tile.y < bottom; tile.y += rows) {
            const int64_t left = bottom - tile.y;
            rows = full == 3 && left == 4 ? 2 : next_rows<vectors>(full, left);  // four as two and two
            place(tile, plan, job->in, tile.y, rows, step, ahead);
            kernel(pixels, static_cast<int>(rows))(tile);
          }
        });
      }
      tile.weights += plan.group_weights;
      if (tile.bias) tile.bias += vectors * lanes;
    }
  };
  if (!banded) return visit(jobs, jobs + count, 0, plan.out_height);
  for (int64_t n = 0; n < count; ++n)
    for (int64_t top = 0, bottom; top < plan.out_height; top = bottom) {
      bottom = plan.out_height - top < 2 * band ? plan.out_height : top + band;
      visit(jobs + n, jobs + n + 1, top, bottom);
    }
}

// Weight gradient of `taps` horizontal taps x `inputs` input channels x `vectors` output vectors, over all pixels.
template <class A>
struct GradientTile {
  const A* in;         // input under output (first_row, 0)'s first tap, at the first input channel
  const A* cotangent;  // output (first_row, 0)
  int64_t rows, width, in_row, in_pixel, cotangent_row, cotangent_plane;
  int64_t second = 0, third = 0;  // from the first pair of input channels to the others, of a tile of three pairs
};

// One pass per output pixel: `taps` broadcasts per input channel.
template <class A, int vectors, int inputs>
void gradient_tile(const GradientTile<A>* tiles, int64_t count, A* gradient, int64_t input_stride,
                   int64_t vector_stride) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>;
  // Wanted at the end, and of many channels far away.
  FASTODE_UNROLL for (int i = 0; i < inputs; ++i) {
    FASTODE_UNROLL for (int v = 0; v < vectors; ++v)
        __builtin_prefetch(gradient + i * input_stride + v * vector_stride, 1);
  }
  V sums[inputs][vectors] = {};
  for (int64_t n = 0; n < count; ++n) {
    const GradientTile<A>& k = tiles[n];
    for (int64_t y = 0; y < k.rows; ++y) {
      const A* in = k.in + y * k.in_row;
      const A* cotangent = k.cotangent + y * k.cotangent_row;
      for (int64_t x = 0; x < k.width; ++x, in += k.in_pixel, cotangent += lanes) {
        V g[vectors];
        FASTODE_UNROLL for (int v = 0; v < vectors; ++v) g[v] = in_register(load<V>(cotangent + v * k.cotangent_plane));
        FASTODE_UNROLL for (int i = 0; i < inputs; ++i) {
          const V value = in_register(splat<V>(in[i]));
          FASTODE_UNROLL for (int v = 0; v < vectors; ++v) sums[i][v] += value * g[v];
        }
      }
    }
  }
  FASTODE_UNROLL for (int i = 0; i < inputs; ++i) {
    FASTODE_UNROLL for (int v = 0; v < vectors; ++v) {
      A* to = gradient + i * input_stride + v * vector_stride;
      store<V>(to, load<V>(to) + sums[i][v]);
    }
  }
}

// One tap of three pairs of input channels, the pairs of two blocks perhaps, and two vectors: twelve sums, where four
// inputs leave eight, which wait for each other. Pair p's gradient is at gradient[p].
template <class A>
void gradient_tile_of_pairs(const GradientTile<A>* tiles, int64_t count, A* const (&gradient)[3], int64_t input_stride,
                            int64_t vector_stride) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>, vectors = 2;
  const auto each_sum = [&](const auto& f) {
    FASTODE_UNROLL for (int p = 0; p < 3; ++p) {
      FASTODE_UNROLL for (int i = 0; i < 2; ++i) {
        FASTODE_UNROLL for (int v = 0; v < vectors; ++v) f(p, i, v, gradient[p] + i * input_stride + v * vector_stride);
      }
    }
  };
  each_sum([](int, int, int, const A* at) { __builtin_prefetch(at, 1); });  // wanted at the end
  V sums[3][2][vectors] = {};
  for (int64_t n = 0; n < count; ++n) {
    const GradientTile<A>& k = tiles[n];
    for (int64_t y = 0; y < k.rows; ++y) {
      const A* in[3] = {k.in + y * k.in_row};
      in[1] = in[0] + k.second, in[2] = in[0] + k.third;
      const A* cotangent = k.cotangent + y * k.cotangent_row;
      for (int64_t x = 0; x < k.width; ++x, cotangent += lanes) {
        V g[vectors];
        FASTODE_UNROLL for (int v = 0; v < vectors; ++v) g[v] = in_register(load<V>(cotangent + v * k.cotangent_plane));
        FASTODE_UNROLL for (int p = 0; p < 3; ++p) {
          FASTODE_UNROLL for (int i = 0; i < 2; ++i) {
            const V value = in_register(splat<V>(in[p][i]));
            FASTODE_UNROLL for (int v = 0; v < vectors; ++v) sums[p][i][v] += value * g[v];
          }
          in[p] += k.in_pixel;
        }
      }
    }
  }
  each_sum([&](int p, int i, int v, A* to) { store<V>(to, load<V>(to) + sums[p][i][v]); });
}

// The three taps of a kernel's row at any stride, `inputs` input channels and `vectors` output vectors.
template <class A, int inputs, int vectors>
void gradient_tile_of_row(const GradientTile<A>* tiles, int64_t count, A* gradient, int64_t vector_stride,
                          Ahead* ahead = nullptr) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>, taps = 3;
  V sums[inputs][taps][vectors] = {};
  for (int64_t n = 0; n < count; ++n) {
    const GradientTile<A>& k = tiles[n];
    for (int64_t y = 0; y < k.rows; ++y) {
      const A* in = k.in + y * k.in_row;
      const A* cotangent = k.cotangent + y * k.cotangent_row;
      const Asking asking(ahead, k.width, in);
      for (int64_t x = 0; x < k.width; ++x, in += k.in_pixel, cotangent += lanes) {
        asking.at(x);
        V g[vectors];
        FASTODE_UNROLL for (int v = 0; v < vectors; ++v) g[v] = in_register(load<V>(cotangent + v * k.cotangent_plane));
        FASTODE_UNROLL for (int t = 0; t < taps; ++t) {
          FASTODE_UNROLL for (int i = 0; i < inputs; ++i) {
            const V value = in_register(splat<V>(in[t * lanes + i]));
            FASTODE_UNROLL for (int v = 0; v < vectors; ++v) sums[i][t][v] += value * g[v];
          }
        }
      }
    }
  }
  FASTODE_UNROLL for (int i = 0; i < inputs; ++i) {
    FASTODE_UNROLL for (int t = 0; t < taps; ++t) {
      FASTODE_UNROLL for (int v = 0; v < vectors; ++v) {
        A* to = gradient + (i * taps + t) * lanes + v * vector_stride;
        store<V>(to, load<V>(to) + sums[i][t][v]);
      }
    }
  }
}

// One input pixel of `inputs` channels meets the cotangents behind, at and before it: the taps [first, last) of three.
template <class A, int inputs, int first, int last, class V>
inline void gradient_pixel(const A* in, const A* cotangent, V (&sums)[inputs][3]) {
  V g[3];
  FASTODE_UNROLL for (int t = first; t < last; ++t) g[t] = load<V>(cotangent + (1 - t) * kLanes<A>);
  FASTODE_UNROLL for (int i = 0; i < inputs; ++i) {
    const V value = splat<V>(in[i]);
    FASTODE_UNROLL for (int t = first; t < last; ++t) sums[i][t] += value * g[t];
  }
}

// Three taps at stride 1: an input pixel meets the three cotangents around it, so it is broadcast once. No halo is
// read.
template <class A, int inputs>
void gradient_tile_of_three(const GradientTile<A>* tiles, int64_t count, A* gradient) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>, taps = 3;
  // Wanted at the end, and of many channels far away.
  FASTODE_UNROLL for (int i = 0; i < inputs * taps; ++i) __builtin_prefetch(gradient + i * lanes, 1);
  V sums[inputs][taps] = {};
  for (int64_t n = 0; n < count; ++n) {
    const GradientTile<A>& k = tiles[n];
    for (int64_t y = 0; y < k.rows; ++y) {
      const A* in = k.in + y * k.in_row + lanes;
      const A* cotangent = k.cotangent + y * k.cotangent_row;
      if (k.width == 1) {
        gradient_pixel<A, inputs, 1, 2>(in, cotangent, sums);
        continue;
      }
      gradient_pixel<A, inputs, 0, 2>(in, cotangent, sums);
      for (int64_t x = 2; x < k.width; ++x) gradient_pixel<A, inputs, 0, 3>(in += lanes, cotangent += lanes, sums);
      gradient_pixel<A, inputs, 1, 3>(in + lanes, cotangent + lanes, sums);
    }
  }
  FASTODE_UNROLL for (int i = 0; i < inputs; ++i) {
    FASTODE_UNROLL for (int t = 0; t < taps; ++t) {
      A* to = gradient + (i * taps + t) * lanes;
      store<V>(to, load<V>(to) + sums[i][t]);
    }
  }
}

}  // namespace fastode::resident

// The micro-kernels. A tile of rows x pixels x output vectors stays in registers and inputs are broadcast; the taps of
// one tap set share each broadcast, so a 3x3 convolution loads an input once per kernel row.
#pragma once

#include <utility>

#include "conv.h"

#define FASTODE_UNROLL _Pragma("GCC unroll 64")

namespace fastode::resident {

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kTile = 16;  // accumulators of a tile; the other half of the registers holds weights and inputs
#else
inline constexpr int kTile = 8;
#endif

template <class A>
struct TileArguments {
  const A* in;  // under the first tap of the tile's first output
  int64_t in_row, in_block;
  const A* weights;
  int64_t in_channels, kernel_h, tap_sets;
  const View<A>* out;
  int64_t b, y, x;  // the tile's first output
  const A* bias;    // or null
  const Combine<A>* combine;
  const char* ahead;   // what to ask for at the first step
  int64_t ahead_step;  // bytes from there to the next step's
};

template <class A>
using TileKernel = void (*)(const TileArguments<A>&);

// `step` input pixels (and rows) lie between neighbouring outputs.
template <class A, int vectors, int rows, int pixels, int taps, int step>
void convolve_tile(const TileArguments<A>& k) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>, reach = (pixels - 1) * step + taps;
  V sums[rows][pixels][vectors] = {};

  const int64_t row = k.in_row;
  const A* weights = k.weights;
  const A* block = k.in;
  const char* ahead = k.ahead;
  for (int64_t left = k.in_channels; left > 0; left -= lanes, block += k.in_block) {
    const int64_t channels = left < lanes ? left : lanes;
    for (int64_t ky = 0; ky < k.kernel_h; ++ky) {
      for (int64_t set = 0; set < k.tap_sets; ++set) {
        const A* in = block + ky * row + set * taps * lanes;
        for (int64_t c = 0; c < channels; ++c, ++in, weights += taps * vectors * lanes) {
          __builtin_prefetch(ahead, 0, 2);
          ahead += k.ahead_step;
          V w[taps][vectors];
          FASTODE_UNROLL for (int t = 0; t < taps; ++t) {
            FASTODE_UNROLL for (int v = 0; v < vectors; ++v) w[t][v] = load<V>(weights + (t * vectors + v) * lanes);
          }
          FASTODE_UNROLL for (int r = 0; r < rows; ++r) {
            FASTODE_UNROLL for (int x = 0; x < reach; ++x) {
              const V value = splat<V>(in[r * step * row + x * lanes]);
              FASTODE_UNROLL for (int t = 0; t < taps; ++t) {
                if (x >= t && (x - t) % step == 0 && (x - t) / step < pixels) {
                  FASTODE_UNROLL for (int v = 0; v < vectors; ++v) sums[r][(x - t) / step][v] += value * w[t][v];
                }
              }
            }
          }
        }
      }
    }
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

// Tiles of 2^p pixels with as many rows as fit, or one row where fewer are left.
template <class A, int vectors, int taps, int step, int power = 4>
TileKernel<A> tile_kernel(int pixels, bool one_row) {
  if constexpr (power < 0) {
    return nullptr;
  } else {
    constexpr int here = 1 << power, area = kTile / vectors;
    if constexpr (here <= area) {
      constexpr int rows = area / here < 4 ? area / here : 4;
      if (pixels == here)
        return one_row ? convolve_tile<A, vectors, 1, here, taps, step>
                       : convolve_tile<A, vectors, rows, here, taps, step>;
    }
    return tile_kernel<A, vectors, taps, step, power - 1>(pixels, one_row);
  }
}

template <class A>
struct ConvPlan {
  int64_t out_height, out_width;      // of the outputs visited
  int64_t up, left;                   // input pixels from output (0, 0)'s place to its first tap
  int64_t out_blocks, group_weights;  // weights of one group of `vectors` output blocks
  const A* packed;
  int64_t in_channels, kernel_h, tap_sets;
  const A* bias;  // or null
};

// One slice of the weights for all jobs, then the next.
template <class A, int vectors, int taps, int step>
void run_plan(const ConvPlan<A>& plan, const ConvJob<A>* jobs, int64_t count, Ahead* ahead = nullptr) {
  constexpr int area = kTile / vectors, lanes = kLanes<A>;
  TileArguments<A> tile{};
  tile.weights = plan.packed, tile.bias = plan.bias;
  tile.in_channels = plan.in_channels, tile.kernel_h = plan.kernel_h, tile.tap_sets = plan.tap_sets;
  const int64_t steps = plan.in_channels * plan.kernel_h * plan.tap_sets;
  for (tile.b = 0; tile.b < plan.out_blocks; tile.b += vectors) {
    for (const ConvJob<A>* job = jobs; job < jobs + count; ++job) {
      const View<A>& in = job->in;
      tile.in_row = in.row, tile.in_block = in.block, tile.out = &job->out, tile.combine = &job->combine;
      tile.x = 0;
      for (int pixels = area; tile.x < plan.out_width; pixels /= 2) {
        const int64_t rows = std::min(4, area / pixels);
        const auto full = tile_kernel<A, vectors, taps, step>(pixels, false);
        const auto single = tile_kernel<A, vectors, taps, step>(pixels, true);
        for (; tile.x + pixels <= plan.out_width; tile.x += pixels) {
          for (tile.y = 0; tile.y < plan.out_height;) {
            const bool whole = tile.y + rows <= plan.out_height;
            tile.in = in.at + (tile.y * step - plan.up) * in.row + (tile.x * step - plan.left) * lanes;
            const char* soon = ahead ? ahead->take(steps) : nullptr;
            tile.ahead = soon ? soon : reinterpret_cast<const char*>(tile.in), tile.ahead_step = soon ? Ahead::line : 0;
            (whole ? full : single)(tile);
            tile.y += whole ? rows : 1;
          }
        }
      }
    }
    tile.weights += plan.group_weights;
    if (tile.bias) tile.bias += vectors * lanes;
  }
}

// Weight gradient of `taps` horizontal taps x `inputs` input channels x `vectors` output vectors, over all pixels.
template <class A>
struct GradientTile {
  const A* in;         // input under output (first_row, 0)'s first tap, at the first input channel
  const A* cotangent;  // output (first_row, 0)
  int64_t rows, width, in_row, in_pixel, cotangent_row, cotangent_plane;
};

// One pass per output pixel: `taps` broadcasts per input channel.
template <class A, int vectors, int inputs>
void gradient_tile(const GradientTile<A>* tiles, int64_t count, A* gradient, int64_t input_stride,
                   int64_t vector_stride) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>;
  V sums[inputs][vectors] = {};
  for (int64_t n = 0; n < count; ++n) {
    const GradientTile<A>& k = tiles[n];
    for (int64_t y = 0; y < k.rows; ++y) {
      const A* in = k.in + y * k.in_row;
      const A* cotangent = k.cotangent + y * k.cotangent_row;
      for (int64_t x = 0; x < k.width; ++x, in += k.in_pixel, cotangent += lanes) {
        V g[vectors];
        FASTODE_UNROLL for (int v = 0; v < vectors; ++v) g[v] = load<V>(cotangent + v * k.cotangent_plane);
        FASTODE_UNROLL for (int i = 0; i < inputs; ++i) {
          const V value = splat<V>(in[i]);
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

// Three taps at stride 1: an input pixel meets the three cotangents around it, so it is broadcast once. The input's
// halo is zero and is skipped; the cotangent's halo is read and must be zero.
template <class A, int inputs>
void gradient_tile_of_three(const GradientTile<A>* tiles, int64_t count, A* gradient) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>, taps = 3;
  V sums[inputs][taps] = {};
  for (int64_t n = 0; n < count; ++n) {
    const GradientTile<A>& k = tiles[n];
    for (int64_t y = 0; y < k.rows; ++y) {
      const A* in = k.in + y * k.in_row + lanes;
      const A* cotangent = k.cotangent + y * k.cotangent_row;
      for (int64_t x = 0; x < k.width; ++x, in += lanes, cotangent += lanes) {
        V g[taps];
        FASTODE_UNROLL for (int t = 0; t < taps; ++t) g[t] = load<V>(cotangent + (1 - t) * lanes);
        FASTODE_UNROLL for (int i = 0; i < inputs; ++i) {
          const V value = splat<V>(in[i]);
          FASTODE_UNROLL for (int t = 0; t < taps; ++t) sums[i][t] += value * g[t];
        }
      }
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

// How 3x3 convolutions are filtered in products of fewer numbers, tile by tile: what the inputs and the weights of a
// tile are spread to, which of these are multiplied into which sums, and how the outputs are gathered from those.
// Included by filtering_gradient.h.
//
// Of stride 1 this is Winograd's F(2x2, 3x3). Of stride 2 a row or a column of two outputs is
//   y0 = w0 x0 + w1 x1 + w2 x2,  y1 = w0 x2 + w1 x3 + w2 x4,
// of which the taps w0 and w2, every second input, are F(2, 2): with q = (w0 + w2) x2
//   y0 = w0 (x0 - x2) + w1 x1 + q,  y1 = q + w1 x3 + w2 (x4 - x2):
// five products in place of six, and 25 of a tile in place of 36. Pulled back and in the weights' gradients alike.
#pragma once

#include <immintrin.h>

#include "winograd_tiles.h"

namespace fastode::resident {
namespace {

// A row's or column's part in `products`: f(input, weight, sum, whether it is the first of its sum).
template <int n, class F>
inline void each_product(const int (&input)[n], const int (&weight)[n], const int (&sum)[n], int inputs, int weights,
                         int sums, const F& f) {
  const auto first = [&](int i) { return std::find(sum, sum + i, sum[i]) == sum + i; };
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j)
      f(inputs * input[i] + input[j], weights * weight[i] + weight[j], sums * sum[i] + sum[j], first(i) && first(j));
}

template <class M>
inline M larger(M a, M b) {
  return (M)_mm512_max_epu16((__m512i)a, (__m512i)b);
}

// Stride 1, and its pull-back.
struct Straight {
  static constexpr int kInputs = 16, kSums = 16, kProducts = 16;  // of a tile
  static constexpr int kSide = 2;                                 // its rows and columns of outputs
  // Its rows and columns of inputs, those from a tile to the next, and those before its own first one.
  static constexpr int kPatch = 4, kStep = 2, kBefore = 1;
  static constexpr int kWindows = 2;  // sets of rows or columns that an output is made of

  template <class F>
  static void products(const F& f) {
    for (int p = 0; p < 16; ++p) f(p, p, p, true);
  }
  // The largest in each window.
  template <class M>
  static void windows(const M (&line)[kPatch], M (&to)[kWindows]) {
    const M both = larger(line[1], line[2]);
    to[0] = larger(line[0], both), to[1] = larger(both, line[3]);
  }
  template <class F>
  static void spread_run(const View<bfloat16>& in, int64_t b, const RowOfTiles& run, const F& put) {
    spread_inputs(in, b, run, put);
  }
  template <class V, class S>
  static void gather(const S& m, V (&sums)[kSide][kSide]) {
    gather_tile(m, sums);
  }
  template <class V>
  static void spread_kernel(const V (&g)[3][3], V (&to)[4][4]) {
    resident::spread_kernel(g, to);
  }
  static constexpr float kGrowth = 2.25f;  // of weights
  template <class V, class F>
  static void directly(const View<bfloat16>& in, const RowOfTiles& run, int64_t t, int64_t channels, const F& kernel,
                       V (&sums)[kSide][kSide]) {
    sum_directly(in, 2 * run.y, 2 * (run.x + t), channels, kernel, sums);
  }
};

// What both ways of stride 2 have in common.
struct Strided {
  // Weights w0, w1, w0 + w2, w2 of a row or column.
  template <class V>
  static void spread_kernel(const V (&g)[3][3], V (&to)[4][4]) {
    const auto column = [](V g0, V g1, V g2, V(&u)[4]) { u[0] = g0, u[1] = g1, u[2] = g0 + g2, u[3] = g2; };
    V rows[3][4];
    FASTODE_UNROLL for (int x = 0; x < 3; ++x) column(g[0][x], g[1][x], g[2][x], rows[x]);
    FASTODE_UNROLL for (int y = 0; y < 4; ++y) column(rows[0][y], rows[1][y], rows[2][y], to[y]);
  }
  static constexpr float kGrowth = 4;

  // The inputs of a run's tiles, each `Way::kStep` columns from the one before.
  template <class Way, int n, class F>
  static void spread_run(const View<bfloat16>& in, int64_t b, const RowOfTiles& run, const F& put) {
    using V = Vec<float>;
    constexpr int patch = Way::kPatch, step = Way::kStep, kept = patch - step;
    const bfloat16* at = in.pixel_at(b, step * run.y - Way::kBefore, step * run.x - Way::kBefore);
    V columns[patch][n];
    const auto read = [&](int k, const bfloat16* from) {
      V line[patch];
      FASTODE_UNROLL for (int y = 0; y < patch; ++y) line[y] = load_stored(from + y * in.row);
      Way::spread(line, columns[k]);
    };
    FASTODE_UNROLL for (int k = 0; k < kept; ++k) read(k, at + k * in.pixel);
    for (int64_t t = 0; t < run.count; ++t, at += step * in.pixel) {
      FASTODE_UNROLL for (int k = kept; k < patch; ++k) read(k, at + k * in.pixel);
      FASTODE_UNROLL for (int r = 0; r < n; ++r) {
        V line[patch], v[n];
        FASTODE_UNROLL for (int k = 0; k < patch; ++k) line[k] = columns[k][r];
        Way::spread(line, v);
        FASTODE_UNROLL for (int k = 0; k < n; ++k) put(n * r + k, t, v[k]);
      }
      FASTODE_UNROLL for (int k = 0; k < kept; ++k) {
        FASTODE_UNROLL for (int r = 0; r < n; ++r) columns[k][r] = columns[step + k][r];
      }
    }
  }
};

// Stride 2.
struct Halving : Strided {
  static constexpr int kInputs = 25, kSums = 9, kProducts = 25, kSide = 2, kPatch = 5, kStep = 4, kBefore = 1,
                       kWindows = 2;

  template <class F>
  static void products(const F& f) {
    each_product({0, 1, 2, 3, 4}, {0, 1, 2, 1, 3}, {0, 0, 1, 2, 2}, 5, 4, 3, f);
  }
  template <class M>
  static void windows(const M (&line)[kPatch], M (&to)[kWindows]) {
    to[0] = larger(larger(line[0], line[1]), line[2]), to[1] = larger(line[2], larger(line[3], line[4]));
  }
  template <class V>
  static void spread(const V (&x)[kPatch], V (&to)[5]) {
    to[0] = x[0] - x[2], to[1] = x[1], to[2] = x[2], to[3] = x[3], to[4] = x[4] - x[2];
  }
  template <class F>
  static void spread_run(const View<bfloat16>& in, int64_t b, const RowOfTiles& run, const F& put) {
    Strided::spread_run<Halving, 5>(in, b, run, put);
  }
  template <class V, class S>
  static void gather(const S& m, V (&sums)[kSide][kSide]) {
    V columns[3][2];
    FASTODE_UNROLL for (int k = 0; k < 3; ++k) columns[k][0] = m(k) + m(3 + k), columns[k][1] = m(3 + k) + m(6 + k);
    FASTODE_UNROLL for (int i = 0; i < 2; ++i) sums[i][0] = columns[0][i] + columns[1][i],
                                               sums[i][1] = columns[1][i] + columns[2][i];
  }
  template <class V, class F>
  static void directly(const View<bfloat16>& in, const RowOfTiles& run, int64_t t, int64_t channels, const F& kernel,
                       V (&sums)[kSide][kSide]) {
    sum_directly(in, 2 * run.y, 2 * (run.x + t), channels, kernel, sums, 2);
  }
};

// Its pull-back. The weights come turned round: g0 is w2. Of two outputs' cotangents, and the next one's, the inputs'
// are w1 y0, w2 y0 + w0 y1, w1 y1, w2 y1 + w0 y2.
struct Doubling : Strided {
  static constexpr int kInputs = 16, kSums = 25, kProducts = 25, kSide = 4, kPatch = 3, kStep = 2, kBefore = 0,
                       kWindows = 4;

  template <class F>
  static void products(const F& f) {
    each_product({3, 0, 1, 1, 2}, {1, 0, 2, 1, 3}, {0, 1, 2, 3, 4}, 4, 4, 5, f);
  }
  template <class M>
  static void windows(const M (&line)[kPatch], M (&to)[kWindows]) {
    to[0] = line[0], to[1] = larger(line[0], line[1]), to[2] = line[1], to[3] = larger(line[1], line[2]);
  }
  template <class V>
  static void spread(const V (&y)[kPatch], V (&to)[4]) {
    to[0] = y[0] - y[1], to[1] = y[1], to[2] = y[2] - y[1], to[3] = y[0];
  }
  template <class F>
  static void spread_run(const View<bfloat16>& in, int64_t b, const RowOfTiles& run, const F& put) {
    Strided::spread_run<Doubling, 4>(in, b, run, put);
  }
  template <class V, class S>
  static void gather(const S& m, V (&sums)[kSide][kSide]) {
    V columns[5][4];
    const auto line = [](V m0, V m1, V m2, V m3, V m4, V(&to)[4]) {
      to[0] = m0, to[1] = m1 + m2, to[2] = m3, to[3] = m2 + m4;
    };
    FASTODE_UNROLL for (int k = 0; k < 5; ++k) line(m(k), m(5 + k), m(10 + k), m(15 + k), m(20 + k), columns[k]);
    FASTODE_UNROLL for (int i = 0; i < 4; ++i)
        line(columns[0][i], columns[1][i], columns[2][i], columns[3][i], columns[4][i], sums[i]);
  }
  template <class V, class F>
  [[gnu::noinline]] static void directly(const View<bfloat16>& in, const RowOfTiles& run, int64_t t, int64_t channels,
                                         const F& kernel, V (&sums)[kSide][kSide]) {
    constexpr int64_t lanes = kLanes<float>;
    for (auto& row : sums) std::fill_n(row, kSide, V{});
    for (int64_t c = 0; c < channels; ++c) {
      V g[3][3];
      kernel(c, g);
      for (int i = 0; i < kSide; ++i)
        for (int j = 0; j < kSide; ++j)
          for (int k = 0; k < 9; ++k) {
            const int y = i - 1 + k / 3, x = j - 1 + k % 3;  // where it meets an output, twice its place
            if (y % 2 || x % 2) continue;
            const bfloat16* at = in.pixel_at(c / lanes, 2 * run.y + y / 2, 2 * (run.x + t) + x / 2);
            sums[i][j] += widen(at[c % lanes]) * g[k / 3][k % 3];
          }
    }
  }
};

}  // namespace
}  // namespace fastode::resident

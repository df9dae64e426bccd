// How weight gradients of 3x3 convolutions are filtered (filtering.h): what pairs of tiles' inputs and cotangents are
// spread to, and which of these are multiplied into which of 16 sums. Included by winograd_bf16_impl.h.
//
// Of stride 2, with the inputs x0 to x4 and cotangents y0, y1 of a row or column, and q = x2 (y0 + y1), the weights'
// are
//   (x0 - x2) y0 + q,  x1 y0 + x3 y1,  q + (x4 - x2) y1.
#pragma once

#include "filtering.h"
#include "fixed_point.h"

namespace fastode::resident {
namespace {

// Patches of a map that tiles meet: their sides, how far they lie apart, and from where before a tile's own first row
// and column on.
struct Patches {
  int64_t side, step, before;
};

// What the pairs of a run's tiles, whose number is even, have of their two rows and columns of cotangents: along(first,
// second, to) spreads the two of a row or column to n; to(product, pair) is where they go.
template <int n, class A, class F>
inline void spread_cotangents_along(const View<bfloat16>& cotangent, int64_t b, const RowOfTiles& run, __m512 scale,
                                    const A& along, const F& to) {
  using V = Vec<float>;
  const bfloat16* at = cotangent.pixel_at(b, 2 * run.y, 2 * run.x);
  const int64_t row = cotangent.row, pixel = cotangent.pixel;
  for (int64_t pair = 0; 2 * pair < run.count; ++pair, at += 4 * pixel) {
    V c[4][n];
    FASTODE_UNROLL for (int x = 0; x < 4; ++x) {
      const bfloat16* from = at + x * pixel;
      along(load_stored(from) * (V)scale, load_stored(from + row) * (V)scale, c[x]);
    }
    FASTODE_UNROLL for (int r = 0; r < n; ++r) {
      V one[n], two[n];
      along(c[0][r], c[1][r], one), along(c[2][r], c[3][r], two);
      FASTODE_UNROLL for (int k = 0; k < n; ++k) store_pairs(to(n * r + k, pair), (__m512)one[k], (__m512)two[k]);
    }
  }
}

// Of stride 1: B' d B and A y A'. The number of a run's tiles is even; to(product, pair) is where they go.
struct StraightGradient {
  static constexpr int kInputs = 16, kCotangents = 16;
  static constexpr Patches kPatches{Straight::kPatch, Straight::kStep, Straight::kBefore};

  template <class F>
  static void products(const F& f) {
    Straight::products(f);
  }
  template <class F>
  static void spread_input_pairs(const View<bfloat16>& in, int64_t b, const RowOfTiles& run, __m512 scale,
                                 const F& to) {
    using V = Vec<float>;
    const bfloat16* at = in.pixel_at(b, 2 * run.y - 1, 2 * run.x - 1);
    const int64_t row = in.row, pixel = in.pixel;
    const auto column = [=](const bfloat16* from, V(&c)[4]) {
      const V factor = (V)scale;
      spread(load_stored(from) * factor, load_stored(from + row) * factor, load_stored(from + 2 * row) * factor,
             load_stored(from + 3 * row) * factor, c);
    };
    V c[6][4];
    column(at, c[0]), column(at + pixel, c[1]);
    for (int64_t pair = 0; 2 * pair < run.count; ++pair, at += 4 * pixel) {
      FASTODE_UNROLL for (int k = 2; k < 6; ++k) column(at + k * pixel, c[k]);
      FASTODE_UNROLL for (int r = 0; r < 4; ++r) {
        V one[4], two[4];
        spread(c[0][r], c[1][r], c[2][r], c[3][r], one);
        spread(c[2][r], c[3][r], c[4][r], c[5][r], two);
        FASTODE_UNROLL for (int k = 0; k < 4; ++k) store_pairs(to(4 * r + k, pair), (__m512)one[k], (__m512)two[k]);
      }
      FASTODE_UNROLL for (int r = 0; r < 4; ++r) c[0][r] = c[4][r], c[1][r] = c[5][r];
    }
  }
  template <class F>
  static void spread_cotangent_pairs(const View<bfloat16>& cotangent, int64_t b, const RowOfTiles& run, __m512 scale,
                                     const F& to) {
    using V = Vec<float>;
    const auto along = [](V first, V second, V(&q)[4]) {
      q[0] = first, q[1] = first + second, q[2] = first - second, q[3] = -second;
    };
    spread_cotangents_along<4>(cotangent, b, run, scale, along, to);
  }
};

struct HalvingGradient {
  static constexpr int kInputs = 25, kCotangents = 9;
  static constexpr Patches kPatches{Halving::kPatch, Halving::kStep, Halving::kBefore};

  template <class F>
  static void products(const F& f) {
    each_product({0, 1, 2, 3, 4}, {0, 0, 1, 2, 2}, {0, 3, 1, 3, 2}, 5, 3, 4, f);
  }
  template <class F>
  static void spread_input_pairs(const View<bfloat16>& in, int64_t b, const RowOfTiles& run, __m512 scale,
                                 const F& to) {
    using V = Vec<float>;
    const bfloat16* at = in.pixel_at(b, 4 * run.y - 1, 4 * run.x - 1);
    for (int64_t pair = 0; 2 * pair < run.count; ++pair, at += 8 * in.pixel) {
      const auto one_row = [&](int r, const auto& value) {
        V line[9];
        FASTODE_UNROLL for (int x = 0; x < 9; ++x) line[x] = value(at + x * in.pixel);
        V one[5], two[5];
        Halving::spread<V>({line[0], line[1], line[2], line[3], line[4]}, one);
        Halving::spread<V>({line[4], line[5], line[6], line[7], line[8]}, two);
        FASTODE_UNROLL for (int k = 0; k < 5; ++k) store_pairs(to(5 * r + k, pair), (__m512)one[k], (__m512)two[k]);
      };
      const auto scaled = [=, row = in.row](const bfloat16* x, int y) { return load_stored(x + y * row) * (V)scale; };
      one_row(0, [=](const bfloat16* x) { return scaled(x, 0) - scaled(x, 2); });
      for (int r = 1; r < 4; ++r) one_row(r, [=](const bfloat16* x) { return scaled(x, r); });
      one_row(4, [=](const bfloat16* x) { return scaled(x, 4) - scaled(x, 2); });
    }
  }
  template <class F>
  static void spread_cotangent_pairs(const View<bfloat16>& cotangent, int64_t b, const RowOfTiles& run, __m512 scale,
                                     const F& to) {
    using V = Vec<float>;
    const auto along = [](V first, V second, V(&q)[3]) { q[0] = first, q[1] = first + second, q[2] = second; };
    spread_cotangents_along<3>(cotangent, b, run, scale, along, to);
  }
};

}  // namespace
}  // namespace fastode::resident

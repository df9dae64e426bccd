// What Winograd's filtering has in common in float32 and in bfloat16: its tiles, and what is done before and behind the
// products. Included by winograd_impl.h and winograd_bf16_impl.h.
#pragma once

#include <algorithm>

#include "winograd.h"

namespace fastode::resident {

// Neighbouring tiles of one row: of which sample, the first one's row and column, how many, and the first one's place
// in the chunk.
struct RowOfTiles {
  int64_t sample, y, x, count, place;
};

// The tiles of all samples, at most `most` at a time.
template <int64_t most>
class Chunks {
 public:
  template <class A>
  Chunks(const Plane<A>& plane, int64_t samples)
      : rows_(plane.height / 2), columns_(plane.width / 2), left_(rows_ * columns_ * samples) {}

  // Whether there is another one.
  bool next() {
    count_ = tiles = 0;
    while (tiles < most && left_ > 0) {
      const int64_t length = std::min(columns_ - x_, most - tiles);
      runs_[count_++] = {sample_, y_, x_, length, tiles};
      tiles += length, left_ -= length, x_ += length;
      if (x_ == columns_) x_ = 0, ++y_;
      if (y_ == rows_) y_ = 0, ++sample_;
    }
    return tiles > 0;
  }

  template <class F>
  void each_run(const F& f) const {
    std::for_each(runs_, runs_ + count_, f);
  }

  int64_t tiles = 0;

 private:
  RowOfTiles runs_[most];
  int64_t count_ = 0;
  int64_t rows_, columns_, left_, sample_ = 0, y_ = 0, x_ = 0;
};

// B' d, A' m and G' s of a column.
template <class V>
inline void spread(V d0, V d1, V d2, V d3, V (&to)[4]) {
  to[0] = d0 - d2, to[1] = d1 + d2, to[2] = d2 - d1, to[3] = d1 - d3;
}
template <class V>
inline void gather(V m0, V m1, V m2, V m3, V (&to)[2]) {
  to[0] = (m0 + m1) + m2, to[1] = (m1 - m2) - m3;
}
template <class V>
inline void gather_kernel(V s0, V s1, V s2, V s3, V (&to)[3]) {
  const V half = (s1 + s2) * ScalarOf<V>(0.5);
  to[0] = s0 + half, to[1] = (s1 - s2) * ScalarOf<V>(0.5), to[2] = half + s3;
}

// Of stride 2, as filtering.h has it.
template <class V>
inline void gather_strided_kernel(V s0, V s1, V s2, V s3, V (&to)[3]) {
  to[0] = s0 + s1, to[1] = s3, to[2] = s1 + s2;
}

// G g G' of 3x3 vectors.
template <class V>
inline void spread_kernel(const V (&g)[3][3], V (&to)[4][4]) {
  const auto column = [](V g0, V g1, V g2, V(&u)[4]) {
    const V ends = g0 + g2;
    u[0] = g0, u[1] = (ends + g1) * ScalarOf<V>(0.5), u[2] = (ends - g1) * ScalarOf<V>(0.5), u[3] = g2;
  };
  V rows[3][4];
  FASTODE_UNROLL for (int x = 0; x < 3; ++x) column(g[0][x], g[1][x], g[2][x], rows[x]);
  FASTODE_UNROLL for (int y = 0; y < 4; ++y) column(rows[0][y], rows[1][y], rows[2][y], to[y]);
}

// Kernels that `spread_kernel` has spread.
template <class V>
inline void kernel_of(const V (&u)[4][4], V (&g)[3][3]) {
  FASTODE_UNROLL for (int y = 0; y < 3; ++y) {
    V row[4];
    FASTODE_UNROLL for (int x = 0; x < 4; ++x) row[x] = y == 1 ? u[1][x] - u[2][x] : u[y == 0 ? 0 : 3][x];
    g[y][0] = row[0], g[y][1] = row[1] - row[2], g[y][2] = row[3];
  }
}

// B' d B of the tiles of a run; put(product, tile, value) takes each of its vectors.
template <class T, class F>
inline void spread_inputs(const View<T>& in, int64_t b, const RowOfTiles& run, const F& put) {
  using V = Vec<Number<T>>;
  const T* at = in.pixel_at(b, 2 * run.y - 1, 2 * run.x - 1);
  const int64_t row = in.row, pixel = in.pixel;
  const auto column = [=](const T* from, V(&c)[4]) {
    spread(load_stored(from), load_stored(from + row), load_stored(from + 2 * row), load_stored(from + 3 * row), c);
  };
  const auto tile = [&](const V(&c0)[4], const V(&c1)[4], const V(&c2)[4], const V(&c3)[4], int64_t t) {
    FASTODE_UNROLL for (int r = 0; r < 4; ++r) {
      V v[4];
      spread(c0[r], c1[r], c2[r], c3[r], v);
      FASTODE_UNROLL for (int k = 0; k < 4; ++k) put(4 * r + k, t, v[k]);
    }
  };
  V c0[4], c1[4], c2[4], c3[4];  // two columns of a tile are the next one's first
  column(at, c0), column(at + pixel, c1);
  int64_t t = 0;
  for (; t + 2 <= run.count; t += 2, at += 4 * pixel) {
    column(at + 2 * pixel, c2), column(at + 3 * pixel, c3);
    tile(c0, c1, c2, c3, t);
    column(at + 4 * pixel, c0), column(at + 5 * pixel, c1);
    tile(c2, c3, c0, c1, t + 1);
  }
  if (t < run.count) {
    column(at + 2 * pixel, c2), column(at + 3 * pixel, c3);
    tile(c0, c1, c2, c3, t);
  }
}

// The outputs of one tile as direct sums, for one vector of outputs, from that at (y, x) on; kernel(input channel, g)
// gives their weights. Of stride 2 neighbouring outputs' inputs are `step` pixels apart.
template <class T, class F>
[[gnu::noinline]] void sum_directly(const View<T>& in, int64_t y, int64_t x, int64_t in_channels, const F& kernel,
                                    Vec<Number<T>> (&sums)[2][2], int64_t step = 1) {
  using A = Number<T>;
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<A>;
  for (auto& row : sums) row[0] = row[1] = V{};
  for (int64_t c = 0; c < in_channels; ++c) {
    V g[3][3];
    kernel(c, g);
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j)
        for (int k = 0; k < 9; ++k) {
          const T* at = in.pixel_at(c / lanes, step * (y + i) + k / 3 - 1, step * (x + j) + k % 3 - 1);
          sums[i][j] += to_accumulator<A>(at[c % lanes]) * g[k / 3][k % 3];
        }
  }
}

// A' m A of one tile; m(product) is one of its vectors.
template <class V, class S>
inline void gather_tile(const S& m, V (&sums)[2][2]) {
  V columns[4][2];
  FASTODE_UNROLL for (int k = 0; k < 4; ++k) gather(m(k), m(4 + k), m(8 + k), m(12 + k), columns[k]);
  FASTODE_UNROLL for (int i = 0; i < 2; ++i)
      gather(columns[0][i], columns[1][i], columns[2][i], columns[3][i], sums[i]);
}

// The outputs of the tiles of a run, `side` times `side` of each, combined: what gather(tile, sums) makes, times
// factor(tile). `direct(tile, sums)` makes what is not finite anew, because in the products one such input meets all
// outputs of its tile.
template <int side, class T, class S, class C, class F>
inline void gather_outputs(const RowOfTiles& run, const S& gather, const C& factor, const Number<T>* bias,
                           const ConvJob<T>& job, int64_t b, const F& direct) {
  using A = Number<T>;
  using V = Vec<A>;
  const View<T> out = job.out;
  const Combine<T>& combine = job.combine;
  const V offset = bias ? load<V>(bias) : V{};
  const A scale = combine.scale;
  const int terms = combine.count;
  T* to = out.pixel_at(b, side * run.y, side * run.x);
  for (int64_t t = 0; t < run.count; ++t, to += side * out.pixel) {
    V sums[side][side], all = {};
    gather(t, sums);
    const auto each = [&](const auto& f) {
      FASTODE_UNROLL for (int i = 0; i < side; ++i) {
        FASTODE_UNROLL for (int j = 0; j < side; ++j) f(sums[i][j], i, j);
      }
    };
    each([&](V& sum, int, int) { sum *= factor(t), all += sum; });
    if (!all_finite(all)) [[unlikely]] {
      V anew[side][side];  // `sums` stay in registers
      direct(t, anew);
      each([&](V& sum, int i, int j) { sum = anew[i][j]; });
    }
    each([&](V& sum, int, int) { sum = (sum + offset) * scale; });
    for (int n = 0; n < terms; ++n) {
      const View<T>& term = combine.term[n];
      const T* at = term.pixel_at(b, side * run.y, side * (run.x + t));
      const A coef = combine.coef[n];
      each([&](V& sum, int i, int j) { sum += coef * load_stored(at + i * term.row + j * term.pixel); });
    }
    each([&](V& sum, int i, int j) { store_stored(to + i * out.row + j * out.pixel, sum); });
  }
}

// Asks for a part of the memory that a run's outputs go to, before its product p of so many: written all together
// behind the last one, they would wait for their lines.
template <int vectors, int side = 2, class T>
inline void ask_for(const View<T>& out, int64_t b, const RowOfTiles& run, int p, int of = kProducts) {
  const int64_t first = side * run.count * p / of, last = side * run.count * (p + 1) / of;
  for (int64_t x = first; x < last; ++x)
    for (int o = 0; o < vectors; ++o)
      for (int y = 0; y < side; ++y) __builtin_prefetch(out.pixel_at(b + o, side * run.y + y, side * run.x + x), 1);
}

}  // namespace fastode::resident

// Products of bfloat16 matrices by AVX-512's dot products of pairs, as tile_products.h's: of the same operands, for
// CPUs without AMX. A tile's sums are in registers, as many of its rows at a time as fit there beside their factors.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "products.h"

namespace fastode::resident {
namespace {

constexpr int kGradientBlocks = 2;  // of output channels that add_chunks had best take together
constexpr bool kPairwise = true;    // whether its sums may begin and end at any pair of positions

inline bool tiles_permitted() { return true; }

struct TileScope {
  TileScope() {}  // not trivial, so that none is an unused variable
};

// N = 1 is bound by the loads of the left factors, which N = 2 uses twice, and three taps thrice.
template <int N>
inline constexpr int kRowsAtOnce = N == 1 ? 16 : 8;

// A pair of numbers in all lanes.
inline __m512bh pair_in_all(const char* from) {
  int32_t both;
  std::memcpy(&both, from, sizeof(both));
  return (__m512bh)_mm512_set1_epi32(both);
}

constexpr int64_t kMostRuns = 32;  // that are added at once

// What a sum adds: `pairs` pairs of numbers of the left factor's rows from `left` on, times those of the right one.
struct Run {
  const char* left;
  const bfloat16* right;
  int64_t pairs;
};

// Where sums are kept: R rows of N tiles.
struct Place {
  float* at;
  int64_t row, tile;  // elements from one to the next
};

// Where the right factor's numbers are: a tile, and a pair of its, to the next.
struct Right {
  int64_t tile, pair;
};

// total += R rows of the left factor, `row_bytes` apart, times N tiles of the right one.
template <int R, int N>
inline void add_run(const Run& run, int64_t from, int64_t row_bytes, Right right, __m512 (&total)[R][N]) {
  const char* rows = run.left + from;
  const bfloat16* weights = run.right;
  for (int64_t pair = run.pairs; pair > 0; --pair, rows += 4, weights += right.pair) {
    __m512bh factors[N];
    FASTODE_UNROLL for (int n = 0; n < N; ++n) factors[n] = (__m512bh)_mm512_loadu_si512(weights + n * right.tile);
    FASTODE_UNROLL for (int r = 0; r < R; ++r) {
      const __m512bh left = pair_in_all(rows + r * row_bytes);
      FASTODE_UNROLL for (int n = 0; n < N; ++n) total[r][n] = _mm512_dpbf16_ps(total[r][n], left, factors[n]);
    }
  }
}

// total[r] += the rows r, r + 1 and r + 2 of the left factor, each times its own right one, `tap` elements apart: a row
// is read once for the three sums that it is part of.
template <int R>
inline void add_three(const Run& run, int64_t row_bytes, int64_t tap, __m512 (&total)[R][1]) {
  const char* rows = run.left;
  const bfloat16* weights = run.right;
  for (int64_t pair = run.pairs; pair > 0; --pair, rows += 4, weights += kTileDepth) {
    __m512bh factors[3];
    FASTODE_UNROLL for (int t = 0; t < 3; ++t) factors[t] = (__m512bh)_mm512_loadu_si512(weights + t * tap);
    FASTODE_UNROLL for (int i = 0; i < R + 2; ++i) {
      const __m512bh left = pair_in_all(rows + i * row_bytes);
      FASTODE_UNROLL for (int t = 0; t < 3; ++t) if (i >= t && i - t < R) total[i - t][0] =
          _mm512_dpbf16_ps(total[i - t][0], left, factors[t]);
    }
  }
}

template <int R, int N>
inline void put_sums_at(const __m512 (&total)[R][N], Place sums) {
  FASTODE_UNROLL for (int r = 0; r < R; ++r) for (int n = 0; n < N; ++n)
      _mm512_storeu_ps(sums.at + r * sums.row + n * sums.tile, total[r][n]);
}

// sums = or += the products of all runs, whose first row is `from` bytes behind their begin. A function of its own:
// among what calls it there would not be registers enough.
template <int R, int N>
[[gnu::noinline]] void add_products(const Run* runs, int64_t count, int64_t from, int64_t row_bytes, Right right,
                                    Place sums, bool fresh) {
  __m512 total[R][N];
  FASTODE_UNROLL for (int r = 0; r < R; ++r) for (int n = 0; n < N; ++n) total[r][n] =
      fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums.at + r * sums.row + n * sums.tile);
  for (const Run* end = runs + count; runs < end; ++runs) add_run<R, N>(*runs, from, row_bytes, right, total);
  put_sums_at(total, sums);
}

// Collects runs, and calls add(runs, how many, whether they are the first) where there are as many as it keeps, and at
// its end.
template <class F>
class Runs {
 public:
  explicit Runs(const F& add) : add_(add) {}
  ~Runs() {
    if (count_ > 0 || first_) add_(runs_, count_, first_);
  }
  Runs(const Runs&) = delete;
  Runs& operator=(const Runs&) = delete;

  void push(const char* left, const bfloat16* right, int64_t pairs) {
    if (count_ == kMostRuns) add_(runs_, count_, first_), count_ = 0, first_ = false;
    runs_[count_++] = {left, right, pairs};
  }

 private:
  const F& add_;
  int64_t count_ = 0;
  bool first_ = true;
  Run runs_[kMostRuns];
};

// Of one tile of the right factor, whose runs are short: they are added as they come.
template <int M, class Walk, class F>
inline void multiply_one(const Walk& walk, const bfloat16* const* in, int64_t position_bytes, float* sums,
                         const F& beside) {
  constexpr int R = kRowsAtOnce<1>;
  for (int m = 0; m < M; ++m)
    for (int first = 0; first < kTileRows; first += R) {
      beside(m * kTileRows + first + R);
      const char* rows = reinterpret_cast<const char*>(in[m]) + first * position_bytes;
      __m512 total[R][1];
      FASTODE_UNROLL for (auto& row : total) row[0] = _mm512_setzero_ps();
      walk(
          TileRows{m, first, R},
          [&](const bfloat16* weights, int64_t offset, int64_t pairs) {
            add_run<R, 1>({rows + 2 * offset, weights, pairs}, 0, position_bytes, {kTileDepth, kTileDepth}, total);
          },
          [&](const bfloat16* weights, int64_t tap, int64_t offset, int64_t pairs) {
            add_three<R>({rows + 2 * offset, weights, pairs}, position_bytes, tap, total);
          });
      put_sums_at(total, {sums + m * kSumElements + first * kTileRows, kTileRows, kSumElements});
    }
}

template <int M, int N, class Walk, class F>
inline void multiply_steps(int64_t count, bool alike, const Walk& walk, const bfloat16* const* in,
                           int64_t position_bytes, float* sums, const F& beside) {
  constexpr int R = kRowsAtOnce<N>;
  int64_t left = count;  // calls of beside()
  // Between the sums; `rows` of all will be done after the next one.
  const auto between = [&](int rows) {
    for (const int64_t last = count - divide_up(count * rows, M * kTileRows); left > std::max<int64_t>(last, 0); --left)
      beside();
  };
  if constexpr (N == 1) return multiply_one<M>(walk, in, position_bytes, sums, between);
  const char* const base = reinterpret_cast<const char*>(in[0]);
  const auto add = [&](int m, int first, const Run* runs, int64_t many, bool fresh) {
    between(m * kTileRows + first + R);
    const int64_t from = reinterpret_cast<const char*>(in[m]) - base + first * position_bytes;
    add_products<R, N>(runs, many, from, position_bytes, {kTileDepth, N * kTileDepth},
                       {sums + m * N * kSumElements + first * kTileRows, kTileRows, kSumElements}, fresh);
  };
  const auto collect = [&](const TileRows& rows, auto&& put) {
    Runs runs(put);
    walk(
        rows,
        [&](const bfloat16* weights, int64_t offset, int64_t pairs) { runs.push(base + 2 * offset, weights, pairs); },
        [](const bfloat16*, int64_t, int64_t, int64_t) {});  // of one tile only
  };
  if (alike)
    return collect(TileRows{}, [&](const Run* runs, int64_t many, bool fresh) {
      for (int m = 0; m < M; ++m)
        for (int first = 0; first < kTileRows; first += R) add(m, first, runs, many, fresh);
    });
  for (int m = 0; m < M; ++m)
    for (int first = 0; first < kTileRows; first += R)
      collect(TileRows{m, first, R},
              [&](const Run* runs, int64_t many, bool fresh) { add(m, first, runs, many, fresh); });
}

// Calls f(a constant: how many, the first one) for rows of channels, `most` at a time, or all at once where they are
// those of an image.
template <int most, class F>
inline void in_steps(int64_t rows, const F& f) {
  constexpr int few = 4;
  if (rows <= few) return f(std::integral_constant<int, few>{}, 0);
  for (int64_t first = 0; first < rows; first += most) f(std::integral_constant<int, most>{}, first);
}

template <int M, int N, class Walk>
inline void add_chunks(const Walk& walk, int64_t rows, const int64_t* offset, int64_t in_bytes, int64_t block,
                       float* const* gradient, int64_t gradient_bytes, int64_t out_stride) {
  const int64_t row = gradient_bytes / 4;
  for (int m = 0; m < M; ++m) {
    const auto add = [&](const Run* runs, int64_t count, bool) {
      in_steps<kRowsAtOnce<N>>(rows, [&](auto many, int64_t first) {
        add_products<many(), N>(runs, count, first * in_bytes, in_bytes, {block, kTileDepth},
                                {gradient[m] + first * row, row, out_stride}, false);
      });
    };
    Runs runs(add);
    walk(m, [&](const bfloat16* in, const bfloat16* cotangent, int64_t pairs) {
      runs.push(reinterpret_cast<const char*>(in + offset[m]), cotangent, pairs);
    });
  }
}

struct RunOfThree {
  const char* left;
  const bfloat16* right[3];
  int64_t pairs;
};

// sums += R rows of the left factor times the three right ones of each run.
template <int R>
[[gnu::noinline]] void add_three_taps_of(const RunOfThree* runs, int64_t count, int64_t from, int64_t row_bytes,
                                         float* sums, int64_t sum_row) {
  __m512 total[R][3];
  FASTODE_UNROLL for (int r = 0; r < R; ++r) for (int t = 0; t < 3; ++t) total[r][t] =
      _mm512_loadu_ps(sums + r * sum_row + t * kLanes<float>);
  for (const RunOfThree* end = runs + count; runs < end; ++runs) {
    const char* rows = runs->left + from;
    const bfloat16 *one = runs->right[0], *two = runs->right[1], *three = runs->right[2];
    for (int64_t pair = 0; pair < runs->pairs; ++pair, rows += 4) {
      const int64_t at = pair * kTileDepth;
      const __m512bh factors[3] = {(__m512bh)_mm512_loadu_si512(one + at), (__m512bh)_mm512_loadu_si512(two + at),
                                   (__m512bh)_mm512_loadu_si512(three + at)};
      FASTODE_UNROLL for (int r = 0; r < R; ++r) {
        const __m512bh left = pair_in_all(rows + r * row_bytes);
        FASTODE_UNROLL for (int t = 0; t < 3; ++t) total[r][t] = _mm512_dpbf16_ps(total[r][t], left, factors[t]);
      }
    }
  }
  FASTODE_UNROLL for (int r = 0; r < R; ++r) for (int t = 0; t < 3; ++t)
      _mm512_storeu_ps(sums + r * sum_row + t * kLanes<float>, total[r][t]);
}

// As add_chunks, of three taps at a time: each row of the input times the three cotangents that it meets. `walk` calls
// what it is given with the input and these.
template <class Walk>
inline void add_three_chunks(const Walk& walk, int64_t rows, int64_t in_bytes, float* gradient,
                             int64_t gradient_bytes) {
  RunOfThree runs[kMostRuns];
  int64_t count = 0;
  const auto add = [&] {
    in_steps<8>(rows, [&](auto many, int64_t first) {
      add_three_taps_of<many()>(runs, count, first * in_bytes, in_bytes, gradient + first * gradient_bytes / 4,
                                gradient_bytes / 4);
    });
    count = 0;
  };
  walk([&](const bfloat16* in, const bfloat16* const(&cotangents)[3], int64_t pairs) {
    if (count == kMostRuns) add();
    runs[count++] = {reinterpret_cast<const char*>(in), {cotangents[0], cotangents[1], cotangents[2]}, pairs};
  });
  if (count > 0) add();
}

}  // namespace
}  // namespace fastode::resident

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

// total += R rows of the left factor, pairs of numbers, times N tiles of the right one, `tile` elements apart.
template <int R, int N>
inline void add_products(const char* rows, int64_t row_bytes, const bfloat16* right, int64_t tile, int64_t pairs,
                         __m512 (&total)[R][N]) {
  for (int64_t pair = 0; pair < pairs; ++pair, rows += 4, right += kTileDepth) {
    __m512bh factors[N];
    FASTODE_UNROLL for (int n = 0; n < N; ++n) factors[n] = (__m512bh)_mm512_loadu_si512(right + n * tile);
    FASTODE_UNROLL for (int r = 0; r < R; ++r) {
      const __m512bh left = pair_in_all(rows + r * row_bytes);
      FASTODE_UNROLL for (int n = 0; n < N; ++n) total[r][n] = _mm512_dpbf16_ps(total[r][n], left, factors[n]);
    }
  }
}

// total[r] += the rows r, r + 1 and r + 2 of the left factor, each times its own right one: a row is read once for the
// three sums that it is part of.
template <int R>
inline void add_three(const char* rows, int64_t row_bytes, const bfloat16* const (&right)[3], int64_t pairs,
                      __m512 (&total)[R][1]) {
  for (int64_t pair = 0; pair < pairs; ++pair, rows += 4) {
    __m512bh factors[3];
    FASTODE_UNROLL for (int t = 0; t < 3; ++t) factors[t] = (__m512bh)_mm512_loadu_si512(right[t] + pair * kTileDepth);
    FASTODE_UNROLL for (int i = 0; i < R + 2; ++i) {
      const __m512bh left = pair_in_all(rows + i * row_bytes);
      FASTODE_UNROLL for (int t = 0; t < 3; ++t) if (i >= t && i - t < R) total[i - t][0] =
          _mm512_dpbf16_ps(total[i - t][0], left, factors[t]);
    }
  }
}

template <int M, int N, class Walk, class F>
inline void multiply_steps(int64_t count, const Walk& walk, const bfloat16* const* in, int64_t position_bytes,
                           float* sums, const F& beside) {
  constexpr int R = kRowsAtOnce<N>;
  int64_t left = count;  // calls of beside()
  for (int m = 0; m < M; ++m)
    for (int first = 0; first < kTileRows; first += R) {
      // Between the sums, which a call among them would drive out of the registers.
      for (const int64_t last = left - divide_up(count * R, M * kTileRows); left > std::max<int64_t>(last, 0); --left)
        beside();
      const char* rows = reinterpret_cast<const char*>(in[m]) + first * position_bytes;
      __m512 total[R][N];
      FASTODE_UNROLL for (auto& row : total) for (__m512& each : row) each = _mm512_setzero_ps();
      walk(
          TileRows{m, first, R},
          [&](const bfloat16* weights, int64_t offset, int64_t pairs) {
            add_products<R, N>(rows + 2 * offset, position_bytes, weights, kTileElements, pairs, total);
          },
          [&](const bfloat16* const(&weights)[3], int64_t offset, int64_t pairs) {
            if constexpr (N == 1) add_three<R>(rows + 2 * offset, position_bytes, weights, pairs, total);
          });
      FASTODE_UNROLL for (int r = 0; r < R; ++r) for (int n = 0; n < N; ++n)
          _mm512_storeu_ps(sums + (m * N + n) * kSumElements + (first + r) * kTileRows, total[r][n]);
    }
}

template <int M, int N, class Walk>
inline void add_chunks(const Walk& walk, const int64_t* offset, int64_t in_bytes, int64_t block, float* const* gradient,
                       int64_t gradient_bytes, int64_t out_stride) {
  constexpr int R = kRowsAtOnce<N>;
  for (int m = 0; m < M; ++m)
    for (int first = 0; first < kTileRows; first += R) {
      const auto at = [&](int r, int n) { return gradient[m] + n * out_stride + (first + r) * gradient_bytes / 4; };
      const int64_t shift = 2 * offset[m] + first * in_bytes;
      __m512 total[R][N];
      FASTODE_UNROLL for (int r = 0; r < R; ++r) for (int n = 0; n < N; ++n) total[r][n] = _mm512_loadu_ps(at(r, n));
      walk(m, [&](const bfloat16* in, const bfloat16* cotangent, int64_t pairs) {
        add_products<R, N>(reinterpret_cast<const char*>(in) + shift, in_bytes, cotangent, block, pairs, total);
      });
      FASTODE_UNROLL for (int r = 0; r < R; ++r) for (int n = 0; n < N; ++n) _mm512_storeu_ps(at(r, n), total[r][n]);
    }
}

// As add_chunks, of three taps at a time: 16 rows of the input, each times the three cotangents that it meets. `walk`
// calls what it is given with the input and these.
template <class Walk>
inline void add_three_chunks(const Walk& walk, int64_t in_bytes, float* gradient, int64_t gradient_bytes) {
  constexpr int R = 8;
  for (int first = 0; first < kTileRows; first += R) {
    const auto at = [&](int r, int t) { return gradient + (first + r) * gradient_bytes / 4 + t * kLanes<float>; };
    __m512 total[R][3];
    FASTODE_UNROLL for (int r = 0; r < R; ++r) for (int t = 0; t < 3; ++t) total[r][t] = _mm512_loadu_ps(at(r, t));
    walk([&](const bfloat16* in, const bfloat16* const(&cotangents)[3], int64_t pairs) {
      const char* rows = reinterpret_cast<const char*>(in) + first * in_bytes;
      for (int64_t pair = 0; pair < pairs; ++pair, rows += 4) {
        __m512bh factors[3];
        FASTODE_UNROLL for (int t = 0; t < 3; ++t) factors[t] =
            (__m512bh)_mm512_loadu_si512(cotangents[t] + pair * kTileDepth);
        FASTODE_UNROLL for (int r = 0; r < R; ++r) {
          const __m512bh left = pair_in_all(rows + r * in_bytes);
          FASTODE_UNROLL for (int t = 0; t < 3; ++t) total[r][t] = _mm512_dpbf16_ps(total[r][t], left, factors[t]);
        }
      }
    });
    FASTODE_UNROLL for (int r = 0; r < R; ++r) for (int t = 0; t < 3; ++t) _mm512_storeu_ps(at(r, t), total[r][t]);
  }
}

}  // namespace
}  // namespace fastode::resident

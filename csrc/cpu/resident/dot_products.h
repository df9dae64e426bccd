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

inline bool tiles_permitted() { return true; }

struct TileScope {
  TileScope() {}  // not trivial, so that none is an unused variable
};

// N = 1 is bound by the loads of the left factors, which N = 2 uses twice.
template <int N>
inline constexpr int kRowsAtOnce = N == 1 ? 16 : 8;

// total += R rows of the left factor, pairs of numbers, times N tiles of the right one, `tile` elements apart.
template <int R, int N>
inline void add_products(const char* rows, int64_t row_bytes, const bfloat16* right, int64_t tile, int64_t pairs,
                         __m512 (&total)[R][N]) {
  for (int64_t pair = 0; pair < pairs; ++pair, rows += 4, right += kTileDepth) {
    __m512bh factors[N];
    FASTODE_UNROLL for (int n = 0; n < N; ++n) factors[n] = (__m512bh)_mm512_loadu_si512(right + n * tile);
    FASTODE_UNROLL for (int r = 0; r < R; ++r) {
      int32_t both;
      std::memcpy(&both, rows + r * row_bytes, sizeof(both));
      const __m512bh left = (__m512bh)_mm512_set1_epi32(both);
      FASTODE_UNROLL for (int n = 0; n < N; ++n) total[r][n] = _mm512_dpbf16_ps(total[r][n], left, factors[n]);
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
      walk([&](const bfloat16* weights, int64_t offset, int64_t pairs) {
        add_products<R, N>(rows + 2 * offset, position_bytes, weights, kTileElements, pairs, total);
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
      walk([&](const bfloat16* in, const bfloat16* cotangent) {
        add_products<R, N>(reinterpret_cast<const char*>(in) + shift, in_bytes, cotangent, block, kTileRows, total);
      });
      FASTODE_UNROLL for (int r = 0; r < R; ++r) for (int n = 0; n < N; ++n) _mm512_storeu_ps(at(r, n), total[r][n]);
    }
}

}  // namespace
}  // namespace fastode::resident

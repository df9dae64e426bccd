// Products of bfloat16 matrices on AMX tiles; dot_products.h has the same by other means.
#pragma once

#include "products.h"
#include "tiles.h"

namespace fastode::resident {
namespace {

constexpr int kGradientBlocks = 1;  // of output channels that add_chunks had best take together
constexpr bool kPairwise = false;   // whether its sums may begin and end at any pair of positions

template <int N>
inline constexpr int kRowsAtOnce = 0;  // all rows of all tiles

template <int count>
inline void zero_sums() {
  tile_zero<0>();
  if constexpr (count > 1) tile_zero<1>();
  if constexpr (count > 2) tile_zero<2>();
  if constexpr (count > 3) tile_zero<3>();
}

template <int count>
inline void store_sums(float* sums) {
  tile_store<0>(sums, 64);
  if constexpr (count > 1) tile_store<1>(sums + kSumElements, 64);
  if constexpr (count > 2) tile_store<2>(sums + 2 * kSumElements, 64);
  if constexpr (count > 3) tile_store<3>(sums + 3 * kSumElements, 64);
}

// sums += the products of M tiles of 16 positions, `offset` behind in[m], with N tiles of weights.
template <int M, int N>
inline void multiply_step(const bfloat16* weights, const bfloat16* const* in, int64_t offset, int64_t position_bytes) {
  static_assert(M * N <= 4 && N <= 2);
  constexpr int b = 4;
  tile_load<b>(weights, 64);
  if constexpr (N == 2) tile_load<b + 1>(weights + kTileElements, 64);
  tile_load<6>(in[0] + offset, position_bytes);
  tile_multiply<0, 6, b>();
  if constexpr (N == 2) tile_multiply<1, 6, b + 1>();
  if constexpr (M > 1) {
    tile_load<7>(in[1] + offset, position_bytes);
    tile_multiply<N, 7, b>();
    if constexpr (N == 2) tile_multiply<N + 1, 7, b + 1>();
  }
  if constexpr (M > 2) {
    tile_load<5>(in[2] + offset, position_bytes);
    tile_multiply<2, 5, b>();
  }
  if constexpr (M > 3) {
    tile_load<6>(in[3] + offset, position_bytes);
    tile_multiply<3, 6, b>();
  }
}

// sums [M][N] tiles: of M times 16 positions, from in[m], and N times 16 output channels. `walk` calls what it is given
// with the weights of every step that these rows need, the offset of its inputs and how many of its pairs may be other
// than zero; `alike`: all rows need the same ones. beside() is called once for each of the `count` steps, for what the
// core can do while the tiles multiply.
template <int M, int N, class Walk, class F>
inline void multiply_steps(int64_t count, bool alike, const Walk& walk, const bfloat16* const* in,
                           int64_t position_bytes, float* sums, const F& beside) {
  (void)count, (void)alike;
  zero_sums<M * N>();
  walk(
      TileRows{},
      [&](const bfloat16* weights, int64_t offset, int64_t) {
        multiply_step<M, N>(weights, in, offset, position_bytes);
        beside();
      },
      nullptr);
  store_sums<M * N>(sums);
}

// gradient[m], N tiles `out_stride` apart with rows of `gradient_bytes`, += `rows` rows of the input at offset[m], or
// 16 of which the others are zero, times N tiles of the cotangent, `block` apart. `walk` calls what it is given with
// the input and the cotangent of every chunk of the sum, which is of 16 pairs; where these tiles are one after the
// other, with fewer for the m-th of them.
template <int M, int N, class Walk>
inline void add_chunks(const Walk& walk, int64_t rows, const int64_t* offset, int64_t in_bytes, int64_t block,
                       float* const* gradient, int64_t gradient_bytes, int64_t out_stride) {
  static_assert((N == 2 && M <= 2) || (N == 1 && M <= 3));
  constexpr int b = 4;
  (void)rows;
  tile_load<0>(gradient[0], gradient_bytes);
  if constexpr (N == 2) tile_load<1>(gradient[0] + out_stride, gradient_bytes);
  if constexpr (M > 1) tile_load<N>(gradient[1], gradient_bytes);
  if constexpr (M > 1 && N == 2) tile_load<N + 1>(gradient[1] + out_stride, gradient_bytes);
  if constexpr (M > 2) tile_load<2>(gradient[2], gradient_bytes);
  walk(0, [&](const bfloat16* in, const bfloat16* cotangent, int64_t) {
    tile_load<b>(cotangent, 64);
    if constexpr (N == 2) tile_load<b + 1>(cotangent + block, 64);
    tile_load<6>(in + offset[0], in_bytes);
    tile_multiply<0, 6, b>();
    if constexpr (N == 2) tile_multiply<1, 6, b + 1>();
    if constexpr (M > 1) {
      tile_load<7>(in + offset[1], in_bytes);
      tile_multiply<N, 7, b>();
      if constexpr (N == 2) tile_multiply<N + 1, 7, b + 1>();
    }
    if constexpr (M > 2) {
      tile_load<5>(in + offset[2], in_bytes);
      tile_multiply<2, 5, b>();
    }
  });
  tile_store<0>(gradient[0], gradient_bytes);
  if constexpr (N == 2) tile_store<1>(gradient[0] + out_stride, gradient_bytes);
  if constexpr (M > 1) tile_store<N>(gradient[1], gradient_bytes);
  if constexpr (M > 1 && N == 2) tile_store<N + 1>(gradient[1] + out_stride, gradient_bytes);
  if constexpr (M > 2) tile_store<2>(gradient[2], gradient_bytes);
}

}  // namespace
}  // namespace fastode::resident

// Pairs of bfloat16 numbers, as the products of dot_products.h and tile_products.h take them: made, and transposed in
// registers. Included by pack_bf16_impl.h.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "../simd.h"

namespace fastode::resident {
namespace {

typedef int16_t Half __attribute__((vector_size(32)));
typedef int16_t Numbers __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(64)));  // pairs of numbers, one per lane

// What the masks have of 16 numbers at `first`, rounded, and of 16 at `second`; the rest is zero.
inline Numbers load_both(__mmask16 mask, const float* first, __mmask16 other, const float* second) {
  return (Numbers)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(other, second), _mm512_maskz_loadu_ps(mask, first));
}
inline Numbers load_both(__mmask16 mask, const bfloat16* first, __mmask16 other, const bfloat16* second) {
  const Half low = (Half)_mm256_maskz_loadu_epi16(mask, first), high = (Half)_mm256_maskz_loadu_epi16(other, second);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
                                 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
}

// The first 16 numbers, each with one of the second 16.
inline Words paired(Numbers both) {
  const Numbers pairs = __builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8,
                                                24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return reinterpret_cast<Words>(pairs);
}

// 16 channels of two neighbouring positions as 16 pairs.
inline Words pair_of(const bfloat16* low, const bfloat16* high) {
  Half a, b;
  std::memcpy(&a, low, sizeof(a));
  std::memcpy(&b, high, sizeof(b));
  const Numbers pairs = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9,
                                                25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return reinterpret_cast<Words>(pairs);
}

// Transposes 16 x 16 words in four rounds of shuffles.
inline void transpose(Words* r) {
  Words t[16];
  FASTODE_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  const auto low = [](Words a, Words b) {
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  };
  const auto high = [](Words a, Words b) {
    return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  };
  FASTODE_UNROLL for (int i = 0; i < 16; i += 4) {
    r[i] = low(t[i], t[i + 2]);
    r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]);
    r[i + 3] = high(t[i + 1], t[i + 3]);
  }
  const auto even = [](Words a, Words b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  };
  const auto odd = [](Words a, Words b) {
    return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  };
  FASTODE_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = even(r[i], r[i + 4]);
    t[i + 4] = odd(r[i], r[i + 4]);
    t[i + 8] = even(r[i + 8], r[i + 12]);
    t[i + 12] = odd(r[i + 8], r[i + 12]);
  }
  FASTODE_UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = even(t[i], t[i + 8]);
    r[i + 8] = odd(t[i], t[i + 8]);
    r[i + 4] = even(t[i + 4], t[i + 12]);
    r[i + 12] = odd(t[i + 4], t[i + 12]);
  }
}

}  // namespace
}  // namespace fastode::resident

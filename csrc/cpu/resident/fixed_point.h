// Numbers as 16-bit integers, a scale to each tile or each channel, and sums of their products as 32-bit integers: as
// fast as products of bfloat16 and thirty times as exact where the numbers are of like size. Included by
// winograd_bf16_impl.h.
#pragma once

#include <immintrin.h>

#include <cstring>
#include <limits>

#include "pairs.h"

namespace fastode::resident {
namespace {

// Of sums over kSummed numbers, none of which can overflow: kSummed * 4 kMostInput * kMostWeight < 2^31. Numbers that
// B' d B or A y A' makes are at most four times as large as those it is made of.
constexpr int64_t kSummed = 64;
constexpr float kMostInput = 2047, kMostWeight = 4095;

// Magnitudes of bfloat16 numbers as integers: the least that is scaled, that of which four may not add up to a finite
// number, and that of infinity.
constexpr int kOne = 0x3f80;  // the bits of 1
constexpr int kLeast = 0x0800, kLarge = 0x7e80, kInfinite = 0x7f80;

inline __m512i magnitudes(const bfloat16* at) {
  return _mm512_and_si512(_mm512_loadu_si512(at), _mm512_set1_epi16(0x7fff));
}
inline __m256i half_magnitudes(const bfloat16* at) {
  return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)), _mm256_set1_epi16(0x7fff));
}

// The largest of 32.
inline int largest(__m512i numbers) {
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(numbers), _mm512_extracti64x4_epi64(numbers, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i turned = _mm_xor_si128(quarter, _mm_set1_epi16(-1));
  return ~_mm_extract_epi16(_mm_minpos_epu16(turned), 0) & 0xffff;
}

// A factor that brings numbers to integers, and the one that brings them back.
struct Scale {
  float to, back;

  // Of numbers whose largest magnitude is this; NaN back where they are too large or too small.
  explicit Scale(int largest) {
    float value;
    const uint32_t bits = static_cast<uint32_t>(largest) << 16;
    std::memcpy(&value, &bits, sizeof(value));
    const bool fits = largest >= kLeast && largest < kLarge;
    to = fits ? kMostInput / value : 0;
    back = fits || largest == 0 ? value / kMostInput : std::numeric_limits<float>::quiet_NaN();
  }
};

// The same of sixteen channels. What is too small counts as zero.
struct Scales {
  __m512 to, back;

  Scales(__m256i largest, float most) {
    const __m512i bits = _mm512_cvtepu16_epi32(largest);
    const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), one = _mm512_set1_ps(most);
    const __mmask16 finite = _mm512_cmplt_epi32_mask(bits, _mm512_set1_epi32(kInfinite));
    const __mmask16 fits = finite & _mm512_cmpge_epi32_mask(bits, _mm512_set1_epi32(kLeast));
    to = _mm512_maskz_div_ps(fits, one, value);
    back = _mm512_mask_blend_ps(finite, _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()),
                                _mm512_maskz_div_ps(fits, value, one));
  }
};

inline __m512i rounded(__m512 numbers) { return _mm512_cvtps_epi32(numbers); }

// Sixteen numbers in 16 bits each.
inline void store_rounded(int16_t* to, __m512 numbers) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded(numbers)));
}
// Sixteen pairs.
inline void store_pairs(int16_t* to, __m512 first, __m512 second) {
  constexpr __mmask32 upper = 0xaaaaaaaa;
  _mm512_storeu_si512(to, _mm512_mask_blend_epi16(upper, rounded(first), _mm512_slli_epi32(rounded(second), 16)));
}

inline __m512i pair_in_all(const int16_t* from) {
  int32_t both;
  std::memcpy(&both, from, sizeof(both));
  return _mm512_set1_epi32(both);
}

// total += the products of pairs. GCC 12 copies every sum at the intrinsic function, and keeps some in memory.
inline void add_products_of(__m512i& total, __m512i left, __m512i right) {
  asm("vpdpwssd %2, %1, %0" : "+v"(total) : "v"(left), "v"(right));
}

// totals += R pairs, `row` numbers apart, times N vectors of pairs.
template <int R, int N>
inline void add_pair(const int16_t* left, int64_t row, const int16_t* right, __m512i (&totals)[R][N]) {
  __m512i factors[N];
  FASTODE_UNROLL for (int n = 0; n < N; ++n) factors[n] = _mm512_loadu_si512(right + n * 32);
  FASTODE_UNROLL for (int r = 0; r < R; ++r) {
    const __m512i one = pair_in_all(left + r * row);
    FASTODE_UNROLL for (int n = 0; n < N; ++n) add_products_of(totals[r][n], one, factors[n]);
  }
}

template <int R, int N>
inline void clear(__m512i (&totals)[R][N]) {
  FASTODE_UNROLL for (auto& row : totals) for (auto& total : row) total = _mm512_setzero_si512();
}

}  // namespace
}  // namespace fastode::resident

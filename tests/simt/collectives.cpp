#include "collectives.h"

#include <algorithm>

namespace fastode::device::simt {

namespace {

using Row = float __attribute__((vector_size(32)));  // the eight columns of C

// How a word of a fragment is read: `per_word` numbers, which lie `stride` apart in the matrix.
struct Bf16 {
  static constexpr int per_word = 2;
  static void put(uint32_t word, float* at, int stride) {
    const Pair two = unpack_bf16(word);
    at[0] = two.low, at[stride] = two.high;
  }
};

struct F16 {
  static constexpr int per_word = 2;
  static void put(uint32_t word, float* at, int stride) {
    const Pair two = unpack_f16(word);
    at[0] = two.low, at[stride] = two.high;
  }
};

// A card reads 19 bits of a tf32 operand.
struct Tf32 {
  static constexpr int per_word = 1;
  static void put(uint32_t word, float* at, int) { *at = from_bits(word & ~0x1fffu); }
};

const Mma& mma_of(void* const* operands, int lane) { return *static_cast<const Mma*>(operands[lane]); }

// Lane 4 g + t holds of A the words t and t + 4 of rows g and g + 8, of B those of column g, of C the columns 2 t and
// 2 t + 1 of rows g and g + 8.
template <class T>
void mma(void* const* operands) {
  constexpr int k = 8 * T::per_word;
  float a[16][k], b[k][8], product[16][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      T::put(mma_of(operands, lane).a[i], &a[lane / 4 + i % 2 * 8][T::per_word * (lane % 4 + i / 2 * 4)], 1);
  for (int tile = 0; tile < mma_of(operands, 0).tiles; ++tile) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 2; ++i)
        T::put(mma_of(operands, lane).b[2 * tile + i], &b[T::per_word * (lane % 4 + 4 * i)][lane / 4], 8);
    Row rows[k];
    std::memcpy(rows, b, sizeof(b));
    for (int i = 0; i < 16; ++i) {
      Row sum{};
      for (int j = 0; j < k; ++j) sum += a[i][j] * rows[j];
      std::memcpy(product[i], &sum, sizeof(Row));
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* c = mma_of(operands, lane).c + 4 * tile;
      for (int i = 0; i < 4; ++i) c[i] += product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  }
}

const char* row_of(void* const* operands, int matrix, int row) {
  return static_cast<const Ldmatrix*>(operands[8 * matrix + row])->row;
}

template <bool transposed>
void ldmatrix(void* const* operands) {
  for (int lane = 0; lane < 32; ++lane) {
    const Ldmatrix& own = *static_cast<const Ldmatrix*>(operands[lane]);
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < own.matrices; ++i) {
      if constexpr (transposed) {
        uint16_t two[2];
        for (int j = 0; j < 2; ++j) std::memcpy(&two[j], row_of(operands, i, 2 * in_group + j) + 2 * group, 2);
        own.r[i] = two[0] | static_cast<uint32_t>(two[1]) << 16;
      } else {
        std::memcpy(&own.r[i], row_of(operands, i, group) + 4 * in_group, 4);
      }
    }
  }
}

void shuffle(void* const* operands) {
  for (int lane = 0; lane < 32; ++lane) {
    Shuffle& own = *static_cast<Shuffle*>(operands[lane]);
    own.result = static_cast<const Shuffle*>(operands[(lane ^ own.mask) & 31])->value;
  }
}

}  // namespace

void exchange(Kind kind, void* const* operands) {
  if (kind == kShuffle) return shuffle(operands);
  if (kind == kMmaBf16) return mma<Bf16>(operands);
  if (kind == kMmaF16) return mma<F16>(operands);
  if (kind == kMmaTf32) return mma<Tf32>(operands);
  if (kind == kLdmatrix) return ldmatrix<false>(operands);
  if (kind == kLdmatrixTransposed) return ldmatrix<true>(operands);
}

int tiles(Kind kind, void* const* operands) {
  return kind == kMmaBf16 || kind == kMmaF16 || kind == kMmaTf32 ? mma_of(operands, 0).tiles : 1;
}

int conflicts(Kind kind, void* const* operands) {
  if (kind != kLdmatrix && kind != kLdmatrixTransposed) return 0;
  int extra = 0;
  for (int i = 0; i < static_cast<const Ldmatrix*>(operands[0])->matrices; ++i) {
    int most = 1, rows[8] = {};
    for (int row = 0; row < 8; ++row) {
      const auto address = [&](int j) { return static_cast<const Ldmatrix*>(operands[8 * i + j])->address; };
      bool seen = false;  // rows that are the same one are read once
      for (int before = 0; before < row; ++before) seen |= address(before) == address(row);
      if (!seen) most = std::max(most, ++rows[address(row) / 16 % 8]);
    }
    extra += most - 1;
  }
  return extra;
}

}  // namespace fastode::device::simt

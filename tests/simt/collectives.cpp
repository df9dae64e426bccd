#include "collectives.h"

namespace fastode::device::simt {

namespace {

using Row = float __attribute__((vector_size(32)));  // the eight columns of C

struct Bf16 {
  static constexpr int k = 16;
  static Pair read(uint32_t word) { return unpack_bf16(word); }
};

struct F16 {
  static constexpr int k = 16;
  static Pair read(uint32_t word) { return unpack_f16(word); }
};

// The matrix unit reads 19 bits of a tf32 operand.
float read_tf32(uint32_t word) { return from_bits(word & ~0x1fffu); }

void gather(float (&a)[16][16], float (&b)[16][8], void* const* operands, auto type) {
  using T = decltype(type);
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& own = *static_cast<const Mma*>(operands[lane]);
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const Pair two = T::read(own.a[i]);
      float* at = &a[group + i % 2 * 8][2 * in_group + i / 2 * 8];
      at[0] = two.low, at[1] = two.high;
    }
    for (int i = 0; i < 2; ++i) {
      const Pair two = T::read(own.b[i]);
      b[2 * in_group + 8 * i][group] = two.low, b[2 * in_group + 8 * i + 1][group] = two.high;
    }
  }
}

void gather_tf32(float (&a)[16][16], float (&b)[16][8], void* const* operands) {
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& own = *static_cast<const Mma*>(operands[lane]);
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][in_group + i / 2 * 4] = read_tf32(own.a[i]);
    for (int i = 0; i < 2; ++i) b[in_group + 4 * i][group] = read_tf32(own.b[i]);
  }
}

template <int k>
void multiply(const float (&a)[16][16], const float (&b)[16][8], void* const* operands) {
  alignas(32) float product[16][8];
  Row columns[k];
  for (int j = 0; j < k; ++j) std::memcpy(&columns[j], b[j], sizeof(Row));
  for (int i = 0; i < 16; ++i) {
    Row sum{};
    for (int j = 0; j < k; ++j) sum += a[i][j] * columns[j];
    std::memcpy(product[i], &sum, sizeof(Row));
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& own = *static_cast<const Mma*>(operands[lane]);
    for (int i = 0; i < 4; ++i) own.c[i] += product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

template <class T>
void mma(void* const* operands) {
  float a[16][16], b[16][8];
  gather(a, b, operands, T{});
  multiply<T::k>(a, b, operands);
}

void mma_tf32(void* const* operands) {
  float a[16][16], b[16][8];
  gather_tf32(a, b, operands);
  multiply<8>(a, b, operands);
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
  if (kind == kMmaTf32) return mma_tf32(operands);
  if (kind == kLdmatrix) return ldmatrix<false>(operands);
  if (kind == kLdmatrixTransposed) return ldmatrix<true>(operands);
}

}  // namespace fastode::device::simt

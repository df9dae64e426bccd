// csrc/cuda/device.cuh under g++: every thread of a block is a fiber, and what threads do together is a meeting of
// them.
//
// Included by device.cuh. What a meeting checks is stricter than a card: all threads must come to it from one place in
// the source, and what a lane reads for ldmatrix it reads when it arrives. Not seen here: conflicts of banks but for
// ldmatrix's, registers and how many blocks a card has room for, what the compiler makes of a loop that waits for
// another thread, reads past a tensor (simulator.fenced, or the sanitizer, shows them), and how nvcc rounds: it
// contracts other products and sums to FMA than g++ does.
#pragma once

#include <cmath>
#include <cstring>
#include <source_location>
#include <type_traits>
#include <vector>

#include "control.h"
#include "device.cuh"

namespace fastode::device {
namespace simt {

using Site = std::source_location;

// What threads meet for; kinds from kWarpBarrier on are a warp's.
enum Kind {
  kBlockBarrier,
  kClusterBarrier,
  kGridBarrier,
  kWarpBarrier,
  kShuffle,
  kMmaBf16,
  kMmaF16,
  kMmaTf32,
  kLdmatrix,
  kLdmatrixTransposed,
  kKinds
};

// 16 bytes on their way to shared memory.
struct Copy {
  void* to;
  const void* from;
};

// What a thread knows of itself.
struct Thread {
  int thread, threads, block, blocks, rank;
  char* shared;
  std::vector<Copy> copies = {};
};

extern Thread* running;

struct Shuffle {
  float value, result;
  int mask;
};

// `tiles` products that share A: c [tiles, 4], a [4], b [tiles, 2].
struct Mma {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
  int tiles;
};

struct Ldmatrix {
  uint32_t* r;
  int matrices;
  size_t address;  // of the row, from the beginning of shared memory
  alignas(16) char row[16];
};

// Returns once all threads of the kind's scope are there and the operands of a warp's lanes are exchanged.
void meet(Kind kind, void* operands, const Site& site);
void meet_grid(const Site& site);
// Ends the launch with an error if a row of a matrix does not lie, aligned, in the block's own shared memory.
void check_row(const void* row, const Site& site);
// The same for a word of global memory: a card reads none from between two.
void check_word(const void* at, const Site& site);
// The same for 16 bytes of global memory and their place in shared memory.
void check_copy(const void* to, const void* from, const Site& site);
char* peer(char* own, int rank, const Site& site);
void gap(char* begin, size_t bytes, const Site& site);

using Program = void (*)(const void* arguments);
const char* launch(const Launch& how, int most_threads, Program program, const void* arguments);

inline void mma(Kind kind, float* c, const uint32_t* a, const uint32_t* b, int tiles, const Site& site) {
  Mma operands{c, a, b, tiles};
  meet(kind, &operands, site);
}

inline void ldmatrix(Kind kind, uint32_t* r, int matrices, const void* row, const Site& site) {
  Ldmatrix operands{r, matrices, 0, {}};
  if (running->thread % 32 < 8 * matrices) {
    check_row(row, site);
    operands.address = static_cast<const char*>(row) - running->shared;
    std::memcpy(operands.row, row, 16);  // here, so that a sanitizer names the kernel's line
  }
  meet(kind, &operands, site);
}

inline uint32_t bits(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  return word;
}

inline float from_bits(uint32_t word) {
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

inline uint32_t bits_bf16(float x) {
  const uint32_t word = bits(x);
  return x != x ? word >> 16 | 0x40 : (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

inline uint32_t bits_f16(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t word;
  std::memcpy(&word, &half, 2);
  return word;
}

inline float from_bits_f16(uint32_t word) {
  const uint16_t low = static_cast<uint16_t>(word);
  _Float16 half;
  std::memcpy(&half, &low, 2);
  return half;
}

}  // namespace simt

// ---- identity

FASTODE_DEVICE int thread() { return simt::running->thread; }
FASTODE_DEVICE int threads() { return simt::running->threads; }
FASTODE_DEVICE int block() { return simt::running->block; }
FASTODE_DEVICE int blocks() { return simt::running->blocks; }
FASTODE_DEVICE int lane() { return thread() % 32; }
FASTODE_DEVICE int anew(int value) { return value; }
FASTODE_DEVICE int cluster_rank() { return simt::running->rank; }
FASTODE_DEVICE char* shared_memory() { return simt::running->shared; }

// ---- barriers and clusters

FASTODE_DEVICE void block_barrier(simt::Site site = simt::Site::current()) {
  simt::meet(simt::kBlockBarrier, nullptr, site);
}

FASTODE_DEVICE void warp_barrier(simt::Site site = simt::Site::current()) {
  simt::meet(simt::kWarpBarrier, nullptr, site);
}

FASTODE_DEVICE void cluster_barrier(simt::Site site = simt::Site::current()) {
  simt::meet(simt::kClusterBarrier, nullptr, site);
}

FASTODE_DEVICE void grid_barrier(simt::Site site = simt::Site::current()) { simt::meet_grid(site); }

template <class T>
FASTODE_DEVICE T* peer(T* own, int rank, simt::Site site = simt::Site::current()) {
  return reinterpret_cast<T*>(
      simt::peer(reinterpret_cast<char*>(const_cast<std::remove_const_t<T>*>(own)), rank, site));
}

FASTODE_DEVICE void gap(void* begin, size_t bytes, simt::Site site = simt::Site::current()) {
  simt::gap(static_cast<char*>(begin), bytes, site);
}

// ---- warps

FASTODE_DEVICE float shuffle_xor(float value, int mask, simt::Site site = simt::Site::current()) {
  simt::Shuffle operands{value, value, mask};
  simt::meet(simt::kShuffle, &operands, site);
  return operands.result;
}

FASTODE_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             simt::Site site = simt::Site::current()) {
  simt::mma(simt::kMmaBf16, c, a, b, 1, site);
}

template <int tiles>
FASTODE_DEVICE void mma_row_bf16(float (&c)[tiles][4], const uint32_t (&a)[4], const uint32_t (&b)[tiles][2],
                                 simt::Site site = simt::Site::current()) {
  simt::mma(simt::kMmaBf16, c[0], a, b[0], tiles, site);
}

FASTODE_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            simt::Site site = simt::Site::current()) {
  simt::mma(simt::kMmaF16, c, a, b, 1, site);
}

template <int tiles>
FASTODE_DEVICE void mma_row_f16(float (&c)[tiles][4], const uint32_t (&a)[4], const uint32_t (&b)[tiles][2],
                                simt::Site site = simt::Site::current()) {
  simt::mma(simt::kMmaF16, c[0], a, b[0], tiles, site);
}

FASTODE_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             simt::Site site = simt::Site::current()) {
  simt::mma(simt::kMmaTf32, c, a, b, 1, site);
}

template <int tiles>
FASTODE_DEVICE void mma_row_tf32(float (&c)[tiles][4], const uint32_t (&a)[4], const uint32_t (&b)[tiles][2],
                                 simt::Site site = simt::Site::current()) {
  simt::mma(simt::kMmaTf32, c[0], a, b[0], tiles, site);
}

FASTODE_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row, simt::Site site = simt::Site::current()) {
  simt::ldmatrix(simt::kLdmatrix, r, 4, row, site);
}

FASTODE_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row, simt::Site site = simt::Site::current()) {
  simt::ldmatrix(simt::kLdmatrix, r, 2, row, site);
}

FASTODE_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, simt::Site site = simt::Site::current()) {
  simt::ldmatrix(simt::kLdmatrixTransposed, r, 4, row, site);
}

FASTODE_DEVICE void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* row, simt::Site site = simt::Site::current()) {
  simt::ldmatrix(simt::kLdmatrixTransposed, r, 2, row, site);
}

// ---- numbers

// Rounds to the nearest, ties away from zero, as cvt.rna does.
FASTODE_DEVICE uint32_t to_tf32(float x) {
  const uint32_t word = simt::bits(x);
  if (x != x) return 0x7fffe000u;
  return std::isinf(x) ? word : (word + 0x1000u) & ~0x1fffu;
}

FASTODE_DEVICE uint32_t pack_bf16(float low, float high) { return simt::bits_bf16(low) | simt::bits_bf16(high) << 16; }

FASTODE_DEVICE Pair unpack_bf16(uint32_t word) {
  return {simt::from_bits(word << 16), simt::from_bits(word & 0xffff0000u)};
}

FASTODE_DEVICE uint32_t pack_f16(float low, float high) { return simt::bits_f16(low) | simt::bits_f16(high) << 16; }

FASTODE_DEVICE Pair unpack_f16(uint32_t word) { return {simt::from_bits_f16(word), simt::from_bits_f16(word >> 16)}; }

FASTODE_DEVICE uint32_t load_word(const uint16_t* at, simt::Site site = simt::Site::current()) {
  simt::check_word(at, site);
  uint32_t word;
  std::memcpy(&word, at, 4);
  return word;
}

// Nothing but NaN is there before the thread has waited.
FASTODE_DEVICE void copy_later(void* to, const void* from, simt::Site site = simt::Site::current()) {
  simt::check_copy(to, from, site);
  std::memset(to, 0xff, 16);
  simt::running->copies.push_back({to, from});
}

FASTODE_DEVICE void await_copies() {
  for (const simt::Copy& copy : simt::running->copies) std::memcpy(copy.to, copy.from, 16);
  simt::running->copies.clear();
}

FASTODE_DEVICE float exp(float x) { return std::exp(x); }
FASTODE_DEVICE float log1p(float x) { return std::log1p(x); }
FASTODE_DEVICE float expm1(float x) { return std::expm1(x); }
FASTODE_DEVICE float tanh(float x) { return std::tanh(x); }
FASTODE_DEVICE float erf(float x) { return std::erf(x); }
FASTODE_DEVICE float rsqrt(float x) { return 1.0f / std::sqrt(x); }

// ---- launching

struct CurrentDevice {
  explicit CurrentDevice(int) {}
};

// As of a card on which every program has as many blocks at a time as its number says.
template <class Program, class Arguments>
int most_blocks(const Launch& how) {
  return simt::can_be_asked() ? how.device : 0;
}

template <class Program, class Arguments>
const char* launch(const Launch& how, const Arguments& arguments) {
  static_assert(std::is_trivially_copyable_v<Arguments>, "a kernel's arguments are copied to the card as bytes");
  static_assert(sizeof(Arguments) <= 4096, "a kernel's arguments have at most 4096 bytes");
  const simt::Program run = [](const void* given) { Program::run(*static_cast<const Arguments*>(given)); };
  return simt::launch(how, Program::threads, run, &arguments);
}

}  // namespace fastode::device

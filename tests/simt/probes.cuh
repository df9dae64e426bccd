// Small kernels that say whether the test machine does what a card does, and that it sees bugs: `numbers[0]` plants
// one.
#pragma once

#include "grid.cuh"

namespace fastode::device::probes {

struct Arguments {
  void* tensors[6];
  int64_t numbers[6];

  template <class T>
  FASTODE_DEVICE T* tensor(int i) const {
    return static_cast<T*>(tensors[i]);
  }
  FASTODE_DEVICE bool bug() const { return numbers[0] != 0; }
};

// The kernel of a probe, in which `threads` is still the function.
template <class Probe>
struct Kernel {
  static constexpr int threads = 1024;
  static FASTODE_DEVICE void run(const Arguments& arguments) { Probe::run(arguments); }
};

FASTODE_DEVICE int grid_thread() { return block() * threads() + thread(); }

// out [blocks, threads, 6]
struct Identity {
  static FASTODE_DEVICE void run(const Arguments& arguments) {
    int* out = arguments.tensor<int>(0) + grid_thread() * 6;
    out[0] = block(), out[1] = thread(), out[2] = lane(), out[3] = blocks(), out[4] = threads(),
    out[5] = cluster_rank();
  }
};

// The number of a thread's turn: out [blocks, threads]; tensors[1] counts.
struct Turns {
  static FASTODE_DEVICE void run(const Arguments& arguments) {
    arguments.tensor<int>(0)[grid_thread()] = (*arguments.tensor<int>(1))++;
  }
};

// What shared memory holds before it is written: out [words]
struct Unset {
  static FASTODE_DEVICE void run(const Arguments& arguments) {
    float* own = reinterpret_cast<float*>(shared_memory());
    for (int i = thread(); i < arguments.numbers[0]; i += threads()) {
      arguments.tensor<float>(0)[i] = own[i];
      own[i] = 1;
    }
  }
};

// ---- fragments: A [16, K] and two B [K, 8] row by row, to two C [16, 8] is added; the planted bug swaps B's lanes

struct Bf16 {
  using Stored = uint16_t;
  static constexpr int per_word = 2;
  static FASTODE_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(c, a, b); }
  static FASTODE_DEVICE void row(float (&c)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[2][2]) {
    mma_row_bf16(c, a, b);
  }
};

struct F16 : Bf16 {
  static FASTODE_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16(c, a, b); }
  static FASTODE_DEVICE void row(float (&c)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[2][2]) {
    mma_row_f16(c, a, b);
  }
};

struct Tf32 {
  using Stored = float;
  static constexpr int per_word = 1;
  static FASTODE_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_tf32(c, a, b); }
  static FASTODE_DEVICE void row(float (&c)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[2][2]) {
    mma_row_tf32(c, a, b);
  }
};

// The numbers of a word of a fragment, which lie `stride` apart; floats are rounded to tf32 if `rounds`.
FASTODE_DEVICE uint32_t word_of(const uint16_t* first, int stride, bool) {
  return first[0] | static_cast<uint32_t>(first[stride]) << 16;
}

FASTODE_DEVICE uint32_t word_of(const float* first, int, bool rounds) {
  return rounds ? to_tf32(*first) : simt::bits(*first);
}

// numbers: bug, whether tf32 is rounded, whether both products are one row
template <class T>
struct Mma {
  static FASTODE_DEVICE void run(const Arguments& arguments) {
    constexpr int k = 8 * T::per_word;
    const auto* a_rows = arguments.tensor<typename T::Stored>(0);
    const auto* b_rows = arguments.tensor<typename T::Stored>(1);
    float* c_rows = arguments.tensor<float>(2);
    const int group = lane() / 4, in_group = lane() % 4;
    const bool rounds = arguments.numbers[1] != 0;
    const int column = arguments.bug() ? lane() % 8 : group, row = arguments.bug() ? lane() / 8 : in_group;
    uint32_t a[4], b[2][2];
    for (int i = 0; i < 4; ++i)
      a[i] = word_of(a_rows + (group + i % 2 * 8) * k + T::per_word * (in_group + i / 2 * 4), 1, rounds);
    float c[2][4];
    const auto place = [&](int tile, int i) { return (tile * 16 + group + i / 2 * 8) * 8 + 2 * in_group + i % 2; };
    for (int tile = 0; tile < 2; ++tile) {
      for (int i = 0; i < 2; ++i)
        b[tile][i] = word_of(b_rows + (tile * k + T::per_word * (row + 4 * i)) * 8 + column, 8, rounds);
      for (int i = 0; i < 4; ++i) c[tile][i] = c_rows[place(tile, i)];
    }
    if (arguments.numbers[2]) {
      T::row(c, a, b);
    } else {
      T::mma(c[0], a, b[0]);
      T::mma(c[1], a, b[1]);
    }
    for (int tile = 0; tile < 2; ++tile)
      for (int i = 0; i < 4; ++i) c_rows[place(tile, i)] = c[tile][i];
  }
};

// C = A B through shared memory, as a convolution reads it: A [16, 16] by rows, B [16, 8] by rows, or its transpose.
struct Product {
  static FASTODE_DEVICE void run(const Arguments& arguments) {
    uint16_t* a_rows = reinterpret_cast<uint16_t*>(shared_memory());
    uint16_t* b_rows = a_rows + 256;
    const bool b_transposed = arguments.numbers[1] != 0;
    for (int i = thread(); i < 256; i += threads()) a_rows[i] = arguments.tensor<uint16_t>(0)[i];
    for (int i = thread(); i < 128; i += threads()) b_rows[i] = arguments.tensor<uint16_t>(1)[i];
    if (!arguments.bug()) block_barrier();
    uint32_t a[4], b[2];
    ldmatrix_x4(a, a_rows + (lane() % 16) * 16 + lane() / 16 * 8);
    if (b_transposed)
      ldmatrix_x2(b, b_rows + lane() % 8 * 16 + lane() / 8 % 2 * 8);
    else
      ldmatrix_x2_transposed(b, b_rows + lane() % 16 * 8);
    float c[4] = {};
    mma_bf16(c, a, b);
    for (int i = 0; i < 4; ++i)
      arguments.tensor<float>(2)[(lane() / 4 + i / 2 * 8) * 8 + lane() % 4 * 2 + i % 2] = c[i];
  }
};

// Matrices [4, 8, 8] of 16-bit words, as they lie: out [32, 4] words. numbers: bug, matrices, transposed
struct Ldmatrix {
  static FASTODE_DEVICE void run(const Arguments& arguments) {
    uint16_t* rows = reinterpret_cast<uint16_t*>(shared_memory());
    for (int i = thread(); i < 256; i += threads()) rows[i] = arguments.tensor<uint16_t>(0)[i];
    block_barrier();
    const uint16_t* row = rows + 8 * lane();
    if (arguments.numbers[0] == 1) row += 4;                       // not aligned
    if (arguments.numbers[0] == 2) row += 256;                     // not in shared memory
    if (arguments.numbers[0] == 3 && lane() >= 16) row = nullptr;  // which two matrices do not read
    uint32_t four[4] = {}, two[2] = {};
    if (arguments.numbers[1] == 4)
      arguments.numbers[2] ? ldmatrix_x4_transposed(four, row) : ldmatrix_x4(four, row);
    else
      arguments.numbers[2] ? ldmatrix_x2_transposed(two, row) : ldmatrix_x2(two, row);
    for (int i = 0; i < 4; ++i)
      arguments.tensor<uint32_t>(1)[lane() * 4 + i] = arguments.numbers[1] == 4 ? four[i] : i < 2 ? two[i] : 0;
  }
};

// in, out [blocks, threads]; numbers[1]: the mask
struct Shuffle {
  static FASTODE_DEVICE void run(const Arguments& arguments) {
    const float got = shuffle_xor(arguments.tensor<float>(0)[grid_thread()], static_cast<int>(arguments.numbers[1]));
    arguments.tensor<float>(1)[grid_thread()] = got;
  }
};

// in [n] → to_tf32, packed and unpacked bf16 and f16, exp, log1p, tanh, rsqrt: out [8, n]
struct Numbers {
  static FASTODE_DEVICE void run(const Arguments& arguments) {
    const int64_t count = arguments.numbers[1];
    for (int64_t i = thread(); i < count; i += threads()) {
      const float x = arguments.tensor<float>(0)[i];
      const float results[] = {simt::from_bits(to_tf32(x)),
                               unpack_bf16(pack_bf16(x, 0)).low,
                               unpack_bf16(pack_bf16(0, x)).high,
                               unpack_f16(pack_f16(x, 0)).low,
                               unpack_f16(pack_f16(0, x)).high,
                               exp(x),
                               log1p(x),
                               tanh(x),
                               rsqrt(x)};
      for (int j = 0; j < 9; ++j) arguments.tensor<float>(1)[j * count + i] = results[j];
    }
  }
};

// ---- barriers: out[i] = 2 · in[threads - 1 - i], and then what the next thread makes of it

// numbers[0]: 1, the first barrier is missing; 2, the second, and a thread writes what another one has yet to read
struct Reversal {
  static FASTODE_DEVICE void run(const Arguments& arguments) {
    float* own = reinterpret_cast<float*>(shared_memory());
    own[thread()] = arguments.tensor<float>(0)[grid_thread()];
    if (arguments.numbers[0] != 1) block_barrier();
    const float value = 2 * own[threads() - 1 - thread()];
    if (arguments.numbers[0] != 2) block_barrier();
    own[thread()] = value;
    block_barrier();
    arguments.tensor<float>(1)[grid_thread()] = value + own[(thread() + 1) % threads()];
  }
};

// Each thread adds what the threads at its place in all blocks of the cluster hold. numbers[0]: 1, the first barrier is
// missing; 2, the last, so that a block leaves while others read; 3, a rank that does not exist; 4, a
// write to rank 0 that may have left
struct Cluster {
  static FASTODE_DEVICE void run(const Arguments& arguments) {
    float* own = reinterpret_cast<float*>(shared_memory()) + thread();
    const int64_t bug = arguments.numbers[0], ranks = arguments.numbers[1];
    *own = arguments.tensor<float>(0)[grid_thread()];
    float* const first = peer(own, 0);
    if (bug != 1) cluster_barrier();
    if (bug == 4) {
      *first = 1;
      return;
    }
    float sum = 0;
    for (int rank = 0; rank < ranks + (bug == 3); ++rank) sum += *peer(own, rank);
    if (bug != 2) cluster_barrier();
    arguments.tensor<float>(1)[grid_thread()] = sum;
  }
};

// numbers: bug (1: a barrier is missing), rounds. In each round a thread takes what its place in the next block holds
// in memory.
struct Grid {
  static FASTODE_DEVICE void run(const Arguments& arguments) {
    float* map = arguments.tensor<float>(0);
    const int mine = grid_thread(), next = (block() + 1) % blocks() * threads() + thread();
    for (int64_t round = 0; round < arguments.numbers[1]; ++round) {
      const float value = map[next] + 1;
      if (!arguments.bug()) grid_barrier();
      map[mine] = value;
      grid_barrier();
    }
  }
};

// ---- memory: a row [threads] between two halo cells, then four bytes of gap and a second row

// numbers[0]: 1, reads past the halo; 2, writes past it; 3, writes beyond the shared memory asked for; 4, before it;
// 5, reads past the tensor
struct Halo {
  static FASTODE_DEVICE void run(const Arguments& arguments) {
    float* row = reinterpret_cast<float*>(shared_memory());
    const int64_t bug = arguments.numbers[0];
    const int width = threads();
    gap(row + width + 2, 24);
    if (thread() == 0) row[0] = row[width + 1] = 0;
    row[1 + thread()] = arguments.tensor<float>(0)[thread()];
    block_barrier();
    const int shift = bug == 1 ? 2 : 1;
    float sum = row[thread()] + row[thread() + 1] + row[thread() + 1 + shift];
    if (bug == 2 && thread() == 0) row[width + 3] = 1;
    if (bug == 3 && thread() == 0) row[width + 8] = 1;
    if (bug == 4 && thread() == 0) row[-1] = 1;
    if (bug == 5) sum += arguments.tensor<float>(0)[thread() + 1];
    arguments.tensor<float>(1)[thread()] = sum;
  }
};

// Four floats for each thread by way of shared memory, read by the next one. numbers[0]: 1, nobody waits for them;
// 2, no barrier behind the wait; 3, from between two places; 4, beyond the shared memory asked for
struct Later {
  static FASTODE_DEVICE void run(const Arguments& arguments) {
    float* row = reinterpret_cast<float*>(shared_memory());
    const int64_t bug = arguments.numbers[0];
    const float* from = arguments.tensor<float>(0) + 4 * thread();
    copy_later(row + 4 * thread() + (bug == 4 ? 4 : 0), from + (bug == 3 ? 1 : 0));
    if (bug != 1) await_copies();
    if (bug != 2) block_barrier();
    const int next = (thread() + 1) % threads();
    for (int i = 0; i < 4; ++i) arguments.tensor<float>(1)[4 * thread() + i] = row[4 * next + i];
  }
};

// ---- threads that do not meet

struct Divergent {
  static FASTODE_DEVICE void run(const Arguments& arguments) {
    const int64_t bug = arguments.numbers[0];
    if (bug == 1 && thread() == 40) return;
    if (bug == 2) {
      if (thread() < 32)
        block_barrier();
      else
        block_barrier();
    }
    if (bug == 3 && thread() >= 32) block_barrier();
    if (bug == 4 && lane() < 16) shuffle_xor(0, 1);
    if (bug == 5) {
      if (lane() < 16)
        shuffle_xor(0, 1);
      else
        warp_barrier();
    }
    if (bug == 6) grid_barrier();
    block_barrier();
  }
};

FASTODE_DEVICE int deep(int64_t levels) {
  volatile char frame[512] = {};
  warp_barrier();
  return levels == 0 ? frame[0] : deep(levels - 1) + frame[1];
}

struct Deep {
  static FASTODE_DEVICE void run(const Arguments& arguments) { deep(arguments.numbers[0]); }
};

// numbers[1] products of zeros, numbers[2] of them in a row: 1, 2 or 4
struct Many {
  template <int tiles>
  static FASTODE_DEVICE float products(int64_t rows) {
    uint32_t a[4] = {}, b[tiles][2] = {};
    float c[tiles][4] = {};
    for (int64_t i = 0; i < rows; ++i) mma_row_bf16(c, a, b);
    return c[tiles - 1][3];
  }

  static FASTODE_DEVICE void run(const Arguments& arguments) {
    const int64_t count = arguments.numbers[1], tiles = arguments.numbers[2];
    arguments.tensor<float>(0)[grid_thread()] = tiles == 1   ? products<1>(count)
                                                : tiles == 2 ? products<2>(count / 2)
                                                             : products<4>(count / 4);
  }
};

}  // namespace fastode::device::probes

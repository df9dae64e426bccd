// What a kernel is written against: the names below mean PTX under nvcc, and threads run by the CPU under g++
// (tests/simt), so that the same source is proven without a card.
//
//   identity     thread, threads, block, blocks, lane, shared_memory; blocks and grids have one dimension
//   registers    anew(number): the number; what is reckoned from it waits in no register until it is needed again
//   barriers     block_barrier, warp_barrier, cluster_barrier; grid.cuh has that of a grid
//   clusters     cluster_rank, peer(own, rank): the same place in the shared memory of another block of the cluster
//   warps        shuffle_xor(value, mask); every lane of the warp takes part in what a warp does
//   fragments    mma_bf16, mma_f16 (m16n8k16), mma_tf32 (m16n8k8), ldmatrix_x2, _x4, and both _transposed, as PTX lays
//                them out; ldmatrix takes from lane l the address of row l % 8 of matrix l / 8, in the block's own
//                memory
//                mma_row_bf16, _f16, _tf32: products of one A with several B, one meeting of the test machine's threads
//   numbers      to_tf32, pack_bf16, unpack_bf16, pack_f16, unpack_f16; exp, expm1, log1p, tanh, erf, rsqrt
//   memory       load_word(at): two 16-bit numbers, which lie where a word can
//                copy_later(to, from): 16 bytes to shared memory, on their way until the thread calls await_copies()
//   gap          gap(begin, bytes): nobody may touch these bytes of shared memory; nothing on a card
//
// A kernel is a type with `static FASTODE_DEVICE void run(const Arguments&)` and the most threads of a block,
// `static constexpr int threads`; launch<Program>(how, arguments) gives null, or what went wrong in one line.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define FASTODE_DEVICE __device__ __forceinline__
#define FASTODE_DEVICE_CALL static __device__ __noinline__
#define FASTODE_DEVICE_HOST __device__ __host__ __forceinline__
#define FASTODE_UNROLLED _Pragma("unroll")
#define FASTODE_UNROLLED_8 _Pragma("unroll 8")
#define FASTODE_ROLLED _Pragma("unroll 1")
#else
#define FASTODE_DEVICE inline
#define FASTODE_DEVICE_CALL inline
#define FASTODE_DEVICE_HOST inline
#define FASTODE_UNROLLED
#define FASTODE_UNROLLED_8
#define FASTODE_ROLLED
#endif

namespace fastode::device {

// The two numbers of a word, `low` in its lower half.
struct Pair {
  float low, high;
};

// Bytes of shared memory that a block can have, from sm_90 on.
inline constexpr size_t kMostShared = 227 * 1024;

struct Launch {
  int blocks;
  int threads;
  size_t shared_bytes;
  int cluster = 1;
  bool cooperative = false;
  void* stream = nullptr;
  int device = 0;
};

}  // namespace fastode::device

#ifdef __CUDACC__
#include "device_nvcc.cuh"
#else
#include "simt.h"
#endif

// device.cuh for nvcc.
#pragma once

#include "device.cuh"

#include <cuda_runtime.h>

namespace fastode::device {

FASTODE_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
FASTODE_DEVICE int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
FASTODE_DEVICE int threads() { return static_cast<int>(blockDim.x); }
FASTODE_DEVICE int block() { return static_cast<int>(blockIdx.x); }
FASTODE_DEVICE int blocks() { return static_cast<int>(gridDim.x); }
FASTODE_DEVICE int lane() { return static_cast<int>(threadIdx.x % 32); }

FASTODE_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Memory that no thread may touch; only the simulator looks.
FASTODE_DEVICE void gap(void*, size_t) {}

FASTODE_DEVICE uint32_t load_word(const uint16_t* at) { return *reinterpret_cast<const uint32_t*>(at); }

FASTODE_DEVICE void block_barrier() { __syncthreads(); }

FASTODE_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

FASTODE_DEVICE uint32_t shared_address(const void* place) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

FASTODE_DEVICE void copy_later(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

FASTODE_DEVICE void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

FASTODE_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

FASTODE_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Products of one A with several B.
template <int tiles>
FASTODE_DEVICE void mma_row_bf16(float (&c)[tiles][4], const uint32_t (&a)[4], const uint32_t (&b)[tiles][2]) {
  FASTODE_UNROLLED
  for (int i = 0; i < tiles; ++i) mma_bf16(c[i], a, b[i]);
}

template <int tiles>
FASTODE_DEVICE void mma_row_f16(float (&c)[tiles][4], const uint32_t (&a)[4], const uint32_t (&b)[tiles][2]) {
  FASTODE_UNROLLED
  for (int i = 0; i < tiles; ++i) mma_f16(c[i], a, b[i]);
}

FASTODE_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

FASTODE_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// In PTX, for CUDA's headers of these types take longer to read than a small program to compile.
FASTODE_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

FASTODE_DEVICE Pair unpack_bf16(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

FASTODE_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

FASTODE_DEVICE Pair unpack_f16(uint32_t word) {
  Pair both;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(both.low), "=f"(both.high)
      : "r"(word));
  return both;
}

FASTODE_DEVICE float exp(float x) { return ::expf(x); }
FASTODE_DEVICE float expm1(float x) { return ::expm1f(x); }
FASTODE_DEVICE float log1p(float x) { return ::log1pf(x); }
FASTODE_DEVICE float tanh(float x) { return ::tanhf(x); }
FASTODE_DEVICE float erf(float x) { return ::erff(x); }
FASTODE_DEVICE float rsqrt(float x) { return 1.0f / ::sqrtf(x); }

template <class Program, class Arguments>
__global__ void __launch_bounds__(Program::threads, 1) kernel(const __grid_constant__ Arguments arguments) {
  Program::run(arguments);
}

// Makes a card the current one, and the caller's again at its end.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) : wanted_(device), before_(device) {
    if (cudaGetDevice(&before_) == cudaSuccess && before_ != wanted_) cudaSetDevice(wanted_);
  }
  ~CurrentDevice() {
    if (before_ != wanted_) cudaSetDevice(before_);
  }

 private:
  int wanted_, before_;
};

// How many blocks of a program the current card runs at a time; 0 where it cannot be asked. It also allows the program
// all shared memory there is, without which it has 48 KB: what one thread allowed, another must not take back.
template <class Program, class Arguments>
int most_blocks(const Launch& how) {
  const void* entry = reinterpret_cast<const void*>(&kernel<Program, Arguments>);
  int each = 0, multiprocessors = 0, shared = 0;
  cudaError_t error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, how.device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, entry, how.threads, how.shared_bytes);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, how.device);
  return error == cudaSuccess ? each * multiprocessors : 0;
}

// Runs Program::run(arguments) on every thread, on the current card; null, or what the driver says.
template <class Program, class Arguments>
const char* launch(const Launch& how, const Arguments& arguments) {
  const cudaStream_t stream = static_cast<cudaStream_t>(how.stream);
  if (how.cooperative) {
    void* given[] = {const_cast<Arguments*>(&arguments)};
    cudaLaunchCooperativeKernel(&kernel<Program, Arguments>, how.blocks, how.threads, given, how.shared_bytes, stream);
  } else {
    kernel<Program, Arguments><<<how.blocks, how.threads, how.shared_bytes, stream>>>(arguments);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastode::device

// AMX tiles: a register file of eight 16 x 64 byte tiles, configured per thread. Wrapped here rather than taken from
// immintrin.h because gcc's intrinsics do not tell the compiler that they read and write memory.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace fastode::resident {

#ifdef FASTODE_EMULATED_TILES  // to test what is built on them where there are none: `make tiles`

inline bool tiles_permitted() { return true; }

typedef float TileRow __attribute__((vector_size(64)));
inline thread_local TileRow tile_file[8][16];

// As a real one, it leaves nothing behind.
struct TileScope {
  TileScope() { std::memset(tile_file, 0, sizeof(tile_file)); }
  ~TileScope() { std::memset(tile_file, 0xff, sizeof(tile_file)); }  // NaN
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

template <int tile>
inline void tile_zero() {
  std::memset(tile_file[tile], 0, sizeof(tile_file[tile]));
}

template <int tile>
inline void tile_load(const void* from, int64_t row_bytes) {
  for (int m = 0; m < 16; ++m)
    std::memcpy(&tile_file[tile][m], static_cast<const char*>(from) + m * row_bytes, sizeof(TileRow));
}

template <int tile>
inline void tile_store(void* to, int64_t row_bytes) {
  for (int m = 0; m < 16; ++m)
    std::memcpy(static_cast<char*>(to) + m * row_bytes, &tile_file[tile][m], sizeof(TileRow));
}

template <int sums, int a, int b>
inline void tile_multiply() {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k) {
      const __m512 pairs = _mm512_set1_ps(tile_file[a][m][k]);
      tile_file[sums][m] =
          (TileRow)_mm512_dpbf16_ps((__m512)tile_file[sums][m], (__m512bh)pairs, (__m512bh)(__m512)tile_file[b][k]);
    }
}

#else

// Linux grants a process the tile state on request, once.
inline bool tiles_permitted() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

// All eight tiles whole. oneDNN configures for itself, so nothing is restored but the initial state, which is what
// makes a thread cheap to switch.
class TileScope {
 public:
  TileScope() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~TileScope() { asm volatile("tilerelease" ::: "memory"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

template <int tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

template <int tile>
inline void tile_load(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(from), "r"(row_bytes) : "memory");
}

template <int tile>
inline void tile_store(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(to), "r"(row_bytes) : "memory");
}

// sums[m][n] += sum over k < 32 of a[m][k] b[k / 2][2 n + k % 2], in bfloat16 and float32.
template <int sums, int a, int b>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(b), "i"(a), "i"(sums));
}

#endif

}  // namespace fastode::resident

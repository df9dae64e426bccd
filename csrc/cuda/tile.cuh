// A sample's map in a block: fragments in registers, one copy with a border of zeros in shared memory, and 3×3
// convolutions between them on the tensor cores.
//
// A map of C channels and W × W pixels is cut into tiles of 16 pixels by 8 channels, the accumulators of one mma. A
// warp has kTiles × 2 of them: pixels of whole rows, and 16 channels. In shared memory a map is planes [C / 8][pixel][8
// channels], so that ldmatrix reads the 16 bytes of eight neighbouring pixels without a bank conflict.
#pragma once

#include "device.cuh"
#include "programs.h"

namespace fastode::device {

struct BFloat16 {
  static FASTODE_DEVICE uint32_t pack(float low, float high) { return pack_bf16(low, high); }
  static FASTODE_DEVICE uint32_t pack(Pair both) { return pack_bf16(both.low, both.high); }
  static FASTODE_DEVICE Pair unpack(uint32_t word) { return unpack_bf16(word); }
  static FASTODE_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(c, a, b); }
};

struct Float16 {
  static FASTODE_DEVICE uint32_t pack(float low, float high) { return pack_f16(low, high); }
  static FASTODE_DEVICE uint32_t pack(Pair both) { return pack_f16(both.low, both.high); }
  static FASTODE_DEVICE Pair unpack(uint32_t word) { return unpack_f16(word); }
  static FASTODE_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16(c, a, b); }
};

// One of a word's two numbers.
template <class T>
FASTODE_DEVICE float part(uint32_t word, int odd) {
  const Pair pair = T::unpack(word);
  return odd ? pair.high : pair.low;
}

struct alignas(16) Words {
  uint32_t word[4];
};

struct alignas(8) Half {
  uint32_t word[2];
};

// T: BFloat16 or Float16. C: channels. W: pixels of a side. Warps: of a block.
template <class T, int C, int W, int Warps>
struct Tile {
  using Type = T;
  static constexpr int kChannels = C, kSide = W, kThreads = 32 * Warps;
  static constexpr int kAcross = C / 16;             // warps beside each other in channels
  static constexpr int kDown = Warps / kAcross;      // and in pixels
  static constexpr int kTiles = W * W / 16 / kDown;  // of 16 pixels, of a warp
  static constexpr int kPixels = (W + 2) * (W + 2);
  static constexpr int kMapBytes = C / 8 * kPixels * 16;
  static constexpr int kWeightBytes = 9 * C * C * 2;
  static constexpr int kKeptBytes = cuda::kept_bytes({C, W});  // of a map in the order of threads
  static_assert(C % 16 == 0 && Warps % kAcross == 0 && kTiles >= 1 && kTiles * kDown * 16 == W * W);
  static constexpr int kHalves = W == 8 ? 1 : W / 16;               // tiles beside each other in a row
  static_assert((W == 8 || W % 16 == 0) && kTiles % kHalves == 0);  // a warp has whole rows

  // A map as it is stored, two channels to a word: [tile][eight channels][upper or lower eight pixels].
  struct State {
    uint32_t word[kTiles][2][2];
  };
  // A map as accumulators: of a tile's eight channels (pixel, channel), (pixel, channel + 1), and of the lower pixel.
  struct Sum {
    float value[kTiles][2][4];
  };

  static FASTODE_DEVICE int warp() { return thread() / 32; }
  static FASTODE_DEVICE int first_tile() { return warp() / kAcross * kTiles; }
  // Written as a place of the warp and a constant of the tile, so that addresses are one register and an immediate.
  static FASTODE_DEVICE int first_row() { return W == 8 ? 2 * first_tile() : first_tile() / kHalves; }
  static FASTODE_DEVICE int row(int tile, int half) {
    return first_row() + (W == 8 ? 2 * tile + half : tile / kHalves);
  }
  static FASTODE_DEVICE int column(int tile, int half) {
    return lane() / 4 + (W == 8 ? 0 : tile % kHalves * 16 + half * 8);
  }
  static FASTODE_DEVICE int first_channel() { return warp() % kAcross * 16; }
  // The first of the thread's two channels among eight.
  static FASTODE_DEVICE int channel(int eight) { return first_channel() + eight * 8 + lane() % 4 * 2; }
  // The same of a thread that is given.
  static FASTODE_DEVICE int row_of(int own, int tile, int half) {
    const int first = own / 32 / kAcross * kTiles + tile;
    return W == 8 ? 2 * first + half : first / kHalves;
  }
  static FASTODE_DEVICE int column_of(int own, int tile, int half) {
    return own % 32 / 4 + (W == 8 ? 0 : tile % kHalves * 16 + half * 8);
  }
  static FASTODE_DEVICE int channel_of(int own, int eight) { return own / 32 % kAcross * 16 + eight * 8 + own % 4 * 2; }

  static FASTODE_DEVICE int64_t offset(const cuda::Map& map, int64_t sample, int own, int tile, int eight, int half) {
    return sample * map.sample + channel_of(own, eight) * map.channel + row_of(own, tile, half) * map.row +
           column_of(own, tile, half) * map.column;
  }

  // Here and in `store` nothing of the places waits in a register from sample to sample.
  static FASTODE_DEVICE void load(State& state, const cuda::Map& map, int64_t sample) {
    const uint16_t* data = static_cast<const uint16_t*>(map.data);
    const int own = anew(thread());
    FASTODE_UNROLLED
    for (int tile = 0; tile < kTiles; ++tile) {
      FASTODE_UNROLLED
      for (int i = 0; i < 4; ++i) {
        const uint16_t* at = data + offset(map, sample, own, tile, i / 2, i % 2);
        state.word[tile][i / 2][i % 2] =
            map.words ? load_word(at) : at[0] | static_cast<uint32_t>(at[map.channel]) << 16;
      }
    }
  }

  static FASTODE_DEVICE void store(const State& state, const cuda::Map& map, int64_t sample) {
    uint16_t* data = static_cast<uint16_t*>(map.data);
    const int own = anew(thread());
    FASTODE_UNROLLED
    for (int tile = 0; tile < kTiles; ++tile) {
      FASTODE_UNROLLED
      for (int i = 0; i < 4; ++i) {
        uint16_t* at = data + offset(map, sample, own, tile, i / 2, i % 2);
        const uint32_t word = state.word[tile][i / 2][i % 2];
        if (map.words) {
          *reinterpret_cast<uint32_t*>(at) = word;
        } else {
          at[0] = static_cast<uint16_t>(word);
          at[map.channel] = static_cast<uint16_t>(word >> 16);
        }
      }
    }
  }

  // Which of a kept map's words are the thread's. Without a sign, which would wait in a register.
  static FASTODE_DEVICE unsigned own_words(int tile) { return static_cast<unsigned>(tile * kThreads + thread()); }

  // Maps that only these programs read lie in the order of threads: kKeptBytes of a sample at `place`.
  static FASTODE_DEVICE void keep(const State& state, char* place) {
    FASTODE_UNROLLED
    for (int tile = 0; tile < kTiles; ++tile) {
      const auto& w = state.word[tile];
      reinterpret_cast<Words*>(place)[own_words(tile)] = {{w[0][0], w[0][1], w[1][0], w[1][1]}};
    }
  }

  // Has the thread's own words of a kept map brought to shared memory, kKeptBytes of it in all.
  static FASTODE_DEVICE void request(char* slot, const char* place) {
    FASTODE_ROLLED
    for (int tile = 0; tile < kTiles; ++tile) {
      const unsigned at = own_words(tile) * 16;
      copy_later(slot + at, place + at);
    }
  }

  static FASTODE_DEVICE Words kept_tile(const char* place, int tile) {
    return reinterpret_cast<const Words*>(place)[own_words(tile)];
  }

  // Of that, the words of eight channels: of the upper and of the lower eight pixels.
  static FASTODE_DEVICE void kept_words(uint32_t (&words)[2], const char* place, int tile, int eight) {
    const Half found = reinterpret_cast<const Half*>(place)[own_words(tile) * 2 + eight];
    words[0] = found.word[0], words[1] = found.word[1];
  }

  static FASTODE_DEVICE void recall(State& state, const char* place) {
    FASTODE_UNROLLED
    for (int tile = 0; tile < kTiles; ++tile) {
      const Words found = kept_tile(place, tile);
      FASTODE_UNROLLED
      for (int i = 0; i < 4; ++i) state.word[tile][i / 2][i % 2] = found.word[i];
    }
  }

  static FASTODE_DEVICE void clear(State& state) { fill(state, 0); }

  static FASTODE_DEVICE void fill(State& state, uint32_t word) {
    FASTODE_UNROLLED
    for (int tile = 0; tile < kTiles; ++tile) {
      FASTODE_UNROLLED
      for (int i = 0; i < 4; ++i) state.word[tile][i / 2][i % 2] = word;
    }
  }

  static FASTODE_DEVICE void clear(Sum& sum) {
    FASTODE_UNROLLED
    for (int tile = 0; tile < kTiles; ++tile) {
      FASTODE_UNROLLED
      for (int i = 0; i < 8; ++i) sum.value[tile][i / 4][i % 4] = 0;
    }
  }

  // Adds factor times a kept map.
  static FASTODE_DEVICE void add_kept(Sum& sum, float factor, const char* place) {
    FASTODE_UNROLLED
    for (int tile = 0; tile < kTiles; ++tile) {
      const Words found = kept_tile(place, tile);
      FASTODE_UNROLLED
      for (int i = 0; i < 4; ++i) add_word(sum, factor, found.word[i], tile, i / 2, i % 2);
    }
  }

  static FASTODE_DEVICE void add(Sum& sum, float factor, const State& state) {
    FASTODE_UNROLLED
    for (int tile = 0; tile < kTiles; ++tile) {
      FASTODE_UNROLLED
      for (int i = 0; i < 4; ++i) add_word(sum, factor, state.word[tile][i / 2][i % 2], tile, i / 2, i % 2);
    }
  }

  static FASTODE_DEVICE void add_word(Sum& sum, float factor, uint32_t word, int tile, int eight, int half) {
    const Pair pair = T::unpack(word);
    sum.value[tile][eight][2 * half] += factor * pair.low;
    sum.value[tile][eight][2 * half + 1] += factor * pair.high;
  }

  static FASTODE_DEVICE void scale(Sum& sum, float factor) {
    FASTODE_UNROLLED
    for (int tile = 0; tile < kTiles; ++tile) {
      FASTODE_UNROLLED
      for (int i = 0; i < 8; ++i) sum.value[tile][i / 4][i % 4] *= factor;
    }
  }

  static FASTODE_DEVICE void round(State& state, const Sum& sum) {
    FASTODE_UNROLLED
    for (int tile = 0; tile < kTiles; ++tile) {
      FASTODE_UNROLLED
      for (int i = 0; i < 4; ++i) {
        const float* pair = &sum.value[tile][i / 2][i % 2 * 2];
        state.word[tile][i / 2][i % 2] = T::pack(pair[0], pair[1]);
      }
    }
  }

  // ---- the map in shared memory

  static FASTODE_DEVICE char* word_in(char* map, int tile, int eight, int half) {
    const int first = (first_channel() / 8 * kPixels + (first_row() + 1) * (W + 2) + lane() / 4 + 1) * 16;
    const int down = W == 8 ? 2 * tile + half : tile / kHalves, right = W == 8 ? 0 : tile % kHalves * 16 + half * 8;
    return map + first + lane() % 4 * 4 + (eight * kPixels + down * (W + 2) + right) * 16;
  }

  static FASTODE_DEVICE void put(char* map, const State& state) {
    FASTODE_UNROLLED
    for (int tile = 0; tile < kTiles; ++tile) {
      FASTODE_UNROLLED
      for (int i = 0; i < 4; ++i)
        *reinterpret_cast<uint32_t*>(word_in(map, tile, i / 2, i % 2)) = state.word[tile][i / 2][i % 2];
    }
  }

  // The place of a word in a map without a border: [C / 8][pixel][8 channels].
  static FASTODE_DEVICE char* bare_word_in(char* map, int tile, int eight, int half) {
    const int pixel = row(tile, half) * W + column(tile, half);
    return map + ((first_channel() / 8 + eight) * W * W + pixel) * 16 + lane() % 4 * 4;
  }

  // The border, once: nothing else is ever written there.
  static FASTODE_DEVICE void clear_border(char* map) {
    for (int i = thread(); i < C / 8 * kPixels; i += kThreads) {
      const int pixel = i % kPixels, y = pixel / (W + 2), x = pixel % (W + 2);
      if (y == 0 || y == W + 1 || x == 0 || x == W + 1) reinterpret_cast<Words*>(map)[i] = {{0, 0, 0, 0}};
    }
  }

  // A convolution's weight [C out][C in][3][3] of any strides, to [tap][in / 8][out][8 in].
  static FASTODE_DEVICE void put_weight(char* place, const uint16_t* weight, const int64_t (&strides)[4]) {
    uint16_t* target = reinterpret_cast<uint16_t*>(place);
    for (int i = thread(); i < C * C; i += kThreads) {  // unrolled, so that many loads are on their way
      const int out = i / C, in = i % C;
      const uint16_t* from = weight + out * strides[0] + in * strides[1];
      FASTODE_UNROLLED
      for (int tap = 0; tap < 9; ++tap)
        target[((tap * (C / 8) + in / 8) * C + out) * 8 + in % 8] = from[tap / 3 * strides[2] + tap % 3 * strides[3]];
    }
  }

  // Adds to `sum` the convolution of the map; kTransposed: that by its transpose, the pull-back.
  template <bool kTransposed>
  static FASTODE_DEVICE void convolve(Sum& sum, const char* map, const char* weight) {
    if constexpr (W == 8)
      convolve_narrow<kTransposed>(sum, map, weight);
    else
      convolve_wide<kTransposed>(sum, map, weight);
  }

 private:
  // The factors of 16 input channels and the warp's 16 output channels at a tap: those of channels 0-7 and 8-15.
  template <bool kTransposed>
  static FASTODE_DEVICE void load_weight(uint32_t (&low)[2], uint32_t (&high)[2], const char* weight, int step, int dy,
                                         int dx) {
    const int tap = kTransposed ? (1 - dy) * 3 + 1 - dx : (dy + 1) * 3 + dx + 1;
    const int matrix = lane() / 8, in_matrix = lane() % 8;
    uint32_t found[4];
    if constexpr (kTransposed) {
      // Rows are those of the weight, the channels that are summed over here.
      const int eight = first_channel() / 8 + matrix / 2, row = step * 16 + matrix % 2 * 8 + in_matrix;
      ldmatrix_x4_transposed(found, weight + ((tap * (C / 8) + eight) * C + row) * 16);
    } else {
      const int eight = step * 2 + matrix % 2, row = first_channel() + matrix / 2 * 8 + in_matrix;
      ldmatrix_x4(found, weight + ((tap * (C / 8) + eight) * C + row) * 16);
    }
    low[0] = found[0], low[1] = found[1], high[0] = found[2], high[1] = found[3];
  }

  // A row of the map at a shift dx meets the three rows of the kernel: it is loaded once.
  template <bool kTransposed>
  static FASTODE_DEVICE void convolve_wide(Sum& sum, const char* map, const char* weight) {
    constexpr int kRows = kTiles / kHalves;
    const int top = first_row(), matrix = lane() / 8;
    const char* const mine = map + matrix / 2 * kPixels * 16 + (matrix % 2 * 8 + lane() % 8) * 16;
    FASTODE_ROLLED
    for (int step = 0; step < C / 16; ++step) {
      FASTODE_ROLLED
      for (int dx = -1; dx <= 1; ++dx) {
        uint32_t factor[3][2][2];
        FASTODE_UNROLLED
        for (int dy = -1; dy <= 1; ++dy)
          load_weight<kTransposed>(factor[dy + 1][0], factor[dy + 1][1], weight, step, dy, dx);
        const char* const plane = mine + (step * 2 * kPixels + top * (W + 2) + 1 + dx) * 16;
        FASTODE_UNROLLED
        for (int side = 0; side < kHalves; ++side) {
          FASTODE_UNROLLED
          for (int r = 0; r < kRows + 2; ++r) {  // of the map with its border
            uint32_t a[4];
            ldmatrix_x4(a, plane + (r * (W + 2) + side * 16) * 16);
            FASTODE_UNROLLED
            for (int dy = 0; dy < 3; ++dy) {
              const int out = r - dy;
              if (out >= 0 && out < kRows) {
                T::mma(sum.value[out * kHalves + side][0], a, factor[dy][0]);
                T::mma(sum.value[out * kHalves + side][1], a, factor[dy][1]);
              }
            }
          }
        }
      }
    }
  }

  // Where a row has eight pixels, a tile is two rows, each of which is a matrix of ldmatrix by itself.
  template <bool kTransposed>
  static FASTODE_DEVICE void convolve_narrow(Sum& sum, const char* map, const char* weight) {
    const int top = first_row(), matrix = lane() / 8;
    const char* const mine = map + matrix / 2 * kPixels * 16 + (matrix % 2 * (W + 2) + lane() % 8) * 16;
    FASTODE_ROLLED
    for (int step = 0; step < C / 16; ++step) {
      FASTODE_ROLLED
      for (int dx = -1; dx <= 1; ++dx) {
        uint32_t rows[kTiles + 1][4];  // two rows each: their lower channels, their upper channels
        FASTODE_UNROLLED
        for (int pair = 0; pair <= kTiles; ++pair)
          ldmatrix_x4(rows[pair], mine + (step * 2 * kPixels + (top + 2 * pair) * (W + 2) + 1 + dx) * 16);
        FASTODE_UNROLLED
        for (int dy = 0; dy < 3; ++dy) {
          uint32_t low[2], high[2];
          load_weight<kTransposed>(low, high, weight, step, dy - 1, dx);
          FASTODE_UNROLLED
          for (int tile = 0; tile < kTiles; ++tile) {
            // Rows 2 tile + dy and the next, of the map with its border.
            const uint32_t (&p)[4] = rows[tile + dy / 2];
            const uint32_t (&q)[4] = rows[tile + (dy + 1) / 2];
            const int i = dy % 2, j = 1 - i;
            const uint32_t a[4] = {p[i], q[j], p[2 + i], q[2 + j]};
            T::mma(sum.value[tile][0], a, low);
            T::mma(sum.value[tile][1], a, high);
          }
        }
      }
    }
  }
};

}  // namespace fastode::device

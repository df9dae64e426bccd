// The pull-back of a norm in a block, and the sums for the gradients of its weight and bias.
#pragma once

#include "sums.cuh"

namespace fastode::device {

template <class Tile>
class Norms : public Sums<Tile> {
  using Base = Sums<Tile>;

 public:
  using typename Base::State;
  using typename Base::T;
  using Sum = typename Tile::Sum;
  using Base::Base, Base::C, Base::W, Base::leave_partial, Base::sum_channel;

  // The block's sums for the gradients of so many norms' weights and biases, to its row of [block][norm][bias,
  // weight][C].
  FASTODE_DEVICE void store_sums(float* rows, int norms) const {
    float* const to = rows + block() * norms * 2 * C;
    block_barrier();  // unseen: it is needed where nothing was pulled back, because all of beta is zero
    FASTODE_ROLLED
    for (int i = thread(); i < norms * 2 * C; i += Tile::kThreads) to[i] = memory_.sums(i / (2 * C))[i % (2 * C)];
  }

  static FASTODE_DEVICE float number(const cuda::Vector& vector, int at, float otherwise) {
    return vector.data ? T::unpack(static_cast<const uint16_t*>(vector.data)[at * vector.stride]).low : otherwise;
  }

  static FASTODE_DEVICE char* place(const cuda::Room& room, int slot, int64_t sample) {
    char* const first = slot < room.split ? room.kept : room.own;
    return first + ((slot < room.split ? slot : slot - room.split) * room.samples + sample) * Tile::kKeptBytes;
  }

 protected:
  using Base::channel, Base::entry, Base::memory_, Base::sum_group;

  // The sums over the pixels of bar and of bar times the normalised map, by channels, left as parts of warps. `found`:
  // mean, then rstd.
  FASTODE_DEVICE void sum_channels(const State& state, const Sum& bar, const float* found) {
    float sums[2][4];
    FASTODE_UNROLLED
    for (int j = 0; j < 4; ++j) {
      const int c = channel(j);
      const float mean = found[c], rstd = found[C + c];
      sums[0][j] = sums[1][j] = 0;
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        FASTODE_UNROLLED
        for (int half = 0; half < 2; ++half) {
          const float v = bar.value[tile][j / 2][2 * half + j % 2];
          sums[0][j] += v;
          sums[1][j] += v * ((entry(state, tile, j, half) - mean) * rstd);
        }
      }
    }
    leave_partial(sums);
    block_barrier();
  }

  // Of each group of the first so many channels, the means of some kinds of sums times `weight` (or of the sums
  // themselves), to `means` from `at` on.
  FASTODE_DEVICE void take_means(int groups, const float* weight, int kinds, int at, int channels = C) {
    const int width = channels / groups;
    FASTODE_ROLLED
    for (int i = Tile::warp(); i < groups * kinds; i += Tile::kThreads / 32) {
      const int g = i / kinds, kind = i % kinds;
      const float mean = sum_group(kind, g, width, weight) / static_cast<float>(width * W * W);
      FASTODE_ROLLED
      for (int c = g * width + lane(); c < (g + 1) * width; c += 32) memory_.means[(at + kind) * C + c] = mean;
    }
  }

  FASTODE_DEVICE void add_sums(int norm) {
    for (int c = thread(); c < C; c += Tile::kThreads)
      memory_.sums(norm)[c] += sum_channel(0, c), memory_.sums(norm)[C + c] += sum_channel(1, c);
  }

  // bar becomes rstd (v − its mean − n̂ · mean of n̂ v) for v = weight · bar, without means where statistics are given.
  FASTODE_DEVICE void pull_norm(int norm, const State& state, Sum& bar, const float* found, bool coupled) const {
    FASTODE_UNROLLED
    for (int j = 0; j < 4; ++j) {
      const int c = channel(j);
      const float mean = found[c], rstd = found[C + c], weight = memory_.norm_weight(norm)[c];
      if (!coupled) {  // the map is not read: it may be infinite
        FASTODE_UNROLLED
        for (int tile = 0; tile < Tile::kTiles; ++tile) {
          FASTODE_UNROLLED
          for (int half = 0; half < 2; ++half) bar.value[tile][j / 2][2 * half + j % 2] *= rstd * weight;
        }
        continue;
      }
      const float first = memory_.means[c], second = memory_.means[C + c];
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        FASTODE_UNROLLED
        for (int half = 0; half < 2; ++half) {
          float& v = bar.value[tile][j / 2][2 * half + j % 2];
          v = rstd * (weight * v - first - (entry(state, tile, j, half) - mean) * rstd * second);
        }
      }
    }
  }
};

}  // namespace fastode::device

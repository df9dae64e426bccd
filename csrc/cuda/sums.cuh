// Sums over a map's pixels and channels in a block: of a thread's entries, of lanes, then of warps by shared memory.
#pragma once

#include "memory.cuh"

namespace fastode::device {

template <class Tile>
class Sums {
 public:
  using T = typename Tile::Type;
  using State = typename Tile::State;
  static constexpr int C = Tile::kChannels, W = Tile::kSide;

  FASTODE_DEVICE Sums(int units, int weights) : memory_(units, weights) {}

  FASTODE_DEVICE const Memory<Tile>& memory() const { return memory_; }

  // The sum of the lanes' values, in every lane.
  static FASTODE_DEVICE float sum_lanes(float value) {
    FASTODE_UNROLLED
    for (int mask = 1; mask < 32; mask *= 2) value += shuffle_xor(value, mask);
    return value;
  }

  // Leaves the sums of a warp's lanes, by channels: of the lane's own channels, four sums of each kind.
  template <int kinds>
  FASTODE_DEVICE void leave_partial(float (&sums)[kinds][4], bool add = true) const {
    float* at = memory_.partial + Tile::warp() / Tile::kAcross * C;
    FASTODE_UNROLLED
    for (int i = 0; i < kinds * 4; ++i) {
      float sum = sums[i / 4][i % 4];
      FASTODE_UNROLLED
      for (int mask = 4; add && mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
      if (lane() < 4) at[i / 4 * Tile::kDown * C + channel(i % 4)] = sum;
    }
  }

  // The sum of one kind over a channel's parts.
  FASTODE_DEVICE float sum_channel(int kind, int c) const {
    float total = 0;
    FASTODE_ROLLED
    for (int i = 0; i < Tile::kDown; ++i) total += memory_.partial[(kind * Tile::kDown + i) * C + c];
    return total;
  }

 protected:
  static FASTODE_DEVICE int channel(int j) { return Tile::channel(j / 2) + j % 2; }

  // Of the entries of a thread: the one of channel j of four and of the lower or upper eight pixels.
  static FASTODE_DEVICE float entry(const State& state, int tile, int j, int half) {
    return part<T>(state.word[tile][j / 2][half], j % 2);
  }

  // Means and squares about them: of a thread's entries of a channel, then of lanes merged by Chan's rule for parts of
  // one size, so that a mean far above the deviation costs no digits. The warps' parts are left.
  FASTODE_DEVICE void leave_moments(const State& state) const {
    float parts_of[2][4];
    float (&mean)[4] = parts_of[0], (&squares)[4] = parts_of[1];
    FASTODE_UNROLLED
    for (int j = 0; j < 4; ++j) {
      float total = 0;
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) total += entry(state, tile, j, 0) + entry(state, tile, j, 1);
      mean[j] = total / (2 * Tile::kTiles);
      float square = 0;
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        const float low = entry(state, tile, j, 0) - mean[j], high = entry(state, tile, j, 1) - mean[j];
        square += low * low + high * high;
      }
      squares[j] = square;
      float each = 2 * Tile::kTiles;  // entries of either part
      FASTODE_UNROLLED
      for (int mask = 4; mask < 32; mask *= 2) {
        const float other = shuffle_xor(mean[j], mask), more = shuffle_xor(squares[j], mask);
        const float apart = other - mean[j];
        squares[j] += more + apart * apart * (each / 2);
        mean[j] = (mean[j] + other) / 2;
        each *= 2;
      }
    }
    leave_partial(parts_of, false);
    block_barrier();
  }

  // Those of a group norm of the first so many channels: of warps and channels merged by the same rule.
  FASTODE_DEVICE void take_statistics(int groups, float eps, const State& state, int channels = C) {
    leave_moments(state);
    const int width = channels / groups, parts = Tile::kDown * width;
    const float entries = W * W / Tile::kDown;  // of a part
    FASTODE_ROLLED
    for (int g = Tile::warp(); g < groups; g += Tile::kThreads / 32) {
      const float group_mean = sum_lanes(over_parts(g, width, [&](float m, float) { return m; })) / parts;
      const float about = sum_lanes(
          over_parts(g, width, [&](float m, float s) { return s + (m - group_mean) * (m - group_mean) * entries; }));
      FASTODE_ROLLED
      for (int c = g * width + lane(); c < (g + 1) * width; c += 32) {
        memory_.mean[c] = group_mean;
        memory_.rstd[c] = rsqrt(about / (parts * entries) + eps);
      }
    }
    block_barrier();
  }

  // The sum of one kind over a group's parts, weighted by channels, in every lane.
  FASTODE_DEVICE float sum_group(int kind, int group, int width, const float* weight) const {
    const float* from = memory_.partial + kind * Tile::kDown * C;
    float total = 0;
    FASTODE_ROLLED
    for (int i = lane(); i < Tile::kDown * width; i += 32) {
      const int c = group * width + i % width;
      total += from[i / width * C + c] * (weight ? weight[c] : 1);
    }
    return sum_lanes(total);
  }

  // This lane's share of a sum over a group's parts.
  template <class F>
  FASTODE_DEVICE float over_parts(int group, int width, const F& f) const {
    float total = 0;
    for (int i = lane(); i < Tile::kDown * width; i += 32) {
      const int c = group * width + i % width;
      const float* at = memory_.partial + i / width * C + c;
      total += f(at[0], at[Tile::kDown * C]);
    }
    return total;
  }

  Memory<Tile> memory_;
};

}  // namespace fastode::device

// A branch in a block: its value and its pull-back, a sample at a time. The maps stay in registers and in shared memory.
#pragma once

#include "activation.cuh"
#include "programs.h"
#include "tile.cuh"

namespace fastode::device {

// Shared memory of a block. Weights lie there for all samples that the block takes.
template <class Tile>
struct Memory {
  static constexpr int C = Tile::kChannels;

  static constexpr size_t bytes(int units) {
    return static_cast<size_t>(units) * (Tile::kWeightBytes + 3 * C * sizeof(float)) + Tile::kMapBytes +
           (4 + 2 * Tile::kDown) * C * sizeof(float);
  }

  FASTODE_DEVICE explicit Memory(int units) {
    char* next = shared_memory();
    weights = next, next += units * Tile::kWeightBytes;
    map = next, next += Tile::kMapBytes;
    numbers = reinterpret_cast<float*>(next), next += units * 3 * C * static_cast<int>(sizeof(float));
    mean = reinterpret_cast<float*>(next);
    rstd = mean + C, first = rstd + C, second = first + C, partial = second + C;
  }

  FASTODE_DEVICE char* weight(int unit) const { return weights + unit * Tile::kWeightBytes; }
  FASTODE_DEVICE float* norm_weight(int unit) const { return numbers + unit * 3 * C; }
  FASTODE_DEVICE float* norm_bias(int unit) const { return numbers + (unit * 3 + 1) * C; }
  FASTODE_DEVICE float* bias(int unit) const { return numbers + (unit * 3 + 2) * C; }

  char *weights, *map;
  float* numbers;          // [unit][norm's weight, its bias, the convolution's bias][C]
  float *mean, *rstd;      // of the norm at hand, [C]
  float *first, *second;   // the means of its pull-back, [C]
  float* partial;          // [2][kDown][C]
};

template <class Tile>
class Branch {
 public:
  using T = typename Tile::Type;
  using State = typename Tile::State;
  using Sum = typename Tile::Sum;
  static constexpr int C = Tile::kChannels, W = Tile::kSide;

  // Reads all parameters.
  FASTODE_DEVICE explicit Branch(const cuda::Branch& branch, int samples)
      : branch_(branch), samples_(samples), memory_(branch.count) {
    Tile::clear_border(memory_.map);
    for (int u = 0; u < branch.count; ++u) {
      const cuda::Unit& unit = branch.unit[u];
      Tile::put_weight(memory_.weight(u), static_cast<const uint16_t*>(unit.weight), unit.weight_strides);
      for (int c = thread(); c < C; c += Tile::kThreads) {
        memory_.norm_weight(u)[c] = number(unit.norm_weight, c, 1);
        memory_.norm_bias(u)[c] = number(unit.norm_bias, c, 0);
        memory_.bias(u)[c] = number(unit.bias, c, 0);
      }
    }
  }

  FASTODE_DEVICE int count() const { return branch_.count; }

  // f(point) in `out`; `point` is overwritten. Unit inputs and statistics go where `input` and the branch say.
  FASTODE_DEVICE void value(State& point, Sum& out, int64_t sample, int evaluation, const cuda::Room& room,
                            const int* input) {
    for (int u = 0; u < branch_.count; ++u) {
      const cuda::Unit& unit = branch_.unit[u];
      if (input && input[u] >= 0) Tile::keep(point, place(room, input[u], sample));
      prepare(unit, point);
      if (branch_.statistics) keep_statistics(evaluation, u, sample);
      put_normalised(u, point);
      block_barrier();
      Tile::clear(out);
      Tile::template convolve<false>(out, memory_.map, memory_.weight(u));
      add_bias(out, memory_.bias(u));
      if (u + 1 < branch_.count) Tile::round(point, out);
    }
  }

  // Jᵀ bar in `bar`, at the point of an evaluation whose unit inputs and statistics were kept.
  FASTODE_DEVICE void pull(Sum& bar, int64_t sample, int evaluation, const cuda::Room& room, const int* input) {
    State state;
    for (int u = branch_.count - 1; u >= 0; --u) {
      const cuda::Unit& unit = branch_.unit[u];
      Tile::round(state, bar);
      block_barrier();
      Tile::put(memory_.map, state);
      recall_statistics(evaluation, u, sample);
      block_barrier();
      Tile::clear(bar);
      Tile::template convolve<true>(bar, memory_.map, memory_.weight(u));
      Tile::recall(state, place(room, input[u], sample));
      pull_activation(u, state, bar);
      const bool coupled = unit.norm == kGroupNorm;
      if (coupled) pull_means(unit, state, bar);
      pull_norm(state, bar, coupled);
    }
  }

  static FASTODE_DEVICE char* place(const cuda::Room& room, int slot, int64_t sample) {
    return room.data + (slot * room.samples + sample) * Tile::kKeptBytes;
  }

 private:
  static FASTODE_DEVICE float number(const void* data, int at, float otherwise) {
    return data ? T::unpack(static_cast<const uint16_t*>(data)[at]).low : otherwise;
  }

  // Mean and rstd of a unit's norm, which all threads read after it; nobody reads the map in shared memory then.
  FASTODE_DEVICE void prepare(const cuda::Unit& unit, const State& state) {
    if (unit.norm == kGroupNorm) return take_statistics(unit, state);
    block_barrier();
    for (int c = thread(); c < C; c += Tile::kThreads) {
      const bool fixed = unit.norm == kFixedNorm;
      memory_.mean[c] = fixed ? number(unit.mean, c, 0) : 0;
      memory_.rstd[c] = fixed ? rsqrt(number(unit.variance, c, 0) + unit.eps) : 1;
    }
    block_barrier();
  }

  // Means and squares about them: of a thread's entries of a channel, then of lanes, warps and channels merged by
  // Chan's rule for parts of one size, so that a mean far above the deviation costs no digits.
  FASTODE_DEVICE void take_statistics(const cuda::Unit& unit, const State& state) {
    float mean[4], squares[4];
    FASTODE_UNROLL
    for (int j = 0; j < 4; ++j) {
      float total = 0;
      FASTODE_UNROLL
      for (int tile = 0; tile < Tile::kTiles; ++tile)
        total += entry(state, tile, j, 0) + entry(state, tile, j, 1);
      mean[j] = total / (2 * Tile::kTiles);
      float square = 0;
      FASTODE_UNROLL
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        const float low = entry(state, tile, j, 0) - mean[j], high = entry(state, tile, j, 1) - mean[j];
        square += low * low + high * high;
      }
      squares[j] = square;
      float each = 2 * Tile::kTiles;  // entries of either part
      FASTODE_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) {
        const float other = shuffle_xor(mean[j], mask), more = shuffle_xor(squares[j], mask);
        const float apart = other - mean[j];
        squares[j] += more + apart * apart * (each / 2);
        mean[j] = (mean[j] + other) / 2;
        each *= 2;
      }
    }
    leave_partial(mean, squares);
    block_barrier();
    const int width = C / unit.groups, parts = Tile::kDown * width;
    const float entries = W * W / Tile::kDown;  // of a part
    for (int g = Tile::warp(); g < unit.groups; g += Tile::kThreads / 32) {
      const float group_mean = sum_lanes(over_parts(g, width, [&](float m, float) { return m; })) / parts;
      const float about = sum_lanes(over_parts(g, width, [&](float m, float s) {
        return s + (m - group_mean) * (m - group_mean) * entries;
      }));
      for (int c = g * width + lane(); c < (g + 1) * width; c += 32) {
        memory_.mean[c] = group_mean;
        memory_.rstd[c] = rsqrt(about / (parts * entries) + unit.eps);
      }
    }
    block_barrier();
  }

  // Of the entries of a thread: the one of channel j of four and of the lower or upper eight pixels.
  static FASTODE_DEVICE float entry(const State& state, int tile, int j, int half) {
    const Pair pair = T::unpack(state.word[tile][j / 2][half]);
    return j % 2 ? pair.high : pair.low;
  }

  static FASTODE_DEVICE int channel(int j) { return Tile::channel(j / 2) + j % 2; }

  FASTODE_DEVICE void leave_partial(const float (&one)[4], const float (&two)[4]) const {
    if (lane() >= 4) return;
    float* at = memory_.partial + Tile::warp() / Tile::kAcross * C;
    FASTODE_UNROLL
    for (int j = 0; j < 4; ++j) at[channel(j)] = one[j], at[Tile::kDown * C + channel(j)] = two[j];
  }

  // This lane's share of a sum over a group's parts.
  template <class F>
  FASTODE_DEVICE float over_parts(int group, int width, const F& f) const {
    float total = 0;
    for (int i = lane(); i < Tile::kDown * width; i += 32) {
      const float* at = memory_.partial + i / width * C + group * width + i % width;
      total += f(at[0], at[Tile::kDown * C]);
    }
    return total;
  }

  static FASTODE_DEVICE float sum_lanes(float value) {
    FASTODE_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) value += shuffle_xor(value, mask);
    return value;
  }

  FASTODE_DEVICE void put_normalised(int u, const State& state) const {
    const cuda::Unit& unit = branch_.unit[u];
    const ActivationArguments act{unit.activation, unit.p, unit.q};
    const float *weight = memory_.norm_weight(u), *bias = memory_.norm_bias(u);
    FASTODE_UNROLL
    for (int eight = 0; eight < 2; ++eight) {
      const int c = Tile::channel(eight);
      const float mean[2] = {memory_.mean[c], memory_.mean[c + 1]};
      const float factor[2] = {memory_.rstd[c] * weight[c], memory_.rstd[c + 1] * weight[c + 1]};
      const float shift[2] = {bias[c], bias[c + 1]};
      FASTODE_UNROLL
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        FASTODE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const Pair pair = T::unpack(state.word[tile][eight][half]);
          const float low = activate(act, (pair.low - mean[0]) * factor[0] + shift[0]);
          const float high = activate(act, (pair.high - mean[1]) * factor[1] + shift[1]);
          *reinterpret_cast<uint32_t*>(Tile::word_in(memory_.map, tile, eight, half)) = T::pack(low, high);
        }
      }
    }
  }

  static FASTODE_DEVICE void add_bias(Sum& sum, const float* bias) {
    FASTODE_UNROLL
    for (int eight = 0; eight < 2; ++eight) {
      const float low = bias[Tile::channel(eight)], high = bias[Tile::channel(eight) + 1];
      FASTODE_UNROLL
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        float(&v)[4] = sum.value[tile][eight];
        v[0] += low, v[1] += high, v[2] += low, v[3] += high;
      }
    }
  }

  // bar becomes weight σ′(n) bar, the cotangent of the normalised map.
  FASTODE_DEVICE void pull_activation(int u, const State& state, Sum& bar) const {
    const cuda::Unit& unit = branch_.unit[u];
    const ActivationArguments act{unit.activation, unit.p, unit.q};
    const float *weight = memory_.norm_weight(u), *bias = memory_.norm_bias(u);
    FASTODE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int c = channel(j);
      const float mean = memory_.mean[c], rstd = memory_.rstd[c], w = weight[c], b = bias[c];
      FASTODE_UNROLL
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        FASTODE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float normal = (entry(state, tile, j, half) - mean) * rstd;
          bar.value[tile][j / 2][2 * half + j % 2] *= w * derive(act, normal * w + b);
        }
      }
    }
  }

  // The means over each group of bar and of bar times the normalised map.
  FASTODE_DEVICE void pull_means(const cuda::Unit& unit, const State& state, const Sum& bar) {
    float one[4], two[4];
    FASTODE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int c = channel(j);
      const float mean = memory_.mean[c], rstd = memory_.rstd[c];
      one[j] = two[j] = 0;
      FASTODE_UNROLL
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        FASTODE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float v = bar.value[tile][j / 2][2 * half + j % 2];
          one[j] += v;
          two[j] += v * ((entry(state, tile, j, half) - mean) * rstd);
        }
      }
      FASTODE_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) {
        one[j] += shuffle_xor(one[j], mask);
        two[j] += shuffle_xor(two[j], mask);
      }
    }
    leave_partial(one, two);
    block_barrier();
    const int width = C / unit.groups;
    for (int g = Tile::warp(); g < unit.groups; g += Tile::kThreads / 32) {
      const float first = sum_lanes(over_parts(g, width, [](float a, float) { return a; }));
      const float second = sum_lanes(over_parts(g, width, [](float, float b) { return b; }));
      const float entries = static_cast<float>(width * W * W);
      for (int c = g * width + lane(); c < (g + 1) * width; c += 32)
        memory_.first[c] = first / entries, memory_.second[c] = second / entries;
    }
    block_barrier();
  }

  // bar becomes rstd (bar − its mean − n̂ · mean of n̂ bar), without the means where the statistics are given.
  FASTODE_DEVICE void pull_norm(const State& state, Sum& bar, bool coupled) const {
    FASTODE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int c = channel(j);
      const float mean = memory_.mean[c], rstd = memory_.rstd[c];
      const float first = coupled ? memory_.first[c] : 0, second = coupled ? memory_.second[c] : 0;
      FASTODE_UNROLL
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        FASTODE_UNROLL
        for (int half = 0; half < 2; ++half) {
          float& v = bar.value[tile][j / 2][2 * half + j % 2];
          v = rstd * (v - first - (entry(state, tile, j, half) - mean) * rstd * second);
        }
      }
    }
  }

  FASTODE_DEVICE float* statistics(int evaluation, int u, int64_t sample) const {
    return branch_.statistics + ((evaluation * branch_.count + u) * static_cast<int64_t>(samples_) + sample) * 2 * C;
  }

  FASTODE_DEVICE void keep_statistics(int evaluation, int u, int64_t sample) const {
    float* at = statistics(evaluation, u, sample);
    for (int c = thread(); c < C; c += Tile::kThreads) at[c] = memory_.mean[c], at[C + c] = memory_.rstd[c];
  }

  FASTODE_DEVICE void recall_statistics(int evaluation, int u, int64_t sample) const {
    const float* at = statistics(evaluation, u, sample);
    for (int c = thread(); c < C; c += Tile::kThreads) memory_.mean[c] = at[c], memory_.rstd[c] = at[C + c];
  }

  const cuda::Branch& branch_;
  int samples_;
  Memory<Tile> memory_;
};

}  // namespace fastode::device

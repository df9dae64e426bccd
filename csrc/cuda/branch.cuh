// A branch in a block: its value and its pull-back, a sample at a time. The maps stay in registers and in shared
// memory.
#pragma once

#include "activation.cuh"
#include "norms.cuh"

namespace fastode::device {

// The places of a map of each unit, moved on by so many; negative: none.
struct Slots {
  const int* first = nullptr;
  int by = 0;

  FASTODE_DEVICE int operator[](int u) const { return !first || first[u] < 0 ? -1 : first[u] + by; }
};

// Where a pull-back leaves maps for the parameters' gradients and for a derivative of its own.
struct Left {
  Slots cotangent;    // of the units' convolutions
  Slots back;         // those through the convolutions, of the activations
  bool sums = false;  // whether the norms' sums are wanted
};

template <class Tile>
class Branch : public Norms<Tile> {
  using Base = Norms<Tile>;

 public:
  using typename Base::State;
  using typename Base::T;
  using Sum = typename Tile::Sum;
  using Base::C, Base::W, Base::leave_partial, Base::sum_channel, Base::number, Base::place;

  // Reads all parameters; `weights`: of the convolutions, too.
  FASTODE_DEVICE Branch(const cuda::Branch& branch, int samples, bool weights = true)
      : Base(branch.count, weights ? branch.count : 0), branch_(branch), samples_(samples) {
    Tile::clear_border(memory_.map);
    FASTODE_ROLLED
    for (int u = 0; u < branch.count; ++u) {
      const cuda::Unit& unit = branch.unit[u];
      if (weights) Tile::put_weight(memory_.weight(u), static_cast<const uint16_t*>(unit.weight), unit.weight_strides);
      FASTODE_ROLLED
      for (int c = thread(); c < C; c += Tile::kThreads) {
        memory_.norm_weight(u)[c] = number(unit.norm_weight, c, 1);
        memory_.norm_bias(u)[c] = number(unit.norm_bias, c, 0);
        memory_.bias(u)[c] = number(unit.bias, c, 0);
        memory_.sums(u)[c] = memory_.sums(u)[C + c] = 0;
      }
    }
  }

  // For `value`: mean and rstd of norms that do not measure them, in the place of the sums, which a forward has not.
  FASTODE_DEVICE void fix_statistics() const {
    FASTODE_ROLLED
    for (int u = 0; u < branch_.count; ++u) {
      const cuda::Unit& unit = branch_.unit[u];
      const bool fixed = unit.norm == kFixedNorm;
      FASTODE_ROLLED
      for (int c = thread(); c < C; c += Tile::kThreads) {
        memory_.sums(u)[c] = fixed ? number(unit.mean, c, 0) : 0;
        memory_.sums(u)[C + c] = fixed ? rsqrt(number(unit.variance, c, 0) + unit.eps) : 1;
      }
    }
  }

  FASTODE_DEVICE int count() const { return branch_.count; }

  // A unit's convolution's input in shared memory, again: at an evaluation whose unit inputs and statistics were kept.
  // What is on its way is there for all threads after await_copies and a barrier, which are the caller's.
  FASTODE_DEVICE void request(int u, int64_t sample, int evaluation, const char* input, char* slot) const {
    Tile::request(slot, input);
    const float* const from = statistics(evaluation, u, sample);
    FASTODE_ROLLED
    for (int i = thread() * 4; i < 2 * C; i += Tile::kThreads * 4) copy_later(memory_.mean + i, from + i);
  }
  FASTODE_DEVICE void revisit(int u, const char* slot) const {
    FASTODE_ROLLED
    for (int eight = 0; eight < 2; ++eight) {
      const Normal normal = normal_of(u, eight, memory_.mean);
      FASTODE_ROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        uint32_t words[2];
        Tile::kept_words(words, slot, tile, eight);
        // Here, for what is kept for all tiles takes registers from the products.
        with_activation(activation(u), [&](const auto& act) {
          FASTODE_UNROLLED
          for (int half = 0; half < 2; ++half)
            *reinterpret_cast<uint32_t*>(Tile::word_in(memory_.map, tile, eight, half)) =
                T::pack(act.activate(normal(words[half])));
        });
      }
    }
  }

  // f(point) in `out`; `point` is overwritten. Unit inputs and statistics go where `input` and the branch say.
  FASTODE_DEVICE void value(State& point, Sum& out, int64_t sample, int evaluation, const cuda::Room& room,
                            Slots input) {
    FASTODE_ROLLED
    for (int u = 0; u < branch_.count; ++u) {
      if (input[u] >= 0) Tile::keep(point, place(room, input[u], sample));
      const float* const found = prepare(u, point);
      if (branch_.statistics) keep_rows(evaluation, u, sample, 0, found);
      put_normalised(u, found, point);
      block_barrier();
      Tile::clear(out);
      Tile::template convolve<false>(out, memory_.map, memory_.weight(u));
      add_bias(out, memory_.bias(u));
      if (u + 1 < branch_.count) Tile::round(point, out);
    }
  }

  // Jᵀ bar in `bar`, at the point of an evaluation whose unit inputs and statistics were kept.
  FASTODE_DEVICE void pull(Sum& bar, int64_t sample, int evaluation, const cuda::Room& room, Slots input,
                           const Left& left = {}) {
    State state;
    FASTODE_ROLLED
    for (int u = branch_.count - 1; u >= 0; --u) {
      const cuda::Unit& unit = branch_.unit[u];
      Tile::round(state, bar);
      if (left.cotangent[u] >= 0) Tile::keep(state, place(room, left.cotangent[u], sample));
      block_barrier();
      Tile::put(memory_.map, state);
      recall_statistics(evaluation, u, sample);
      Tile::recall(state, place(room, input[u], sample));  // on its way during the convolution
      block_barrier();
      Tile::clear(bar);
      Tile::template convolve<true>(bar, memory_.map, memory_.weight(u));
      if (left.back[u] >= 0) {
        State back;
        Tile::round(back, bar);
        Tile::keep(back, place(room, left.back[u], sample));
      }
      pull_activation(u, state, bar);
      const bool coupled = unit.norm == kGroupNorm, wanted = left.sums && affine(unit);
      if (coupled || wanted) this->sum_channels(state, bar, memory_.mean);
      if (coupled) take_unit_means(u, 2, 0);
      if (wanted) this->add_sums(u);
      if (coupled || wanted) block_barrier();
      if (coupled && left.back[u] >= 0) keep_rows(evaluation, u, sample, 1, memory_.means);
      this->pull_norm(u, state, bar, memory_.mean, coupled);
    }
  }

 protected:
  using Base::channel, Base::entry, Base::memory_, Base::sum_group;

  FASTODE_DEVICE void take_unit_means(int u, int kinds, int at, bool weighted = true) {
    this->take_means(branch_.unit[u].groups, weighted ? memory_.norm_weight(u) : nullptr, kinds, at);
  }

  static FASTODE_DEVICE bool affine(const cuda::Unit& unit) { return unit.norm_weight.data || unit.norm_bias.data; }

  // Where mean and rstd of a unit's norm are, of [C] each, for all threads; nobody reads the map in shared memory then.
  FASTODE_DEVICE const float* prepare(int u, const State& state) {
    if (branch_.unit[u].norm != kGroupNorm) {
      block_barrier();
      return memory_.sums(u);
    }
    this->take_statistics(branch_.unit[u].groups, branch_.unit[u].eps, state);
    return memory_.mean;
  }

  // What a unit's norm makes of a word: of two channels of a pixel.
  struct Normal {
    float mean[2], factor[2], shift[2];

    FASTODE_DEVICE Pair operator()(uint32_t word) const {
      const Pair pair = T::unpack(word);
      return {(pair.low - mean[0]) * factor[0] + shift[0], (pair.high - mean[1]) * factor[1] + shift[1]};
    }
  };

  // `found`: mean, then rstd.
  FASTODE_DEVICE Normal normal_of(int u, int eight, const float* found) const {
    const float *weight = memory_.norm_weight(u), *bias = memory_.norm_bias(u);
    const int c = Tile::channel(eight);
    return {
        {found[c], found[c + 1]}, {found[C + c] * weight[c], found[C + c + 1] * weight[c + 1]}, {bias[c], bias[c + 1]}};
  }

  FASTODE_DEVICE ActivationArguments activation(int u) const {
    const cuda::Unit& unit = branch_.unit[u];
    return {unit.activation, unit.p, unit.q};
  }

  FASTODE_DEVICE void put_normalised(int u, const float* found, const State& state) const {
    with_activation(activation(u), [&](const auto& act) {
      FASTODE_UNROLLED
      for (int eight = 0; eight < 2; ++eight) {
        const Normal normal = normal_of(u, eight, found);
        FASTODE_UNROLLED
        for (int tile = 0; tile < Tile::kTiles; ++tile) {
          FASTODE_UNROLLED
          for (int half = 0; half < 2; ++half)
            *reinterpret_cast<uint32_t*>(Tile::word_in(memory_.map, tile, eight, half)) =
                T::pack(act.activate(normal(state.word[tile][eight][half])));
        }
      }
    });
  }

  static FASTODE_DEVICE void add_bias(Sum& sum, const float* bias) {
    FASTODE_UNROLLED
    for (int eight = 0; eight < 2; ++eight) {
      const float low = bias[Tile::channel(eight)], high = bias[Tile::channel(eight) + 1];
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        float (&v)[4] = sum.value[tile][eight];
        v[0] += low, v[1] += high, v[2] += low, v[3] += high;
      }
    }
  }

  // bar becomes σ′(n) bar, the cotangent of the norm's result.
  FASTODE_DEVICE void pull_activation(int u, const State& state, Sum& bar) const {
    with_activation(activation(u), [&](const auto& act) {
      FASTODE_UNROLLED
      for (int eight = 0; eight < 2; ++eight) {
        const Normal normal = normal_of(u, eight, memory_.mean);
        FASTODE_UNROLLED
        for (int tile = 0; tile < Tile::kTiles; ++tile) {
          FASTODE_UNROLLED
          for (int half = 0; half < 2; ++half) {
            const Pair slope = act.derive(normal(state.word[tile][eight][half]));
            bar.value[tile][eight][2 * half] *= slope.low;
            bar.value[tile][eight][2 * half + 1] *= slope.high;
          }
        }
      }
    });
  }

  // Of an evaluation's norm four rows of C: mean and rstd, then the means of a pull-back or, of a tangent, its own.
  FASTODE_DEVICE float* statistics(int evaluation, int u, int64_t sample) const {
    return branch_.statistics + ((evaluation * branch_.count + u) * static_cast<int64_t>(samples_) + sample) * 4 * C;
  }

  // Two rows, the first or the second pair of them.
  FASTODE_DEVICE void keep_rows(int evaluation, int u, int64_t sample, int pair, const float* rows) const {
    float* at = statistics(evaluation, u, sample) + pair * 2 * C;
    FASTODE_ROLLED
    for (int i = thread(); i < 2 * C; i += Tile::kThreads) at[i] = rows[i];
  }

  FASTODE_DEVICE void recall_rows(int evaluation, int u, int64_t sample, int pair, float* rows, float factor) const {
    const float* at = statistics(evaluation, u, sample) + pair * 2 * C;
    FASTODE_ROLLED
    for (int i = thread(); i < 2 * C; i += Tile::kThreads) rows[i] = factor * at[i];
  }

  FASTODE_DEVICE void recall_statistics(int evaluation, int u, int64_t sample) const {
    recall_rows(evaluation, u, sample, 0, memory_.mean, 1);
  }

  const cuda::Branch& branch_;
  int samples_;
};

}  // namespace fastode::device

// The derivative of a branch's pull-back: a tangent pushed through the branch, and a sweep back with two cotangents.
// Derivation: fastode/ops/README.md and that of implicit_euler; N, M and B are named where they are made.
#pragma once

#include "branch.cuh"

namespace fastode::device {

template <class Tile>
class Second : public Branch<Tile> {
  using Base = Branch<Tile>;
  using T = typename Tile::Type;

 public:
  using State = typename Tile::State;
  using Sum = typename Tile::Sum;
  static constexpr int C = Tile::kChannels, W = Tile::kSide;
  using Base::Base;

  // J t in `out`, at an evaluation whose unit inputs were kept; `t` is overwritten. The tangents of the units' inputs
  // go to `tangent`, their means to the statistics of `means`.
  FASTODE_DEVICE void push(State& t, Sum& out, int64_t sample, int evaluation, int means, const cuda::Room& room,
                           Slots input, Slots tangent) {
    FASTODE_ROLLED
    for (int u = 0; u < this->branch_.count; ++u) {
      const char* const h = this->place(room, input[u], sample);
      Tile::keep(t, this->place(room, tangent[u], sample));
      block_barrier();
      this->recall_statistics(evaluation, u, sample);
      FASTODE_ROLLED
      for (int i = thread(); i < 2 * C; i += Tile::kThreads) this->memory_.means[kTangent * C + i] = 0;
      block_barrier();
      if (this->branch_.unit[u].norm == kGroupNorm) {
        sum_tangent(t, h);
        this->take_unit_means(u, 2, kTangent, false);
        block_barrier();
      }
      this->keep_rows(means, u, sample, 1, this->memory_.means + kTangent * C);
      put_tangent(u, t, h);
      block_barrier();
      Tile::clear(out);
      Tile::template convolve<false>(out, this->memory_.map, this->memory_.weight(u));
      if (u + 1 < this->branch_.count) Tile::round(t, out);
    }
  }

  // A unit's convolution's input along a tangent in shared memory, where nobody reads.
  FASTODE_DEVICE void revisit_tangent(int u, int64_t sample, int evaluation, int means, const char* input,
                                      const char* tangent) const {
    this->recall_statistics(evaluation, u, sample);
    this->recall_rows(means, u, sample, 1, this->memory_.means + kTangent * C, 1);
    block_barrier();
    FASTODE_ROLLED
    for (int eight = 0; eight < 2; ++eight) {
      FASTODE_ROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        const Pushed made = pushed(u, eight);  // here, for what is kept for all tiles takes registers from the products
        uint32_t h[2], t[2];
        Tile::kept_words(h, input, tile, eight);
        Tile::kept_words(t, tangent, tile, eight);
        FASTODE_UNROLLED
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<uint32_t*>(Tile::word_in(this->memory_.map, tile, eight, half)) = made(h[half], t[half]);
      }
    }
  }

  // The gradient at a point of ⟨bar, f⟩ + factor ⟨e, J t⟩ in `bar`, where a pull-back of e has left `back`. `value`:
  // where the cotangents of the convolutions in the value's stream go. The norms' sums count `weight` times.
  FASTODE_DEVICE void sweep(Sum& bar, float factor, int64_t sample, int evaluation, int means, const cuda::Room& room,
                            Slots input, Slots tangent, Slots back, Slots value, float weight, bool sums) {
    FASTODE_ROLLED
    for (int u = this->branch_.count - 1; u >= 0; --u) {
      const cuda::Unit& unit = this->branch_.unit[u];
      {
        State state;
        Tile::round(state, bar);
        Tile::keep(state, this->place(room, value[u], sample));
        block_barrier();
        Tile::put(this->memory_.map, state);
      }
      this->recall_statistics(evaluation, u, sample);
      this->recall_rows(means, u, sample, 1, this->memory_.means + kTangent * C, 1);
      if (unit.norm == kGroupNorm)
        this->recall_rows(evaluation, u, sample, 1, this->memory_.means + kFound * C, factor);
      block_barrier();
      Tile::clear(bar);
      Tile::template convolve<true>(bar, this->memory_.map, this->memory_.weight(u));
      const Places places{this->place(room, input[u], sample), this->place(room, tangent[u], sample),
                          this->place(room, back[u], sample)};
      pull_both(u, bar, factor, places);
      block_barrier();
      const bool coupled = unit.norm == kGroupNorm;
      if (coupled) this->take_unit_means(u, 3, kPulled);
      if (sums && Base::affine(unit)) add_both(u, weight);
      block_barrier();
      combine(u, bar, factor, places, coupled);
    }
  }

 protected:
  // Rows of Memory::means: of the sums of `pull_both`; what the pull-back of e found, the means of w M and w M n̂; those
  // of the tangent and of it times the normalised map.
  static constexpr int kPulled = 0, kFound = 3, kTangent = 5;

  struct Places {
    const char *h, *t, *back;
  };

  // What is the same for a channel's entries.
  struct Channel {
    float mean, rstd, weight, bias, first, second;  // the last two: means of the tangent

    FASTODE_DEVICE float normal(float h) const { return (h - mean) * rstd; }
    // The tangent of the normalised map, which may be infinite where statistics are given: `second` is zero there.
    FASTODE_DEVICE float pushed(float t, float normal) const {
      return rstd * (t - first - (second == 0 ? 0 : normal * second));
    }
  };

  FASTODE_DEVICE Channel channel_of(int u, int c) const {
    const Memory<Tile>& m = this->memory_;
    return {m.mean[c],
            m.rstd[c],
            m.norm_weight(u)[c],
            m.norm_bias(u)[c],
            m.means[kTangent * C + c],
            m.means[(kTangent + 1) * C + c]};
  }

  static FASTODE_DEVICE float part(uint32_t word, int odd) {
    const Pair pair = T::unpack(word);
    return odd ? pair.high : pair.low;
  }

  // Eight channels of a tile of the three kept maps.
  struct Words {
    FASTODE_DEVICE Words(const Places& places, int tile, int eight) {
      Tile::kept_words(h, places.h, tile, eight);
      Tile::kept_words(t, places.t, tile, eight);
      Tile::kept_words(back, places.back, tile, eight);
    }

    uint32_t h[2], t[2], back[2];
  };

  // One of their four entries: n̂, n, the tangent of n̂, σ′(n) and B.
  struct Entry {
    FASTODE_DEVICE Entry(const Words& words, const Channel& k, const ActivationArguments& act, float factor, int i)
        : normal(k.normal(part(words.h[i / 2], i % 2))),
          n(normal * k.weight + k.bias),
          pushed(k.pushed(part(words.t[i / 2], i % 2), normal)),
          first(derive(act, n)),
          b(factor * part(words.back[i / 2], i % 2)) {}

    float normal, n, pushed, first, b;
  };

  // N of an entry.
  static FASTODE_DEVICE float both(float bar, const Entry& e, const Channel& k, const ActivationArguments& act) {
    const float first = bar * e.first;
    return bends(act) ? first + derive_twice_smooth(act.kind, e.n, act.p, act.q) * k.weight * e.pushed * e.b : first;
  }

  // From N to what `combine` gives; the channel's means lie C apart.
  static FASTODE_DEVICE float combined(float n, const Entry& e, const Channel& k, const float* mean) {
    // P(w M)
    const float pulled = k.rstd * (k.weight * e.first * e.b - mean[kFound * C] - e.normal * mean[(kFound + 1) * C]);
    return k.rstd * (k.weight * n - mean[0] - e.normal * mean[C]) -
           k.rstd * (e.normal * mean[2 * C] + k.second * pulled + mean[(kFound + 1) * C] * e.pushed);
  }

  // The sums of the tangent and of it times the normalised map.
  FASTODE_DEVICE void sum_tangent(const State& t, const char* h) {
    float sums[2][4];
    FASTODE_UNROLLED
    for (int eight = 0; eight < 2; ++eight) {
      const int c = Tile::channel(eight);
      const float mean[2] = {this->memory_.mean[c], this->memory_.mean[c + 1]};
      const float rstd[2] = {this->memory_.rstd[c], this->memory_.rstd[c + 1]};
      FASTODE_UNROLLED
      for (int odd = 0; odd < 2; ++odd) sums[0][2 * eight + odd] = sums[1][2 * eight + odd] = 0;
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        uint32_t words[2];
        Tile::kept_words(words, h, tile, eight);
        FASTODE_UNROLLED
        for (int i = 0; i < 4; ++i) {
          const int half = i / 2, odd = i % 2;
          const float v = part(t.word[tile][eight][half], odd);
          sums[0][2 * eight + odd] += v;
          sums[1][2 * eight + odd] += v * ((part(words[half], odd) - mean[odd]) * rstd[odd]);
        }
      }
    }
    this->leave_partial(sums);
    block_barrier();
  }

  // σ′(n) times the tangent of n, of a word of a unit's input and one of its tangent.
  struct Pushed {
    ActivationArguments act;
    Channel channels[2];

    FASTODE_DEVICE uint32_t operator()(uint32_t h, uint32_t t) const {
      float made[2];
      FASTODE_UNROLLED
      for (int odd = 0; odd < 2; ++odd) {
        const Channel& k = channels[odd];
        const float normal = k.normal(part(h, odd));
        made[odd] = derive(act, normal * k.weight + k.bias) * k.weight * k.pushed(part(t, odd), normal);
      }
      return T::pack(made[0], made[1]);
    }
  };

  FASTODE_DEVICE Pushed pushed(int u, int eight) const {
    const cuda::Unit& unit = this->branch_.unit[u];
    const int c = Tile::channel(eight);
    return {{unit.activation, unit.p, unit.q}, {channel_of(u, c), channel_of(u, c + 1)}};
  }

  FASTODE_DEVICE void put_tangent(int u, const State& t, const char* h) const {
    FASTODE_UNROLLED
    for (int eight = 0; eight < 2; ++eight) {
      const Pushed made = pushed(u, eight);
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        uint32_t words[2];
        Tile::kept_words(words, h, tile, eight);
        FASTODE_UNROLLED
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<uint32_t*>(Tile::word_in(this->memory_.map, tile, eight, half)) =
              made(words[half], t.word[tile][eight][half]);
      }
    }
  }

  // bar becomes N = σ′(n) bar + σ″(n) ṅ B, the cotangent of n. Leaves the sums of N, N n̂ and M times the tangent of n̂,
  // where M = σ′(n) B is the cotangent of ṅ and B = factor · back.
  FASTODE_DEVICE void pull_both(int u, Sum& bar, float factor, const Places& places) {
    const cuda::Unit& unit = this->branch_.unit[u];
    const ActivationArguments act{unit.activation, unit.p, unit.q};
    float sums[3][4];
    FASTODE_UNROLLED
    for (int eight = 0; eight < 2; ++eight) {
      const int c = Tile::channel(eight);
      const Channel channels[2] = {channel_of(u, c), channel_of(u, c + 1)};
      FASTODE_UNROLLED
      for (int i = 0; i < 6; ++i) sums[i / 2][2 * eight + i % 2] = 0;
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        const Words words(places, tile, eight);
        FASTODE_UNROLLED
        for (int i = 0; i < 4; ++i) {
          const int j = 2 * eight + i % 2;
          const Channel& k = channels[i % 2];
          const Entry e(words, k, act, factor, i);
          float& v = bar.value[tile][eight][i];
          v = both(v, e, k, act);
          sums[0][j] += v, sums[1][j] += v * e.normal;
          sums[2][j] += e.first * e.b * e.pushed;
        }
      }
    }
    this->leave_partial(sums);
  }

  FASTODE_DEVICE void add_both(int u, float weight) {
    for (int c = thread(); c < C; c += Tile::kThreads) {
      this->memory_.sums(u)[c] += weight * this->sum_channel(0, c);
      this->memory_.sums(u)[C + c] += weight * (this->sum_channel(1, c) + this->sum_channel(2, c));
    }
  }

  // bar becomes the cotangent of the unit's input, of both streams: P(w N) and the derivative of ⟨w M, P(t)⟩.
  FASTODE_DEVICE void combine(int u, Sum& bar, float factor, const Places& places, bool coupled) {
    const cuda::Unit& unit = this->branch_.unit[u];
    const ActivationArguments act{unit.activation, unit.p, unit.q};
    FASTODE_UNROLLED
    for (int eight = 0; eight < 2; ++eight) {
      const int c = Tile::channel(eight);
      const Channel channels[2] = {channel_of(u, c), channel_of(u, c + 1)};
      if (!coupled) {
        FASTODE_UNROLLED
        for (int tile = 0; tile < Tile::kTiles; ++tile) {
          FASTODE_UNROLLED
          for (int i = 0; i < 4; ++i) bar.value[tile][eight][i] *= channels[i % 2].rstd * channels[i % 2].weight;
        }
        continue;
      }
      const float* means = this->memory_.means;
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        const Words words(places, tile, eight);
        FASTODE_UNROLLED
        for (int i = 0; i < 4; ++i) {
          const Channel& k = channels[i % 2];
          const Entry e(words, k, act, factor, i);
          float& v = bar.value[tile][eight][i];
          v = combined(v, e, k, means + c + i % 2);
        }
      }
    }
  }
};

}  // namespace fastode::device

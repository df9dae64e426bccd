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
        // Here, for what is kept for all tiles takes registers from the products.
        with_activation(this->activation(u), [&](const auto& act) {
          const Channels channels = channels_of(u, eight);
          uint32_t h[2], t[2];
          Tile::kept_words(h, input, tile, eight);
          Tile::kept_words(t, tangent, tile, eight);
          FASTODE_UNROLLED
          for (int half = 0; half < 2; ++half)
            *reinterpret_cast<uint32_t*>(Tile::word_in(this->memory_.map, tile, eight, half)) =
                pushed(channels, act, h[half], t[half]);
        });
      }
    }
  }

  // The gradient at a point of ⟨bar, f⟩ + factor ⟨e, J t⟩ in `bar`, where a pull-back of e has left `back`. The
  // cotangents of the convolutions in the value's stream go to `top`, that of the last one, and where the next unit's
  // `back` has been. The norms' sums count `weight` times.
  FASTODE_DEVICE void sweep(Sum& bar, float factor, int64_t sample, int evaluation, int means, const cuda::Room& room,
                            Slots input, Slots tangent, Slots back, int top, float weight, bool sums) {
    FASTODE_ROLLED
    for (int u = this->branch_.count - 1; u >= 0; --u) {
      const cuda::Unit& unit = this->branch_.unit[u];
      {
        State state;
        Tile::round(state, bar);
        Tile::keep(state, this->place(room, u + 1 < this->branch_.count ? back[u + 1] : top, sample));
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

  // Of a word's two.
  struct Channels {
    Channel of[2];
  };

  FASTODE_DEVICE Channels channels_of(int u, int eight) const {
    const int c = Tile::channel(eight);
    return {{channel_of(u, c), channel_of(u, c + 1)}};
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

  // Those of one of their pixels, of two channels: n̂, n, the tangent of n̂, σ′(n) and B.
  struct Entries {
    template <class Activation>
    FASTODE_DEVICE Entries(const Words& words, const Channels& k, const Activation& act, float factor, int half) {
      FASTODE_UNROLLED
      for (int odd = 0; odd < 2; ++odd) {
        normal[odd] = k.of[odd].normal(part<T>(words.h[half], odd));
        n[odd] = normal[odd] * k.of[odd].weight + k.of[odd].bias;
        pushed[odd] = k.of[odd].pushed(part<T>(words.t[half], odd), normal[odd]);
        b[odd] = factor * part<T>(words.back[half], odd);
      }
      const Pair slope = act.derive({n[0], n[1]});
      first[0] = slope.low, first[1] = slope.high;
    }

    float normal[2], n[2], pushed[2], first[2], b[2];
  };

  // The two entries of bar become N.
  template <class Activation>
  static FASTODE_DEVICE void both(float* bar, const Entries& e, const Channels& k, const Activation& act) {
    FASTODE_UNROLLED
    for (int odd = 0; odd < 2; ++odd) bar[odd] *= e.first[odd];
    if constexpr (Activation::kBends) {  // else 0 times what is infinite would be NaN
      const Pair bend = act.derive_twice({e.n[0], e.n[1]});
      bar[0] += bend.low * k.of[0].weight * e.pushed[0] * e.b[0];
      bar[1] += bend.high * k.of[1].weight * e.pushed[1] * e.b[1];
    }
  }

  // From N to what `combine` gives; the channel's means lie C apart.
  static FASTODE_DEVICE float combined(float n, const Entries& e, const Channels& channels, int odd,
                                       const float* mean) {
    const Channel& k = channels.of[odd];
    // P(w M)
    const float pulled =
        k.rstd * (k.weight * e.first[odd] * e.b[odd] - mean[kFound * C] - e.normal[odd] * mean[(kFound + 1) * C]);
    return k.rstd * (k.weight * n - mean[0] - e.normal[odd] * mean[C]) -
           k.rstd * (e.normal[odd] * mean[2 * C] + k.second * pulled + mean[(kFound + 1) * C] * e.pushed[odd]);
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
          const float v = part<T>(t.word[tile][eight][half], odd);
          sums[0][2 * eight + odd] += v;
          sums[1][2 * eight + odd] += v * ((part<T>(words[half], odd) - mean[odd]) * rstd[odd]);
        }
      }
    }
    this->leave_partial(sums);
    block_barrier();
  }

  // σ′(n) times the tangent of n, of a word of a unit's input and one of its tangent.
  template <class Activation>
  static FASTODE_DEVICE uint32_t pushed(const Channels& k, const Activation& act, uint32_t h, uint32_t t) {
    float normal[2], n[2];
    FASTODE_UNROLLED
    for (int odd = 0; odd < 2; ++odd) {
      normal[odd] = k.of[odd].normal(part<T>(h, odd));
      n[odd] = normal[odd] * k.of[odd].weight + k.of[odd].bias;
    }
    const Pair slope = act.derive({n[0], n[1]});
    return T::pack(slope.low * k.of[0].weight * k.of[0].pushed(part<T>(t, 0), normal[0]),
                   slope.high * k.of[1].weight * k.of[1].pushed(part<T>(t, 1), normal[1]));
  }

  FASTODE_DEVICE void put_tangent(int u, const State& t, const char* h) const {
    with_activation(this->activation(anew(u)), [&](const auto& act) {
      FASTODE_UNROLLED
      for (int eight = 0; eight < 2; ++eight) {
        const Channels channels = channels_of(u, eight);
        FASTODE_UNROLLED
        for (int tile = 0; tile < Tile::kTiles; ++tile) {
          uint32_t words[2];
          Tile::kept_words(words, h, tile, eight);
          FASTODE_UNROLLED
          for (int half = 0; half < 2; ++half)
            *reinterpret_cast<uint32_t*>(Tile::word_in(this->memory_.map, tile, eight, half)) =
                pushed(channels, act, words[half], t.word[tile][eight][half]);
        }
      }
    });
  }

  // bar becomes N = σ′(n) bar + σ″(n) ṅ B, the cotangent of n. Leaves the sums of N, N n̂ and M times the tangent of n̂,
  // where M = σ′(n) B is the cotangent of ṅ and B = factor · back.
  FASTODE_DEVICE void pull_both(int u, Sum& bar, float factor, const Places& places) {
    float sums[3][4];
    with_activation(this->activation(anew(u)), [&](const auto& act) {
      FASTODE_UNROLLED
      for (int eight = 0; eight < 2; ++eight) {
        const Channels channels = channels_of(u, eight);
        FASTODE_UNROLLED
        for (int i = 0; i < 6; ++i) sums[i / 2][2 * eight + i % 2] = 0;
        FASTODE_UNROLLED
        for (int tile = 0; tile < Tile::kTiles; ++tile) {
          const Words words(places, tile, eight);
          FASTODE_UNROLLED
          for (int half = 0; half < 2; ++half) {
            const Entries e(words, channels, act, factor, half);
            float* const v = &bar.value[tile][eight][2 * half];
            both(v, e, channels, act);
            FASTODE_UNROLLED
            for (int odd = 0; odd < 2; ++odd) {
              const int j = 2 * eight + odd;
              sums[0][j] += v[odd], sums[1][j] += v[odd] * e.normal[odd];
              sums[2][j] += e.first[odd] * e.b[odd] * e.pushed[odd];
            }
          }
        }
      }
    });
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
    if (!coupled) return scale_channels(u, bar);
    with_activation(this->activation(anew(u)), [&](const auto& act) {
      FASTODE_UNROLLED
      for (int eight = 0; eight < 2; ++eight) {
        const Channels channels = channels_of(u, eight);
        const float* const means = this->memory_.means + Tile::channel(eight);
        FASTODE_UNROLLED
        for (int tile = 0; tile < Tile::kTiles; ++tile) {
          const Words words(places, tile, eight);
          FASTODE_UNROLLED
          for (int half = 0; half < 2; ++half) {
            const Entries e(words, channels, act, factor, half);
            FASTODE_UNROLLED
            for (int odd = 0; odd < 2; ++odd) {
              float& v = bar.value[tile][eight][2 * half + odd];
              v = combined(v, e, channels, odd, means + odd);
            }
          }
        }
      }
    });
  }

  // P(w N) of a norm whose statistics are given.
  FASTODE_DEVICE void scale_channels(int u, Sum& bar) const {
    FASTODE_UNROLLED
    for (int eight = 0; eight < 2; ++eight) {
      const int c = Tile::channel(eight);
      const float *rstd = this->memory_.rstd + c, *weight = this->memory_.norm_weight(u) + c;
      const float factor[2] = {rstd[0] * weight[0], rstd[1] * weight[1]};
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        FASTODE_UNROLLED
        for (int i = 0; i < 4; ++i) bar.value[tile][eight][i] *= factor[i % 2];
      }
    }
  }
};

}  // namespace fastode::device

// The derivative of a pull-back of a branch with batch norms in training: second.cuh's two sweeps, cut where all blocks
// meet.
#pragma once

#include "batch.cuh"
#include "second.cuh"

namespace fastode::device {

template <class Tile>
class BatchSecond : public Batch<Tile, Second<Tile>> {
  using Base = Batch<Tile, Second<Tile>>;

 public:
  using State = typename Tile::State;
  using Sum = typename Tile::Sum;
  static constexpr int C = Tile::kChannels;
  using Base::Base;

  // J t, as Second::push has it: enter(sample, t) makes t, leave(sample, J t) takes the result.
  template <class Enter, class Leave>
  FASTODE_DEVICE void push(int evaluation, int means, const cuda::Room& room, Slots input, Slots tangent,
                           const Enter& enter, const Leave& leave) {
    this->each([&](int n) {
      State t;
      enter(n, t);
      offer_tangent(0, t, n, evaluation, room, input, tangent);
    });
    FASTODE_ROLLED
    for (int u = 0; u < this->branch_.count; ++u) {
      measure_tangent(u, means);
      this->each([&](int n) {
        State t;
        Sum out;
        Tile::recall(t, this->place(room, tangent[u], n));
        block_barrier();  // unseen: of the sample before it the numbers are the same
        this->recall_statistics(evaluation, u, n);
        block_barrier();
        this->put_tangent(u, t, this->place(room, input[u], n));
        block_barrier();
        Tile::clear(out);
        Tile::template convolve<false>(out, this->memory_.map, this->memory_.weight(u));
        if (u + 1 == this->branch_.count) return leave(n, out);
        Tile::round(t, out);
        offer_tangent(u + 1, t, n, evaluation, room, input, tangent);
      });
    }
  }

  // What Second::sweep gives: enter(sample, bar) makes bar, leave(sample, gradient) takes the result. `waiting`: a
  // place for cotangents that wait for the other samples.
  template <class Enter, class Leave>
  FASTODE_DEVICE void sweep(float factor, int evaluation, int means, const cuda::Room& room, Slots input, Slots tangent,
                            Slots back, Slots value, int top, int waiting, float weight, bool sums, const Enter& enter,
                            const Leave& leave) {
    const int count = this->branch_.count;
    FASTODE_ROLLED
    for (int u = count - 1; u >= -1; --u) {
      this->each([&](int n) {
        Sum bar;
        char* const at = this->place(room, waiting, n);
        if (u + 1 == count)
          enter(n, bar);
        else
          sweep_unit(u + 1, bar, factor, n, evaluation, means,
                     places(room, n, input[u + 1], tangent[u + 1], back[u + 1]), at);
        if (u < 0) return leave(n, bar);
        sweep_convolution(u, bar, factor, n, evaluation, means, room, places(room, n, input[u], tangent[u], back[u]),
                          u + 1 < count ? value[u] : top, at);
        if (this->is_batch(u)) this->template leave_sums<3>(n);
        if (sums && this->affine(this->branch_.unit[u])) this->add_both(u, weight);
      });
      if (u >= 0 && this->is_batch(u)) this->template take_sums<3>(u, kPulled, true, -1);
    }
  }

  // Lets a sweep at an evaluation be a pull-back of the value alone: there is no tangent, in all maps of which `zero`
  // stands, and nothing was found of it.
  FASTODE_DEVICE void no_tangent(int evaluation, const cuda::Room& room, int zero) {
    this->each([&](int n) {
      State state;
      Tile::clear(state);
      Tile::keep(state, this->place(room, zero, n));
    });
    FASTODE_ROLLED
    for (int u = 0; u < this->branch_.count; ++u) keep_none(u, evaluation);
  }

 private:
  using Base::kFound;
  using Base::kPulled;
  using Base::kTangent;
  using Places = typename Base::Places;

  // Zeros in the second rows.
  FASTODE_DEVICE void keep_none(int u, int evaluation) const {
    FASTODE_ROLLED
    for (int i = thread(); i < 2 * C; i += Tile::kThreads)
      this->each([&](int n) { this->statistics(evaluation, u, n)[2 * C + i] = 0; });
  }

  // The means of a unit's input's tangent.
  FASTODE_DEVICE void measure_tangent(int u, int means) {
    if (this->is_batch(u)) return this->template take_sums<2>(u, kTangent, false, means);
    FASTODE_ROLLED
    for (int i = thread(); i < 2 * C; i += Tile::kThreads) this->memory_.means[kTangent * C + i] = 0;
    keep_none(u, means);
  }

  static FASTODE_DEVICE Places places(const cuda::Room& room, int64_t sample, int input, int tangent, int back) {
    return {Base::place(room, input, sample), Base::place(room, tangent, sample), Base::place(room, back, sample)};
  }

  // Keeps the tangent of a unit's input, and leaves its sums.
  FASTODE_DEVICE void offer_tangent(int u, const State& t, int64_t sample, int evaluation, const cuda::Room& room,
                                    Slots input, Slots tangent) {
    Tile::keep(t, this->place(room, tangent[u], sample));
    if (!this->is_batch(u)) return;
    block_barrier();
    this->recall_statistics(evaluation, u, sample);
    block_barrier();
    this->sum_tangent(t, this->place(room, input[u], sample));
    this->template leave_sums<2>(sample);
  }

  FASTODE_DEVICE void recall_both(int u, int64_t sample, int evaluation, int means) const {
    this->recall_statistics(evaluation, u, sample);
    this->recall_rows(means, u, sample, 1, this->memory_.means + kTangent * C, 1);
  }

  // From the cotangent of a convolution's result to the sums of the norm's, of both streams.
  FASTODE_DEVICE void sweep_convolution(int u, Sum& bar, float factor, int64_t sample, int evaluation, int means,
                                        const cuda::Room& room, const Places& places, int value, char* waiting) {
    {
      State state;
      Tile::round(state, bar);
      if (value >= 0) Tile::keep(state, this->place(room, value, sample));
      block_barrier();
      Tile::put(this->memory_.map, state);
    }
    recall_both(u, sample, evaluation, means);
    block_barrier();
    Tile::clear(bar);
    Tile::template convolve<true>(bar, this->memory_.map, this->memory_.weight(u));
    {
      State state;
      Tile::round(state, bar);
      Tile::keep(state, waiting);
      this->widen(bar, state);
    }
    this->pull_both(u, bar, factor, places);
    block_barrier();
  }

  // From there through the activation, again, and the norm, whose means are in the first rows of Memory::means.
  FASTODE_DEVICE void sweep_unit(int u, Sum& bar, float factor, int64_t sample, int evaluation, int means,
                                 const Places& places, const char* waiting) {
    const bool coupled = this->is_batch(u);
    block_barrier();  // unseen: of the sample before it the numbers are the same
    recall_both(u, sample, evaluation, means);
    if (coupled) this->recall_rows(evaluation, u, sample, 1, this->memory_.means + kFound * C, factor);
    block_barrier();
    with_activation(this->activation(u), [&](const auto& act) {
      FASTODE_UNROLLED
      for (int eight = 0; eight < 2; ++eight) {
        const typename Base::Channels channels = this->channels_of(u, eight);
        const float* const mean = this->memory_.means + Tile::channel(eight);
        FASTODE_UNROLLED
        for (int tile = 0; tile < Tile::kTiles; ++tile) {
          const typename Base::Words words(places, tile, eight);
          uint32_t found[2];
          Tile::kept_words(found, waiting, tile, eight);
          FASTODE_UNROLLED
          for (int half = 0; half < 2; ++half) {
            const typename Base::Entries e(words, channels, act, factor, half);
            float* const v = &bar.value[tile][eight][2 * half];
            FASTODE_UNROLLED
            for (int odd = 0; odd < 2; ++odd) v[odd] = part<typename Tile::Type>(found[half], odd);
            Base::both(v, e, channels, act);
            if (!coupled) continue;
            FASTODE_UNROLLED
            for (int odd = 0; odd < 2; ++odd) v[odd] = this->combined(v[odd], e, channels, odd, mean + odd);
          }
        }
      }
    });
    if (!coupled) this->scale_channels(u, bar);
  }
};

}  // namespace fastode::device

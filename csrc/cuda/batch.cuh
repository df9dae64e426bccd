// A branch with batch norms in training, for a grid whose blocks are all there at once.
//
// A batch norm couples the samples, so a sweep is cut into parts: within one a block takes each of its samples in turn,
// and leaves sums of it in memory; then all blocks meet, and each adds up those of all samples, in the samples' order.
// Between parts a map waits in memory in the order of threads, where each thread reads what it has written. Other norms
// of such a branch have given statistics, or there is none.
#pragma once

#include "second.cuh"

namespace fastode::device {

template <class Tile>
class Batch : public Second<Tile> {
  using Base = Second<Tile>;

 public:
  using State = typename Tile::State;
  using Sum = typename Tile::Sum;
  static constexpr int C = Tile::kChannels, W = Tile::kSide;
  using Base::Base;

  // Calls f(sample) for each sample of the block.
  template <class F>
  FASTODE_DEVICE void each(const F& f) const {
    FASTODE_ROLLED
    for (int n = block(); n < this->samples_; n += blocks()) f(n);
  }

  // Leaves the moments of a unit's input to be.
  FASTODE_DEVICE void offer(int u, const State& state, int64_t sample) const {
    if (!is_batch(u)) return;
    block_barrier();  // whoever still reads those of a sample before
    this->leave_moments(state);
    constexpr float entries = W * W / Tile::kDown;  // of a part
    const float* const parts = this->memory_.partial;
    for (int c = thread(); c < C; c += Tile::kThreads) {
      const float mean = this->sum_channel(0, c) / Tile::kDown;
      float squares = this->sum_channel(1, c);
      for (int i = 0; i < Tile::kDown; ++i) {
        const float apart = parts[i * C + c] - mean;
        squares += apart * apart * entries;
      }
      row(sample)[c] = mean, row(sample)[C + c] = squares;
    }
  }

  // f at points whose places are the first of `input` and whose moments were offered: leave(sample, f(point)).
  template <class Leave>
  FASTODE_DEVICE void value(int evaluation, const cuda::Room& room, Slots input, const Leave& leave) {
    FASTODE_ROLLED
    for (int u = 0; u < this->branch_.count; ++u) {
      measure(evaluation, u);
      each([&](int n) {
        State state;
        Sum out;
        Tile::recall(state, this->place(room, input[u], n));
        block_barrier();
        if (this->branch_.statistics) this->keep_rows(evaluation, u, n, 0, this->memory_.mean);
        this->put_normalised(u, this->memory_.mean, state);
        block_barrier();
        Tile::clear(out);
        Tile::template convolve<false>(out, this->memory_.map, this->memory_.weight(u));
        this->add_bias(out, this->memory_.bias(u));
        if (u + 1 == this->branch_.count) return leave(n, out);
        Tile::round(state, out);
        Tile::keep(state, this->place(room, input[u + 1], n));
        offer(u + 1, state, n);
      });
    }
  }

  // Jᵀ bar at an evaluation that was kept: enter(sample, bar) makes bar, leave(sample, Jᵀ bar) takes the result. Places
  // of `left.back` may be the same for all units. Not `through`: the result is bar itself.
  template <class Enter, class Leave>
  FASTODE_DEVICE void pull(int evaluation, const cuda::Room& room, Slots input, const Left& left, bool through,
                           const Enter& enter, const Leave& leave) {
    const int count = this->branch_.count;
    FASTODE_ROLLED
    for (int u = through ? count - 1 : -1; u >= -1; --u) {
      each([&](int n) {
        Sum bar;
        if (u + 1 == count || !through)
          enter(n, bar);
        else
          pull_unit(u + 1, n, evaluation, this->place(room, input[u + 1], n), this->place(room, left.back[u + 1], n),
                    bar);
        if (u < 0) return leave(n, bar);
        pull_convolution(u, n, evaluation, room, input, left, bar);
      });
      if (u >= 0 && is_batch(u)) take_sums<2>(u, 0, true, evaluation);
    }
  }

  // J t, as Second::push has it: enter(sample, t) makes t, leave(sample, J t) takes the result.
  template <class Enter, class Leave>
  FASTODE_DEVICE void push(int evaluation, int means, const cuda::Room& room, Slots input, Slots tangent,
                           const Enter& enter, const Leave& leave) {
    each([&](int n) {
      State t;
      enter(n, t);
      offer_tangent(0, t, n, evaluation, room, input, tangent);
    });
    FASTODE_ROLLED
    for (int u = 0; u < this->branch_.count; ++u) {
      if (is_batch(u)) {
        take_sums<2>(u, kTangent, false, means);
      } else {
        for (int i = thread(); i < 2 * C; i += Tile::kThreads) this->memory_.means[kTangent * C + i] = 0;
        keep_none(u, means);
      }
      each([&](int n) {
        State t;
        Sum out;
        Tile::recall(t, this->place(room, tangent[u], n));
        this->recall_statistics(evaluation, u, n);  // nobody reads another unit's any more
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
                            Slots back, Slots value, int waiting, float weight, bool sums, const Enter& enter,
                            const Leave& leave) {
    const int count = this->branch_.count;
    FASTODE_ROLLED
    for (int u = count - 1; u >= -1; --u) {
      each([&](int n) {
        Sum bar;
        char* const at = this->place(room, waiting, n);
        if (u + 1 == count)
          enter(n, bar);
        else
          sweep_unit(u + 1, bar, factor, n, evaluation, means,
                     places(room, n, input[u + 1], tangent[u + 1], back[u + 1]), at);
        if (u < 0) return leave(n, bar);
        sweep_convolution(u, bar, factor, n, evaluation, means, room, places(room, n, input[u], tangent[u], back[u]),
                          value[u], at);
        if (is_batch(u)) leave_sums<3>(n);
        if (sums && this->affine(this->branch_.unit[u])) this->add_both(u, weight);
      });
      if (u >= 0 && is_batch(u)) take_sums<3>(u, kPulled, true, -1);
    }
  }

  // Lets a sweep at an evaluation be a pull-back of the value alone: there is no tangent, in all maps of which `zero`
  // stands, and nothing was found of it.
  FASTODE_DEVICE void no_tangent(int evaluation, const cuda::Room& room, int zero) {
    each([&](int n) {
      State state;
      Tile::clear(state);
      Tile::keep(state, this->place(room, zero, n));
    });
    for (int u = 0; u < this->branch_.count; ++u) keep_none(u, evaluation);
  }

 protected:
  using Base::kFound;
  using Base::kPulled;
  using Base::kTangent;
  using Places = typename Base::Places;
  using Channel = typename Base::Channel;

  FASTODE_DEVICE bool is_batch(int u) const { return this->branch_.unit[u].norm == kBatchNorm; }

  // The sums of a sample that are exchanged at the next meeting. Two meetings' lie apart: a block may leave those of
  // the second while another still reads those of the first.
  FASTODE_DEVICE float* row(int64_t sample) const {
    return this->branch_.exchange + (turn_ * static_cast<int64_t>(this->samples_) + sample) * cuda::kMostSums * C;
  }

  // Of f(row, kind) the sums over all samples for channel thread() % C, in the same order in every block.
  template <int kinds, class F>
  FASTODE_DEVICE void over_samples(float (&totals)[kinds], const F& f) const {
    constexpr int kParts = Tile::kThreads / C;
    static_assert(kParts <= cuda::kMostSums * Tile::kDown);
    const int c = thread() % C, part = thread() / C;
    for (float& total : totals) total = 0;
    for (int n = part; n < this->samples_; n += kParts) {
      FASTODE_UNROLLED
      for (int kind = 0; kind < kinds; ++kind) totals[kind] += f(row(n) + c, kind);
    }
    FASTODE_UNROLLED
    for (int kind = 0; kind < kinds; ++kind) {
      block_barrier();
      this->memory_.partial[part * C + c] = totals[kind];
      block_barrier();
      totals[kind] = 0;
      for (int i = 0; i < kParts; ++i) totals[kind] += this->memory_.partial[i * C + c];
    }
  }

  // Those of a norm with given statistics, or of none.
  FASTODE_DEVICE void take_given(const cuda::Unit& unit) const {
    block_barrier();  // unseen: whoever still reads the norm before it finds the same numbers
    for (int c = thread(); c < C; c += Tile::kThreads) {
      const bool fixed = unit.norm == kFixedNorm;
      this->memory_.mean[c] = fixed ? Base::number(unit.mean, c, 0) : 0;
      this->memory_.rstd[c] = fixed ? rsqrt(Base::number(unit.variance, c, 0) + unit.eps) : 1;
    }
    block_barrier();
  }

  // Mean and rstd of a unit's norm, which all threads read after another barrier.
  FASTODE_DEVICE void measure(int evaluation, int u) {
    if (!is_batch(u)) return take_given(this->branch_.unit[u]);
    grid_barrier();
    const float samples = this->samples_;
    float mean[1], variance[1];
    over_samples(mean, [](const float* at, int) { return at[0]; });
    mean[0] /= samples;
    over_samples(variance, [&](const float* at, int) {
      const float apart = at[0] - mean[0];
      return at[C] + apart * apart * (W * W);
    });
    variance[0] /= samples * (W * W);
    if (thread() < C) {
      this->memory_.mean[thread()] = mean[0];
      this->memory_.rstd[thread()] = rsqrt(variance[0] + this->branch_.unit[u].eps);
      if (block() == 0 && this->branch_.measured) {
        float* const to = measured(evaluation, u) + thread();
        to[0] = mean[0], to[C] = variance[0];
      }
    }
    turn_ = 1 - turn_;
  }

  FASTODE_DEVICE float* measured(int evaluation, int u) const {
    int before = 0, norms = 0;
    for (int i = 0; i < this->branch_.count; ++i) before += i < u && is_batch(i), norms += is_batch(i);
    return this->branch_.measured + (evaluation * norms + before) * 2 * C;
  }

  // The means of what samples have left, to Memory::means from row `at` on, which all threads read after another
  // barrier, and to the second rows of an evaluation's statistics. -1: of none.
  template <int kinds>
  FASTODE_DEVICE void take_sums(int u, int at, bool weighted, int evaluation) {
    grid_barrier();
    float totals[kinds];
    over_samples(totals, [](const float* from, int kind) { return from[kind * C]; });
    turn_ = 1 - turn_;
    const int c = thread();
    if (c >= C) return;
    const float weight = weighted ? this->memory_.norm_weight(u)[c] : 1;
    FASTODE_UNROLLED
    for (int kind = 0; kind < kinds; ++kind) {
      const float mean = weight * totals[kind] / (static_cast<float>(this->samples_) * (W * W));
      this->memory_.means[(at + kind) * C + c] = mean;
      if (evaluation >= 0) each([&](int n) { this->statistics(evaluation, u, n)[(2 + kind) * C + c] = mean; });
    }
  }

  // Zeros in the second rows.
  FASTODE_DEVICE void keep_none(int u, int evaluation) const {
    for (int i = thread(); i < 2 * C; i += Tile::kThreads)
      each([&](int n) { this->statistics(evaluation, u, n)[2 * C + i] = 0; });
  }

  // Leaves what the warps have summed.
  template <int kinds>
  FASTODE_DEVICE void leave_sums(int64_t sample) const {
    for (int c = thread(); c < C; c += Tile::kThreads) {
      FASTODE_UNROLLED
      for (int kind = 0; kind < kinds; ++kind) row(sample)[kind * C + c] = this->sum_channel(kind, c);
    }
  }

  // A map as a sum, of what will be found in memory.
  static FASTODE_DEVICE void widen(Sum& sum, const State& state) {
    Tile::clear(sum);
    Tile::add(sum, 1, state);
  }

  // From a convolution's cotangent to its input's, which waits at `left.back`, and the sums of the norm's.
  FASTODE_DEVICE void pull_convolution(int u, int64_t sample, int evaluation, const cuda::Room& room, Slots input,
                                       const Left& left, Sum& bar) {
    State state;
    Tile::round(state, bar);
    if (left.cotangent[u] >= 0) Tile::keep(state, this->place(room, left.cotangent[u], sample));
    block_barrier();
    Tile::put(this->memory_.map, state);
    this->recall_statistics(evaluation, u, sample);
    block_barrier();
    Tile::clear(bar);
    Tile::template convolve<true>(bar, this->memory_.map, this->memory_.weight(u));
    Tile::round(state, bar);
    Tile::keep(state, this->place(room, left.back[u], sample));
    const bool wanted = left.sums && this->affine(this->branch_.unit[u]);
    if (!is_batch(u) && !wanted) return;
    widen(bar, state);
    Tile::recall(state, this->place(room, input[u], sample));
    this->pull_activation(u, state, bar);
    this->sum_channels(state, bar);
    if (is_batch(u)) leave_sums<2>(sample);
    if (wanted) this->add_sums(u);
  }

  // From there through the activation, again, and the norm, whose means are in the first rows of Memory::means.
  FASTODE_DEVICE void pull_unit(int u, int64_t sample, int evaluation, const char* input, const char* back, Sum& bar) {
    this->recall_statistics(evaluation, u, sample);  // nobody reads another unit's any more
    block_barrier();
    State state;
    Tile::recall(state, back);
    widen(bar, state);
    Tile::recall(state, input);
    this->pull_activation(u, state, bar);
    this->pull_norm(u, state, bar, is_batch(u));
  }

  static FASTODE_DEVICE Places places(const cuda::Room& room, int64_t sample, int input, int tangent, int back) {
    return {Base::place(room, input, sample), Base::place(room, tangent, sample), Base::place(room, back, sample)};
  }

  // Keeps the tangent of a unit's input, and leaves its sums.
  FASTODE_DEVICE void offer_tangent(int u, const State& t, int64_t sample, int evaluation, const cuda::Room& room,
                                    Slots input, Slots tangent) {
    Tile::keep(t, this->place(room, tangent[u], sample));
    if (!is_batch(u)) return;
    block_barrier();
    this->recall_statistics(evaluation, u, sample);
    block_barrier();
    this->sum_tangent(t, this->place(room, input[u], sample));
    leave_sums<2>(sample);
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
      widen(bar, state);
    }
    this->pull_both(u, bar, factor, places);
    block_barrier();
  }

  // From there through the activation, again, and the norm, whose means are in the first rows of Memory::means.
  FASTODE_DEVICE void sweep_unit(int u, Sum& bar, float factor, int64_t sample, int evaluation, int means,
                                 const Places& places, const char* waiting) {
    const cuda::Unit& unit = this->branch_.unit[u];
    const bool coupled = is_batch(u);
    recall_both(u, sample, evaluation, means);  // nobody reads another unit's any more
    if (coupled) this->recall_rows(evaluation, u, sample, 1, this->memory_.means + kFound * C, factor);
    block_barrier();
    const ActivationArguments act{unit.activation, unit.p, unit.q};
    FASTODE_UNROLLED
    for (int eight = 0; eight < 2; ++eight) {
      const int c = Tile::channel(eight);
      const Channel channels[2] = {this->channel_of(u, c), this->channel_of(u, c + 1)};
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        const typename Base::Words words(places, tile, eight);
        uint32_t found[2];
        Tile::kept_words(found, waiting, tile, eight);
        FASTODE_UNROLLED
        for (int i = 0; i < 4; ++i) {
          const Channel& k = channels[i % 2];
          const typename Base::Entry e(words, k, act, factor, i);
          const float n = Base::both(Base::part(found[i / 2], i % 2), e, k, act);
          bar.value[tile][eight][i] =
              coupled ? this->combined(n, e, k, this->memory_.means + c + i % 2) : k.rstd * k.weight * n;
        }
      }
    }
  }

  int turn_ = 0;
};

}  // namespace fastode::device

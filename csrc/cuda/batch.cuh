// A branch with batch norms in training, for a grid whose blocks are all there at once.
//
// A batch norm couples the samples, so a sweep is cut into parts: within one a block takes each of its samples in turn,
// and leaves sums of it in memory; then all blocks meet, and each adds up those of all samples, in the samples' order.
// Between parts a map waits in memory in the order of threads, where each thread reads what it has written. Other norms
// of such a branch have given statistics, or there is none.
#pragma once

#include "branch.cuh"
#include "grid.cuh"

namespace fastode::device {

template <class Tile, class Base = Branch<Tile>>
class Batch : public Base {
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
    FASTODE_ROLLED
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

  // After fix_statistics: f at points whose places are the first of `input` and whose moments were offered:
  // leave(sample, f(point)).
  template <class Leave>
  FASTODE_DEVICE void value(int evaluation, const cuda::Room& room, Slots input, const Leave& leave) {
    FASTODE_ROLLED
    for (int u = 0; u < this->branch_.count; ++u) {
      const float* const found = is_batch(u) ? this->memory_.mean : this->memory_.sums(u);
      measure(evaluation, u);
      each([&](int n) {
        State state;
        Sum out;
        Tile::recall(state, this->place(room, input[u], n));
        block_barrier();
        if (this->branch_.statistics) this->keep_rows(evaluation, u, n, 0, found);
        this->put_normalised(u, found, state);
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
      const bool begins = u + 1 == count || !through;
      if (!begins && is_batch(u + 1)) take_sums<2>(u + 1, 0, true, evaluation);
      each([&](int n) {
        Sum bar;
        if (begins)
          enter(n, bar);
        else
          pull_unit(u + 1, n, evaluation, this->place(room, input[u + 1], n), this->place(room, left.back[u + 1], n),
                    bar);
        if (u < 0) return leave(n, bar);
        pull_convolution(u, n, evaluation, room, input, left, bar);
      });
    }
  }

 protected:
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
    const int own = anew(thread()), c = own % C, part = own / C;
    for (float& total : totals) total = 0;
    FASTODE_UNROLLED_8
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

  // Mean and rstd of a unit's norm, which all threads read after another barrier.
  FASTODE_DEVICE void measure(int evaluation, int u) {
    if (!is_batch(u)) return;  // Branch::fix_statistics has put them elsewhere
    grid_barrier();
    const float samples = this->samples_;
    float totals[2], apart[1];
    over_samples(totals, [](const float* at, int kind) { return at[kind * C]; });
    const float mean = totals[0] / samples;
    over_samples(apart, [&](const float* at, int) { return (at[0] - mean) * (at[0] - mean); });
    const float variance = (totals[1] + apart[0] * (W * W)) / (samples * (W * W));
    if (thread() < C) {
      this->memory_.mean[thread()] = mean;
      this->memory_.rstd[thread()] = rsqrt(variance + this->branch_.unit[u].eps);
      if (block() == 0 && this->branch_.measured) {
        float* const to = measured(evaluation, u) + thread();
        to[0] = mean, to[C] = variance;
      }
    }
    turn_ = 1 - turn_;
  }

  FASTODE_DEVICE float* measured(int evaluation, int u) const {
    int before = 0, norms = 0;
    FASTODE_ROLLED
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
    const int c = anew(thread());
    if (c >= C) return;
    const float weight = weighted ? this->memory_.norm_weight(u)[c] : 1;
    FASTODE_UNROLLED
    for (int kind = 0; kind < kinds; ++kind) {
      const float mean = weight * totals[kind] / (static_cast<float>(this->samples_) * (W * W));
      this->memory_.means[(at + kind) * C + c] = mean;
      if (evaluation >= 0) each([&](int n) { this->statistics(evaluation, u, n)[(2 + kind) * C + c] = mean; });
    }
  }

  // Leaves what the warps have summed.
  template <int kinds>
  FASTODE_DEVICE void leave_sums(int64_t sample) const {
    FASTODE_ROLLED
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
    this->sum_channels(state, bar, this->memory_.mean);
    if (is_batch(u)) leave_sums<2>(sample);
    if (wanted) this->add_sums(u);
  }

  // From there through the activation, again, and the norm, whose means are in the first rows of Memory::means.
  FASTODE_DEVICE void pull_unit(int u, int64_t sample, int evaluation, const char* input, const char* back, Sum& bar) {
    block_barrier();  // unseen: of the sample before it the numbers are the same
    this->recall_statistics(evaluation, u, sample);
    block_barrier();
    State state;
    Tile::recall(state, back);
    widen(bar, state);
    Tile::recall(state, input);
    this->pull_activation(u, state, bar);
    this->pull_norm(u, state, bar, this->memory_.mean, is_batch(u));
  }

  int turn_ = 0;
};

}  // namespace fastode::device

// Passes over a channels-last sample: [pixels, channels] seen as one flat array with per-channel coefficients.
//
// A coefficient array is repeated until its length (the period) is a multiple of the vector width, so a sample of
// any channel count is swept by whole vectors; what is left at the end is swept by scalars.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"
#include "simd.h"

namespace fastode {

template <class A>
constexpr int64_t period_of(int64_t channels) {
  return channels % kLanes<A> == 0 ? channels : channels * kLanes<A>;
}

// Calls f.template operator()<V>(i, j): i is the place in the sample, j the place in the period.
template <class A, class F>
inline void sweep(int64_t length, int64_t period, const F& f) {
  constexpr int lanes = kLanes<A>;
  int64_t base = 0;
  for (; base + period <= length; base += period)
    for (int64_t j = 0; j < period; j += lanes) f.template operator()<Vec<A>>(base + j, j);
  int64_t j = 0;
  for (; base + j + lanes <= length; j += lanes) f.template operator()<Vec<A>>(base + j, j);
  for (; base + j < length; ++j) f.template operator()<A>(base + j, j);
}

// out[s * channels + c] = sum over the pixels of term s; f.template operator()<V>(i, j, V* terms) ADDS its `count`
// terms.
template <int count, class A, class F>
inline void reduce(int64_t length, int64_t channels, const F& f, A* out) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>, unroll = count > 3 ? 2 : 4;
  const int64_t period = period_of<A>(channels);
  std::fill(out, out + count * channels, A(0));
  const int64_t whole = length / period * period;
  for (int64_t j = 0; j < period && whole > 0; j += lanes) {
    V sums[unroll][count] = {};
    int64_t base = j;
    for (; base + (unroll - 1) * period < whole; base += unroll * period) {
      FASTODE_UNROLL for (int k = 0; k < unroll; ++k) f.template operator()<V>(base + k * period, j, sums[k]);
    }
    for (; base < whole; base += period) f.template operator()<V>(base, j, sums[0]);
    for (int s = 0; s < count; ++s) {
      V total = sums[0][s];
      for (int k = 1; k < unroll; ++k) total += sums[k][s];
      for (int l = 0; l < lanes; ++l) out[s * channels + (j + l) % channels] += total[l];
    }
  }
  for (int64_t i = whole; i < length; ++i) {
    A terms[count] = {};
    f.template operator()<A>(i, i - whole, terms);
    for (int s = 0; s < count; ++s) out[s * channels + (i - whole) % channels] += terms[s];
  }
}

// Repeats a per-channel row [channels] over the period.
template <class A>
inline void repeat(A* row, int64_t channels) {
  for (int64_t j = channels; j < period_of<A>(channels); ++j) row[j] = row[j - channels];
}

// Workers, not threads: worker w of W takes the samples [w N / W, (w + 1) N / W), so the work of each is fixed
// for a given thread count and each owns a slice of the scratch.
struct Workers {
  int64_t count;

  explicit Workers(int64_t samples) : count(std::max<int64_t>(1, std::min(samples, thread_count()))) {}

  template <class F>
  void for_samples(int64_t samples, const F& f) const {
    const int64_t workers = count;
    if (workers == 1) {
      for (int64_t n = 0; n < samples; ++n) f(int64_t{0}, n);
      return;
    }
    in_parallel(workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w)
        for (int64_t n = w * samples / workers; n < (w + 1) * samples / workers; ++n) f(w, n);
    });
  }
};

// out = in, in the other type. One copy of each for all their callers: they are long where a CPU has no bfloat16.
template <class T, class A>
[[gnu::noinline]] void widen_all(const T* in, int64_t length, A* out) {
  for (int64_t i = 0; i < length; ++i) out[i] = widen(in[i]);
}
template <class T, class A>
[[gnu::noinline]] void narrow_all(const A* in, int64_t length, T* out) {
  for (int64_t i = 0; i < length; ++i) out[i] = narrow(in[i]);
}

// A sample in the accumulator's type: the tensor's own memory, or a widened copy in scratch.
template <class T, class A>
inline const A* read_sample(const T* data, int64_t n, int64_t length, A* scratch) {
  const T* from = data + n * length;
  if constexpr (std::is_same_v<T, A>) {
    static_cast<void>(scratch);
    return from;
  } else {
    widen_all(from, length, scratch);
    return scratch;
  }
}

// Where to write a sample before `write_sample` stores it.
template <class T, class A>
inline A* open_sample(T* data, int64_t n, int64_t length, A* scratch) {
  if constexpr (std::is_same_v<T, A>) {
    static_cast<void>(scratch);
    return data + n * length;
  } else {
    static_cast<void>(data), static_cast<void>(n), static_cast<void>(length);
    return scratch;
  }
}

template <class T, class A>
inline void write_sample(T* data, int64_t n, int64_t length, const A* sample) {
  if constexpr (!std::is_same_v<T, A>) {
    narrow_all(sample, length, data + n * length);
  } else {
    static_cast<void>(data), static_cast<void>(n), static_cast<void>(length), static_cast<void>(sample);
  }
}

}  // namespace fastode

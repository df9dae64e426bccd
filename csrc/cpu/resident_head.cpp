// The head of a network, the mean of every channel and a linear layer behind it: one operator forwards, one backwards.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "parallel.h"
#include "resident/new_tensors.h"
#include "resident/plane.h"
#include "resident/rows.h"
#include "storage.h"

namespace fastode::resident {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kGrain = 1 << 15;  // numbers read, or multiplied, that are worth a thread

// Every number as it is once it has been stored as P.
template <class P, class A>
A through(A value) {
  return to_accumulator<A>(to_storage<P>(value));
}

// The map [N, C, H, W], channels_last or contiguous.
struct Map {
  const Tensor& tensor;
  int64_t samples = tensor.size(0), channels = tensor.size(1), pixels = tensor.size(2) * tensor.size(3);
  bool last = tensor.stride(1) == 1 && channels > 1 && pixels > 1;
};

int64_t padded(int64_t count, int64_t lanes) { return divide_up(count, lanes) * lanes; }

// The rows of a matrix, or a vector as one, with zeros behind them that fill their vectors; each number rounded to P. A
// matrix whose rows are so is returned as it is.
template <class P, class A>
Tensor padded_rows(const Tensor& matrix) {
  const bool is_vector = matrix.dim() == 1;
  const int64_t rows = is_vector ? 1 : matrix.size(0), count = matrix.size(is_vector ? 0 : 1);
  const int64_t down = is_vector ? 0 : matrix.stride(0), across = matrix.stride(is_vector ? 0 : 1);
  const int64_t row = padded(count, kLanes<A>);
  const bool is_padded = count == row && across == 1 && (is_vector || down == row);
  if (std::is_same_v<P, A> && is_padded && matrix.scalar_type() == scalar_type<A>()) return matrix;
  const Tensor made = new_vector(rows * row, scalar_type<A>(), true);
  with_storage(matrix.scalar_type(), [&]<class W>(W) {
    for (int64_t r = 0; r < rows; ++r) {
      const W* from = pointer<W>(matrix) + r * down;
      A* to = pointer<A>(made) + r * row;
      const auto copy = [&](int64_t step) {
        for (int64_t c = 0; c < count; ++c) to[c] = through<P>(to_accumulator<A>(from[c * step]));
      };
      across == 1 ? copy(1) : copy(across);
    }
  });
  return made;
}

// The sum over the pixels of each channel of one sample.
template <class T, class A>
void sum_pixels(const Map& map, const T* x, A* sums) {
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t whole = map.channels / lanes, pixels = map.pixels;
  if (map.last) {
    in_stretches<kTogether>(whole, [&](int64_t first, auto together) {
      constexpr int vectors = together();
      V found[vectors] = {};
      for (int64_t p = 0; p < pixels; ++p) {
        const T* from = x + p * map.channels + first * lanes;
        FASTODE_UNROLL for (int v = 0; v < vectors; ++v) found[v] += load_stored<T>(from + v * lanes);
      }
      FASTODE_UNROLL for (int v = 0; v < vectors; ++v) store<V>(sums + (first + v) * lanes, found[v]);
    });
    for (int64_t c = whole * lanes; c < map.channels; ++c) {
      sums[c] = 0;
      for (int64_t p = 0; p < pixels; ++p) sums[c] += to_accumulator<A>(x[p * map.channels + c]);
    }
    return;
  }
  for (int64_t c = 0; c < map.channels; ++c, x += pixels) {
    V found{};
    int64_t p = 0;
    for (; p + lanes <= pixels; p += lanes) found += load_stored<T>(x + p);
    sums[c] = sum_of_lanes<V>(found);
    for (; p < pixels; ++p) sums[c] += to_accumulator<A>(x[p]);
  }
}

// One sample's row spread over the pixels.
template <class T>
void spread(const Map& map, const T* row, T* x) {
  if (map.last)
    for (int64_t p = 0; p < map.pixels; ++p) std::copy(row, row + map.channels, x + p * map.channels);
  else
    for (int64_t c = 0; c < map.channels; ++c) std::fill_n(x + c * map.pixels, map.pixels, row[c]);
}

// x is stored as T; what the linear layer reads and gives, as P.
template <class T, class P>
void forward(const Map& map, const Tensor& weight, const Tensor* bias, const Tensor& y, const Tensor& pooled) {
  using A = Number<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t classes = y.size(1), channels = map.channels, row = padded(channels, lanes);
  const Tensor weights = padded_rows<P, A>(weight);
  const Tensor biases = bias ? padded_rows<P, A>(*bias) : new_vector(0, weights.scalar_type());
  const A *w = pointer<A>(weights), *b = bias ? pointer<A>(biases) : nullptr;
  const int64_t grain = divide_up(kGrain, channels * (map.pixels + classes));
  in_parallel(map.samples, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> mean(row), sums(classes);
    for (int64_t n = begin; n < end; ++n) {
      sum_pixels<T>(map, pointer<T>(map.tensor) + n * channels * map.pixels, mean.data());
      P *kept = pointer<P>(pooled) + n * channels, *to = pointer<P>(y) + n * classes;
      for (int64_t c = 0; c < channels; ++c) {
        mean[c] = through<P>(through<T>(mean[c] / static_cast<A>(map.pixels)));
        kept[c] = to_storage<P>(mean[c]);
      }
      row_products(w, classes, row, row / lanes, mean.data(), sums.data());
      for (int64_t k = 0; k < classes; ++k) to[k] = to_storage<P>(sums[k] + (b ? b[k] : A(0)));
    }
  });
}

template <class T, class P>
void pull_map(const Map& map, const Tensor& cotangent, const Tensor& weight, const Tensor& x_bar) {
  using A = Number<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t classes = cotangent.size(1), channels = map.channels, row = padded(channels, lanes);
  const Tensor weights = padded_rows<P, A>(weight);
  const A* w = pointer<A>(weights);
  const int64_t grain = divide_up(kGrain, channels * (map.pixels + classes));
  in_parallel(map.samples, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> given(classes), bar(row);
    std::vector<T> stored(channels);
    for (int64_t n = begin; n < end; ++n) {
      const P* from = pointer<P>(cotangent) + n * classes;
      for (int64_t k = 0; k < classes; ++k) given[k] = to_accumulator<A>(from[k]);
      sum_of_rows(w, classes, row, row / lanes, given.data(), bar.data());
      for (int64_t c = 0; c < channels; ++c)
        stored[c] = to_storage<T>(through<T>(through<P>(bar[c])) / static_cast<A>(map.pixels));
      spread<T>(map, stored.data(), pointer<T>(x_bar) + n * channels * map.pixels);
    }
  });
}

// The gradients of weight and bias.
template <class P, class A>
Tensors pull_parameters(const Tensor& cotangent, const Tensor& pooled, const Tensor& weight) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t samples = pooled.size(0), channels = pooled.size(1), classes = cotangent.size(1);
  const int64_t row = padded(channels, lanes);
  const Tensor means = padded_rows<P, A>(pooled);
  const A* m = pointer<A>(means);
  const P* g = pointer<P>(cotangent);
  std::vector<A> given(classes * samples);  // class by class
  constexpr int64_t together = 16;          // samples, whose cache lines are read and written meanwhile
  for (int64_t first = 0; first < samples; first += together)
    for (int64_t k = 0; k < classes; ++k)
      for (int64_t n = first; n < std::min(samples, first + together); ++n)
        given[k * samples + n] = to_accumulator<A>(g[n * classes + k]);
  const Tensor weight_bar = new_contiguous(weight.scalar_type(), weight.sizes());
  const Tensor bias_bar = new_contiguous(weight.scalar_type(), weight.sizes().slice(0, 1));
  with_storage(weight.scalar_type(), [&]<class W>(W) {
    if constexpr (std::is_same_v<Number<W>, A>) {
      W *to_weight = pointer<W>(weight_bar), *to_bias = pointer<W>(bias_bar);
      in_parallel(row / lanes, divide_up(kGrain, samples * classes * lanes + 1), [&](int64_t begin, int64_t end) {
        const int64_t first = begin * lanes, last = std::min(channels, end * lanes);
        std::vector<A> sums((end - begin) * lanes);
        for (int64_t k = 0; k < classes; ++k) {
          sum_of_rows(m + first, samples, row, end - begin, given.data() + k * samples, sums.data());
          for (int64_t c = first; c < last; ++c) to_weight[k * channels + c] = to_storage<W>(sums[c - first]);
        }
      });
      for (int64_t k = 0; k < classes; ++k) {
        const A* from = given.data() + k * samples;
        to_bias[k] = to_storage<W>(std::accumulate(from, from + samples, A(0)));
      }
    }
  });
  return {weight_bar, bias_bar};
}

// Calls f(a T, a P): the types of the map, and of what the linear layer reads and gives, bfloat16 if it `lowers`.
template <class F>
void with_types(const Tensor& x, bool lowers, const F& f) {
  with_storage(x.scalar_type(), [&]<class T>(T zero) {
    if constexpr (std::is_same_v<T, float>) {
      if (lowers) return f(zero, bfloat16{});
    }
    f(zero, zero);
  });
}

std::tuple<Tensor, Tensor> head_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                        bool lowers) {
  const Map map{x};
  const ScalarType type = lowers ? ScalarType::BFloat16 : x.scalar_type();
  const int64_t results[] = {map.samples, weight.size(0)}, means[] = {map.samples, map.channels};
  const Tensor y = new_contiguous(type, {results, 2}), pooled = new_contiguous(type, {means, 2});
  with_types(x, lowers,
             [&]<class T, class P>(T, P) { forward<T, P>(map, weight, bias ? &*bias : nullptr, y, pooled); });
  return {y, pooled};
}

std::tuple<Tensor, Tensors> head_backward(const Tensor& x, const Tensor& pooled, const Tensor& cotangent,
                                          const Tensor& weight, bool point, bool gradients) {
  const Map map{x};
  const Tensor x_bar = point ? new_map(x.scalar_type(), map.samples, map.channels, x.size(2), x.size(3), map.last)
                             : new_vector(0, x.scalar_type());
  Tensors bars;
  with_types(x, pooled.scalar_type() != x.scalar_type(), [&]<class T, class P>(T, P) {
    if (point) pull_map<T, P>(map, cotangent, weight, x_bar);
    if (gradients) bars = pull_parameters<P, Number<T>>(cotangent, pooled, weight);
  });
  return {x_bar, bars};
}

}  // namespace
}  // namespace fastode::resident

STABLE_TORCH_LIBRARY_IMPL(fastode, CPU, m) {
  m.impl("resident_head_forward", TORCH_BOX(&fastode::resident::head_forward));
  m.impl("resident_head_backward", TORCH_BOX(&fastode::resident::head_backward));
}

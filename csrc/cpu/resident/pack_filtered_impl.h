// Weights of filtered convolutions of bfloat16: scaled, filtered and rounded to integers. Included by one .cpp.
#pragma once

#include <algorithm>
#include <array>
#include <mutex>
#include <span>
#include <vector>

#include "filtering.h"
#include "fixed_point.h"
#include "packing.h"

namespace fastode::resident {

// Packed weights G g G': of a group of output tiles [product][pair of input channels][output channel][of the pair], and
// behind all groups what brings each output channel's sums back, and powers of two that the input channels are
// multiplied by and their weights are divided by: without them channels of small inputs and large weights, or the
// reverse, would be rounded by those that are large.
struct PackedWinograd {
  int64_t group, pairs, product, group_size, factors, powers, size;  // in numbers of 16 bits

  explicit PackedWinograd(const ConvShape& shape)
      : group(group_of(blocks_of<float>(shape.out_channels))),
        pairs(divide_up(shape.in_channels, 2)),
        product(pairs * group * kTileDepth + kTileDepth),
        group_size(kProducts * product),
        factors(blocks_of<float>(shape.out_channels) / group * group_size),
        powers(factors + 2 * blocks_of<float>(shape.out_channels) * kTileRows),
        size(powers + divide_up(shape.in_channels, kTileDepth) * kTileDepth) {}
};

namespace {

inline bool are_ones(const bfloat16* powers, int64_t count) {
  return std::all_of(powers, powers + count, [](bfloat16 power) { return power.bits == kOne; });
}

// A weight [output, input, 3, 3] whose numbers fill a stretch of memory, output by output; an output's either input by
// input or tap by tap.
struct DenseKernels {
  const float* at;
  int64_t outputs, inputs;
  bool input_by_input;

  int64_t length() const { return 9 * inputs; }  // of an output
  // f(an input, where one of its numbers is among an output's)
  template <class F>
  void each_place(const F& f) const {
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t in = 0; in < inputs; ++in) f(in, input_by_input ? 9 * in + tap : inputs * tap + in);
  }
  std::array<int64_t, 4> strides() const {
    if (input_by_input) return {length(), 9, 3, 1};
    return {length(), 1, 3 * inputs, inputs};
  }
};

// The same for a weight of any dtype and strides: what is not so already is copied.
template <class T>
DenseKernels dense_kernels(const ConvShape& shape, const T* weight, const int64_t* strides, std::vector<float>& copy) {
  DenseKernels kernels{nullptr, shape.out_channels, shape.in_channels, false};
  const auto fits = [&] { return std::ranges::equal(kernels.strides(), std::span(strides, 4)); };
  bool dense = fits();
  if (!dense) kernels.input_by_input = true, dense = fits();
  if constexpr (std::is_same_v<T, float>)
    if (dense) return kernels.at = weight, kernels;
  copy.resize(kernels.outputs * kernels.length());
  in_parallel(kernels.outputs, std::max<int64_t>(1, (1 << 13) / kernels.length()), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      float* const to = copy.data() + o * kernels.length();
      const T* const from = weight + o * strides[0];
      if (dense)
        std::transform(from, from + kernels.length(), to, to_accumulator<float, T>);
      else
        for (int64_t k = 0; k < kernels.length(); ++k)
          to[k] = to_accumulator<float>(from[k / 9 * strides[1] + k % 9 / 3 * strides[2] + k % 3 * strides[3]]);
    }
  });
  return kernels.at = copy.data(), kernels;
}

// Largest magnitudes of channels, as integers: they have the numbers' order, and what is not finite is above all.
using Magnitudes = std::vector<int32_t>;

struct Largest {
  Magnitudes outputs, inputs;
};

// The largest magnitude of `length` numbers, each multiplied by a factor if there are any; what stands at a place
// raises `places`, which are whole vectors.
inline int32_t raise_places(const float* from, int64_t length, const float* factors, int32_t* places) {
  constexpr int64_t lanes = kLanes<float>;
  const __m512i magnitude = _mm512_set1_epi32(std::numeric_limits<int32_t>::max());
  __m512i most = _mm512_setzero_si512();
  const auto raise = [&](__m512 value, int64_t k) {
    if (factors) value = _mm512_mul_ps(value, _mm512_loadu_ps(factors + k));
    const __m512i size = _mm512_and_si512(_mm512_castps_si512(value), magnitude);
    most = _mm512_max_epi32(most, size);
    _mm512_storeu_si512(places + k, _mm512_max_epi32(_mm512_loadu_si512(places + k), size));
  };
  int64_t k = 0;
  for (; k + lanes <= length; k += lanes) raise(_mm512_loadu_ps(from + k), k);
  if (k < length) raise(_mm512_maskz_loadu_ps((1 << (length - k)) - 1, from + k), k);
  return _mm512_reduce_max_epi32(most);
}

// Of each output and each input, where those that are multiplied by factors are, if there are any.
inline Largest find_largest(const DenseKernels& kernels, const float* of_outputs = nullptr,
                            const float* of_inputs = nullptr) {
  const int64_t length = kernels.length(), whole = divide_up(length, kLanes<float>) * kLanes<float>;
  Largest found{Magnitudes(kernels.outputs), Magnitudes(kernels.inputs)};
  std::vector<float> factors(of_inputs ? whole : 0);
  if (of_inputs) kernels.each_place([&](int64_t in, int64_t k) { factors[k] = of_inputs[in]; });
  std::mutex adding;
  in_parallel(kernels.outputs, std::max<int64_t>(1, (1 << 15) / length), [&](int64_t begin, int64_t end) {
    Magnitudes places(whole);
    std::vector<float> same(of_outputs ? whole : 0);
    for (int64_t o = begin; o < end; ++o) {
      if (of_outputs) same.assign(whole, of_outputs[o]);
      const float* const by = of_outputs ? same.data() : of_inputs ? factors.data() : nullptr;
      found.outputs[o] = raise_places(kernels.at + o * length, length, by, places.data());
    }
    const std::lock_guard lock(adding);
    kernels.each_place([&](int64_t in, int64_t k) { found.inputs[in] = std::max(found.inputs[in], places[k]); });
  });
  return found;
}

// Of each channel that is summed over the power of two that its largest weight reaches, beside that of the channel
// whose largest is least: at most 2^12, and 1 where there is no weight, or one that is not finite.
inline void find_powers(const Magnitudes& largest, bfloat16* powers) {
  constexpr int range = 12, infinite = 255;
  const auto exponent = [](int32_t magnitude) { return magnitude >> 23; };
  const auto counts = [&](int32_t magnitude) { return exponent(magnitude) > 0 && exponent(magnitude) < infinite; };
  int most = 0, least = infinite;
  for (const int32_t each : largest)
    if (counts(each)) most = std::max(most, exponent(each));
  for (const int32_t each : largest)
    if (counts(each)) least = std::min(least, std::max(exponent(each), most - range));
  const auto channels = static_cast<int64_t>(largest.size());
  std::fill_n(powers, divide_up(channels, kTileDepth) * kTileDepth, bfloat16{kOne});
  if (most - least < 2) return;  // alike enough
  for (int64_t c = 0; c < channels; ++c)
    if (counts(largest[c])) powers[c].bits += (std::max(exponent(largest[c]), most - range) - least) << 7;
}

inline void pack_dense(const ConvShape& shape, Filtering way, bool flip, const DenseKernels& kernels, float* packed) {
  using V = Vec<float>;
  constexpr int64_t lanes = kLanes<float>;
  const bool strided = way != Filtering::kStraight;
  const ConvShape forward = flip ? shape.transposed() : shape;
  const WeightView<float> straight(forward, kernels.at, kernels.strides().data());
  const WeightView<float> view = flip ? straight.back(2, 2, 1) : straight;
  const PackedWinograd order(shape);
  int16_t* const numbers = reinterpret_cast<int16_t*>(packed);
  float* const factors = reinterpret_cast<float*>(numbers + order.factors);
  bfloat16* const powers = reinterpret_cast<bfloat16*>(numbers + order.powers);

  Largest largest = find_largest(kernels);
  find_powers(flip ? largest.outputs : largest.inputs, powers);
  const bool alike = are_ones(powers, shape.in_channels);
  std::vector<float> inverse(shape.in_channels, 1.0f);
  if (!alike) {
    for (int64_t c = 0; c < shape.in_channels; ++c)
      inverse[c] = widen({static_cast<uint16_t>(2 * kOne - powers[c].bits)});
    largest = flip ? find_largest(kernels, inverse.data()) : find_largest(kernels, nullptr, inverse.data());
  }
  Magnitudes& most = flip ? largest.inputs : largest.outputs;
  most.resize(blocks_of<float>(shape.out_channels) * lanes);

  const auto pack = [&](int64_t tile) {
    const int64_t out = tile * lanes, outputs = std::min(lanes, shape.out_channels - out);
    const V bound = (V)_mm512_loadu_si512(most.data() + out) * (strided ? Strided::kGrowth : Straight::kGrowth);
    const V fits = bound > 1e-30f ? bound : V{} + 1e-30f, to = kMostWeight / fits;
    store<V>(factors + out, fits / kMostWeight + (bound - bound));  // NaN where a weight is not finite
    int16_t* group = numbers + tile / order.group * order.group_size + tile % order.group * kTileDepth;
    alignas(64) float cell[9 * lanes * lanes];  // [tap][input][output]
    for (int64_t first = 0; first < shape.in_channels; first += lanes) {
      const int64_t inputs = std::min(lanes, shape.in_channels - first);
      const float* from = view.at + out * view.out + first * view.in;
      PackedCell<float, float>{shape, 1, outputs, inputs, lanes, view, from, cell}.pack();
      const auto filter = [&](int64_t in, V(&u)[4][4]) {
        const V scale = to * inverse[first + in];
        V g[3][3];
        FASTODE_UNROLL for (int tap = 0; tap < 9; ++tap) g[tap / 3][tap % 3] =
            load<V>(cell + (tap * inputs + in) * lanes) * scale;
        strided ? Strided::spread_kernel(g, u) : Straight::spread_kernel(g, u);
      };
      for (int64_t in = 0; in < inputs; in += 2, group += order.group * kTileDepth) {
        V u[2][4][4];
        filter(in, u[0]);
        if (in + 1 < inputs)
          filter(in + 1, u[1]);
        else
          std::fill_n(u[1][0], 16, V{});
        FASTODE_UNROLL for (int p = 0; p < kProducts; ++p)
            store_pairs(group + p * order.product, (__m512)u[0][p / 4][p % 4], (__m512)u[1][p / 4][p % 4]);
      }
    }
  };
  in_parallel(blocks_of<float>(shape.out_channels),
              std::max<int64_t>(1, kCells / 2 / blocks_of<float>(shape.in_channels)), [&](int64_t begin, int64_t end) {
                for (int64_t tile = begin; tile < end; ++tile) pack(tile);
              });
}

}  // namespace

template <class T>
void pack_narrow_winograd(const ConvShape& shape, Filtering way, bool flip, const T* weight, const int64_t* strides,
                          float* packed) {
  std::vector<float> copy;
  pack_dense(shape, way, flip, dense_kernels(flip ? shape.transposed() : shape, weight, strides, copy), packed);
}

template void pack_narrow_winograd(const ConvShape&, Filtering, bool, const float*, const int64_t*, float*);
template void pack_narrow_winograd(const ConvShape&, Filtering, bool, const bfloat16*, const int64_t*, float*);

}  // namespace fastode::resident

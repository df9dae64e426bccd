// Included by one .cpp per arithmetic type.
#pragma once

#include <cmath>
#include <numeric>

#include "skew_passes.h"

namespace fastode::resident {

inline void widen_band(const Plane<float>& band, int64_t blocks, const View<bfloat16>& from, const View<float>& to) {
  for (int64_t y = 0; y < band.height; ++y)
    for (int64_t x = 0; x < band.width; ++x)
      for (int64_t b = 0; b < blocks; ++b) store<Vec<float>>(to.pixel_at(b, y, x), load_stored(from.pixel_at(b, y, x)));
}

inline void round_band(const Plane<float>& band, int64_t blocks, const View<float>& from, const View<bfloat16>& to) {
  for (int64_t y = 0; y < band.height; ++y)
    for (int64_t x = 0; x < band.width; ++x)
      for (int64_t b = 0; b < blocks; ++b) store_stored(to.pixel_at(b, y, x), load<Vec<float>>(from.pixel_at(b, y, x)));
}

template <int count, class A>
void advance_by(const Plane<A>& plane, int64_t blocks, const View<A>& base, const Slope<A>* slopes,
                const View<A>& out) {
  using V = Vec<A>;
  for (int64_t b = 0; b < blocks; ++b) {
    V mean[count + 1], scale[count + 1], shift = {};
    for (int j = 0; j < count; ++j) {
      const NormRows<A>& rows = slopes[j].rows;
      mean[j] = row_at(rows.mean, b);
      scale[j] = slopes[j].coefficient * row_at(rows.rstd, b) * row_at(rows.weight, b);
      shift += slopes[j].coefficient * row_at(rows.bias, b);
    }
    for (int64_t y = 0; y < plane.height; ++y) {
      const A* from[count + 1];
      for (int j = 0; j < count; ++j) from[j] = slopes[j].s.pixel_at(b, y, 0);
      const A* start = base.pixel_at(b, y, 0);
      A* to = out.pixel_at(b, y, 0);
      for (int64_t x = 0; x < plane.width; ++x) {
        V value = load<V>(start + x * base.pixel) + shift;
        for (int j = 0; j < count; ++j) value += (load<V>(from[j] + x * slopes[j].s.pixel) - mean[j]) * scale[j];
        store<V>(to + x * out.pixel, value);
      }
    }
  }
}

template <class A>
void advance(const Plane<A>& plane, int64_t blocks, const View<A>& base, const Slope<A>* slopes, int64_t count,
             const View<A>& out) {
  const auto sweep = [&](auto known) { advance_by<known()>(plane, blocks, base, slopes, out); };
  if (!with_few<kSlopes>(count, sweep)) advance_by<0>(plane, blocks, base, slopes, out);
}

// For `vectors` blocks at a time: in channels_last those of a pixel lie side by side, and so the map is read from end
// to end.
template <int vectors, class A>
void add_cotangent_sums_of(const Plane<A>& band, int64_t blocks, int64_t b, const Standard<A>& s, const View<A>& given,
                           A* sums) {
  using V = Vec<A>;
  const Standard<A> x = s;
  const View<A> cotangent = given;
  V origin[vectors], plain[vectors] = {}, weighted[vectors] = {};
  for (int v = 0; v < vectors; ++v) origin[v] = row_at(x.origin, b + v);
  for (int64_t row = 0; row < band.height; ++row)
    for (int64_t column = 0; column < band.width; ++column) {
      const A *at = x.map.pixel_at(b, row, column), *c = cotangent.pixel_at(b, row, column);
      FASTODE_UNROLL for (int v = 0; v < vectors; ++v) {
        const V value = load<V>(c + v * cotangent.block);
        plain[v] += value;
        weighted[v] += value * (load<V>(at + v * x.map.block) - origin[v]);
      }
    }
  for (int v = 0; v < vectors; ++v) {
    A *first = sums + (b + v) * kLanes<A>, *second = first + blocks * kLanes<A>;
    store<V>(first, load<V>(first) + plain[v]);
    store<V>(second, load<V>(second) + weighted[v] * row_at(x.unit, b + v));
  }
}

template <class A>
void add_cotangent_sums(const Plane<A>& band, int64_t blocks, const Standard<A>& x, const View<A>& cotangent, A* sums) {
  int64_t b = 0;
  for (; b + 4 <= blocks; b += 4) add_cotangent_sums_of<4>(band, blocks, b, x, cotangent, sums);
  for (; b < blocks; ++b) add_cotangent_sums_of<1>(band, blocks, b, x, cotangent, sums);
}

template <class A>
void note_signs(const Plane<A>& plane, int64_t blocks, const View<A>& map, const Signs<A>& signs) {
  using V = Vec<A>;
  using Word = typename Signs<A>::Word;
  constexpr int64_t pixels = Signs<A>::pixels;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t y = 0; y < plane.height; ++y) {
      A* to = signs.at + b * signs.block + y * signs.row;
      for (int64_t first = 0; first < plane.width; first += pixels, to += kLanes<A>) {
        const A* from = map.pixel_at(b, y, first);
        Word word = {};
        for (int64_t x = 0; x < std::min(pixels, plane.width - first); ++x)
          word |= (load<V>(from + x * map.pixel) > 0) & ((Word{} + 1) << x);
        std::memcpy(to, &word, sizeof(word));
      }
    }
}

template <class A>
void pull_slope(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act, A factor,
                const View<A>& guide, const Signs<A>& signs, const Standard<A>& s, const View<A>& cotangent,
                const View<A>& out) {
  using V = Vec<A>;
  using Word = typename Signs<A>::Word;
  constexpr int64_t pixels = Signs<A>::pixels;
  // Without statistics of its own a norm only scales; 0 times an infinite s would be NaN.
  const auto sweep = [&](auto kind, auto measured, auto by_signs) {
    for (int64_t b = 0; b < blocks; ++b) {
      const V origin = row_at(s.origin, b), outer = factor * row_at(rows.rstd, b);
      const V scale = outer * row_at(rows.weight, b), constant = outer * row_at(rows.n, b);
      const V slope = outer * row_at(s.unit, b) * row_at(rows.xn, b);
      for (int64_t y = 0; y < plane.height; ++y) {
        const A *g = guide.pixel_at(b, y, 0), *from = s.map.pixel_at(b, y, 0), *c = cotangent.pixel_at(b, y, 0);
        A* to = out.pixel_at(b, y, 0);
        const auto pixel = [&](int64_t x, const auto& guide_at) {
          V value = scale * load<V>(c + x * cotangent.pixel);
          if constexpr (measured()) value = value - constant - slope * (load<V>(from + x * s.map.pixel) - origin);
          if constexpr (!kIsIdentity<decltype(kind)>) value *= activate_first(kind, guide_at(x), act.arguments);
          store<V>(to + x * out.pixel, value);
        };
        if constexpr (by_signs()) {
          for (int64_t first = 0; first < plane.width; first += pixels) {
            Word word;
            std::memcpy(&word, signs.at + b * signs.block + y * signs.row + first / pixels * kLanes<A>, sizeof(word));
            for (int64_t x = first; x < std::min(first + pixels, plane.width); ++x)
              pixel(x, [&](int64_t) { return (word << (pixels - 1 - x + first)) < 0 ? splat<V>(1) : splat<V>(-1); });
          }
        } else {
          for (int64_t x = 0; x < plane.width; ++x) pixel(x, [&](int64_t at) { return load<V>(g + at * guide.pixel); });
        }
      }
    }
  };
  with_activation(act.kind, [&](auto kind) {
    const auto choose = [&](auto measured) {
      // An activation that the sign says enough about.
      if constexpr (!kHasSecond<decltype(kind)>)
        if (signs.at) return sweep(kind, measured, std::true_type{});
      sweep(kind, measured, std::false_type{});
    };
    rows.measured ? choose(std::true_type{}) : choose(std::false_type{});
  });
}

// Calls f(y, x, blocks of the input, padded channels of the output) for every pixel.
template <class A, class F>
void each_repeated(const Plane<A>& plane, int64_t in_channels, int64_t channels, const F& f) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t y = 0; y < plane.height; ++y)
    for (int64_t x = 0; x < plane.width; ++x) f(y, x, blocks_of<A>(in_channels), blocks_of<A>(channels) * lanes);
}

// repeat_channels and add_repeated where a pixel's channels are at most half a vector. Block b of the repeated channels
// begins at channel b * lanes % in_channels, and so there are only `kinds` different blocks.
template <class A, int in_channels>
struct FewChannels {
  using V = Vec<A>;
  static constexpr int64_t lanes = kLanes<A>, kinds = in_channels / std::gcd(in_channels, kLanes<A>);
  using Lanes = typename Lane<V>::Int;

  // Which lanes of a block are channels, for the last one.
  static Lanes inside(int64_t channels, int64_t b) {
    Lanes mask = {};
    for (int64_t l = 0; l < lanes; ++l) mask[l] = b * lanes + l < channels ? -1 : 0;
    return mask;
  }

  static void repeat(const Plane<A>& plane, int64_t channels, int64_t stride, const View<A>& in, const View<A>& out) {
    each_band(plane, [&](const Plane<A>& band, int64_t at) {
      for (int64_t b = 0; b < blocks_of<A>(channels); ++b) {
        Lanes channel = {};
        for (int64_t l = 0; l < lanes; ++l) channel[l] = (b * lanes + l) % in_channels;
        const Lanes used = inside(channels, b);
        for (int64_t y = at; y < at + band.height; ++y)
          for (int64_t x = 0; x < band.width; ++x) {
            const A* from = in.pixel_at(0, y * stride, x * stride);
            V value = splat<V>(from[0]);
            FASTODE_UNROLL for (int c = 1; c < in_channels; ++c) value = channel == c ? splat<V>(from[c]) : value;
            store<V>(out.pixel_at(b, y, x), used ? value : V{});
          }
      }
    });
  }

  static void add(const Plane<A>& plane, int64_t channels, int64_t stride, const View<A>& in, const View<A>& out) {
    const int64_t blocks = blocks_of<A>(channels);
    const Lanes used = inside(channels, blocks - 1);
    for (int64_t y = 0; y < plane.height; ++y)
      for (int64_t x = 0; x < plane.width; ++x) {
        const A* from = out.pixel_at(0, y, x);
        const V last = load<V>(from + (blocks - 1) * out.block);
        V sums[kinds] = {};
        for (int64_t b = 0; b < blocks; b += kinds) {
          FASTODE_UNROLL for (int64_t k = 0; k < kinds; ++k) {
            if (b + k < blocks - 1) sums[k] += load<V>(from + (b + k) * out.block);
            if (b + k == blocks - 1) sums[k] += used ? last : V{};
          }
        }
        A row[kinds * lanes];
        FASTODE_UNROLL for (int64_t k = 0; k < kinds; ++k) store<V>(row + k * lanes, sums[k]);
        A* to = in.pixel_at(0, y * stride, x * stride);
        FASTODE_UNROLL for (int c = 0; c < in_channels; ++c) {
          A sum = row[c];
          FASTODE_UNROLL for (int64_t l = c + in_channels; l < kinds * lanes; l += in_channels) sum += row[l];
          to[c] += sum;
        }
      }
  }
};

template <class A>
void repeat_channels(const Plane<A>& plane, int64_t in_channels, int64_t channels, int64_t stride, const View<A>& in,
                     const View<A>& out) {
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<A>;
  const auto few = [&](auto count) { FewChannels<A, count()>::repeat(plane, channels, stride, in, out); };
  if (with_few<lanes / 2>(in_channels, few)) return;
  A row[kMostChannels + 2 * lanes];
  each_repeated(plane, in_channels, channels, [&](int64_t y, int64_t x, int64_t in_blocks, int64_t end) {
    for (int64_t b = 0; b < in_blocks; ++b) store<V>(row + b * lanes, load<V>(in.pixel_at(b, y * stride, x * stride)));
    for (int64_t c = 0; c < lanes; ++c) row[in_channels + c] = row[c % in_channels];
    for (int64_t c = 0; c < end; c += lanes) {
      A* to = out.pixel_at(c / lanes, y, x);
      store<V>(to, load<V>(row + c % in_channels));
      for (int64_t l = channels - c; l < lanes; ++l) to[l] = 0;
    }
  });
}

template <class A>
void add_repeated(const Plane<A>& plane, int64_t in_channels, int64_t channels, int64_t stride, const View<A>& in,
                  const View<A>& out) {
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<A>;
  const auto few = [&](auto count) { FewChannels<A, count()>::add(plane, channels, stride, in, out); };
  if (with_few<lanes / 2>(in_channels, few)) return;
  A row[kMostChannels + 2 * lanes];
  each_repeated(plane, in_channels, channels, [&](int64_t y, int64_t x, int64_t in_blocks, int64_t end) {
    std::fill(row, row + in_channels + lanes, A(0));
    for (int64_t c = 0; c < end; c += lanes) {
      A* to = row + c % in_channels;
      const A* from = out.pixel_at(c / lanes, y, x);
      if (c + lanes <= channels)
        store<V>(to, load<V>(to) + load<V>(from));
      else
        for (int64_t l = 0; l < channels - c; ++l) to[l] += from[l];
    }
    for (int64_t c = 0; c < lanes; ++c) {
      const A wrapped = row[in_channels + c];
      row[in_channels + c] = 0;
      row[c % in_channels] += wrapped;
    }
    for (int64_t b = 0; b < in_blocks; ++b) {
      A* to = in.pixel_at(b, y * stride, x * stride);
      store<V>(to, load<V>(to) + load<V>(row + b * lanes));
    }
  });
}

template <class A>
void merge_band_moments(int64_t blocks, int64_t seen, int64_t next, const A* mean_next, const A* squares_next, A* mean,
                        A* squares) {
  using V = Vec<A>;
  for (int64_t at = 0; at < blocks * kLanes<A>; at += kLanes<A>) {
    V merged_mean = load<V>(mean + at), merged_squares = load<V>(squares + at);
    merge_moments<V>(static_cast<A>(seen), merged_mean, merged_squares, static_cast<A>(next), load<V>(mean_next + at),
                     load<V>(squares_next + at));
    store<V>(mean + at, merged_mean);
    store<V>(squares + at, merged_squares);
  }
}

template <class A>
void group_statistics(int64_t pixels, int64_t channels, int64_t groups, double eps, const A* means, const A* squares,
                      A* mean, A* rstd) {
  const int64_t group = channels / groups, end = blocks_of<A>(channels) * kLanes<A>;
  const double members = static_cast<double>(group), count = static_cast<double>(pixels);
  for (int64_t first = 0; first < channels; first += group) {
    double sum = 0, deviations = 0;
    for (int64_t c = first; c < first + group; ++c) sum += static_cast<double>(means[c]);
    const double average = sum / members;
    for (int64_t c = first; c < first + group; ++c) {
      const double delta = static_cast<double>(means[c]) - average;
      deviations += static_cast<double>(squares[c]) + count * delta * delta;
    }
    std::fill(mean + first, mean + first + group, static_cast<A>(average));
    std::fill(rstd + first, rstd + first + group, static_cast<A>(1 / std::sqrt(deviations / (count * members) + eps)));
  }
  std::fill(mean + channels, mean + end, A(0));
  std::fill(rstd + channels, rstd + end, A(0));
}

template <class A>
void group_means(int64_t pixels, int64_t channels, int64_t groups, const A* sums, const A* weight, A* means) {
  const int64_t group = channels / groups, end = blocks_of<A>(channels) * kLanes<A>;
  const double members = static_cast<double>(pixels * group);
  for (int64_t first = 0; first < channels; first += group) {
    double total = 0;
    for (int64_t c = first; c < first + group; ++c)
      total += static_cast<double>(sums[c]) * static_cast<double>(weight[c]);
    std::fill(means + first, means + first + group, static_cast<A>(total / members));
  }
  std::fill(means + channels, means + end, A(0));
}

}  // namespace fastode::resident

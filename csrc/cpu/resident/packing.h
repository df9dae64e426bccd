// Weights between a tensor's memory, whatever its strides, and the order that the micro-kernels read. Where neighbours
// in memory are not neighbours there, a square of values is transposed in registers.
#pragma once

#include "../parallel.h"
#include "conv.h"
#include "square.h"

namespace fastode::resident {

inline constexpr int64_t kCells = 16;  // of packed weights or accumulators, that a thread is woken for

// Output vectors of a convolution's tile.
template <class A>
inline int vectors_of(int64_t out_channels) {
  return blocks_of<A>(out_channels) % 2 == 0 ? 2 : 1;
}

// The accumulator's layout: [output block][input block][ky][input channel][kx][output channel].
template <class A>
inline int64_t gradient_index(const ConvShape& shape, int64_t out, int64_t in, int64_t ky, int64_t kx) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t block = out / lanes * blocks_of<A>(shape.in_channels) + in / lanes;
  return (((block * shape.kernel_h + ky) * lanes + in % lanes) * shape.kernel_w + kx) * lanes + out % lanes;
}

// A weight as convolutions see it, by its strides, which are negative where a kernel is turned round.
template <class T>
struct WeightView {
  const T* at;   // of output 0, input 0 and the first tap
  const T* end;  // behind the last element of the tensor
  int64_t out, in, y, x;

  // Of [out, in, kh, kw]; `shape` is that of the convolution forwards.
  WeightView(const ConvShape& shape, const T* weight, const int64_t* strides)
      : at(weight), out(strides[0]), in(strides[1]), y(strides[2]), x(strides[3]) {
    end = at + (shape.out_channels - 1) * out + (shape.in_channels - 1) * in + (shape.kernel_h - 1) * y +
          (shape.kernel_w - 1) * x + 1;
  }
  // Inputs as outputs, beginning with tap (ky, kx) and going back by `step` taps.
  WeightView back(int64_t ky, int64_t kx, int64_t step) const {
    WeightView turned = *this;
    turned.at += ky * y + kx * x;
    turned.out = in, turned.in = out, turned.y = -step * y, turned.x = -step * x;
    return turned;
  }
};

// Reads a square: up to `rows` vectors, `stride` apart, of which `count` lanes are wanted.
template <class A, class T>
inline void read_square(Square<A>& square, const T* from, int64_t stride, int64_t rows, int64_t count, const T* end) {
  constexpr int64_t lanes = kLanes<A>;
  if (rows == lanes && from + (lanes - 1) * stride + lanes <= end) {
    FASTODE_UNROLL for (int64_t r = 0; r < lanes; ++r) square[r] = load_stored(from + r * stride);
    return;
  }
  for (int64_t r = 0; r < lanes; ++r, from += stride) {
    Vec<A> row = {};
    if (r < rows && from + lanes <= end)
      row = load_stored(from);
    else if (r < rows)
      for (int64_t c = 0; c < count; ++c) row[c] = to_accumulator<A>(from[c]);
    square[r] = row;
  }
}

// One vector of outputs and one block of inputs, from the view's first ones on.
template <class A, class T>
struct PackedCell {
  const ConvShape& shape;
  int64_t taps, outputs, inputs, width;  // width: elements from one tap's outputs to the next one's
  const WeightView<T>& weight;
  const T* from;
  A* to;

  int64_t step() const { return taps * width; }  // from an input to the next one
  // f(where the first input's outputs go, where they come from) for every tap.
  template <class F>
  void each_tap(const F& f) const {
    for (int64_t ky = 0; ky < shape.kernel_h; ++ky)
      for (int64_t kx = 0, set = ky * (shape.kernel_w / taps); kx < shape.kernel_w; ++kx)
        f(to + (set + kx / taps) * inputs * step() + kx % taps * width, ky * weight.y + kx * weight.x);
  }

  void pack() const {
    if constexpr (std::is_same_v<A, Number<T>>) {
      if (weight.out == 1 && outputs == kLanes<A>) return copy_outputs();
      if (weight.in == 1) return turn_inputs();
      const int64_t count = shape.kernel_h * shape.kernel_w;
      const bool in_order = weight.x == 1 && (weight.y == shape.kernel_w || shape.kernel_h == 1);
      if (in_order && weight.in == count && count <= kMostSpan) return turn_stretch();
      const int64_t up = (shape.kernel_h - 1) * weight.y, along = (shape.kernel_w - 1) * weight.x;
      const int64_t lowest = std::min<int64_t>(0, up) + std::min<int64_t>(0, along);
      const int64_t span = std::abs(up) + std::abs(along) + 1;
      if (span <= kMostSpan) return turn_taps(lowest, span);
    }
    each_tap([&](A* place, int64_t tap) {
      for (int64_t in = 0; in < inputs; ++in, place += step()) {
        for (int64_t lane = 0; lane < outputs; ++lane)
          place[lane] = to_accumulator<A>(from[lane * weight.out + in * weight.in + tap]);
        std::fill(place + outputs, place + kLanes<A>, A(0));
      }
    });
  }
  void copy_outputs() const {
    each_tap([&](A* place, int64_t tap) {
      for (int64_t in = 0; in < inputs; ++in)
        store<Vec<A>>(place + in * step(), load_stored(from + in * weight.in + tap));
    });
  }
  void turn_inputs() const {
    each_tap([&](A* place, int64_t tap) {
      Square<A> square;
      read_square<A, T>(square, from + tap, weight.out, outputs, inputs, weight.end);
      transpose(square);
      FASTODE_UNROLL for (int64_t in = 0; in < kLanes<A>; ++in) {
        if (in == inputs) break;
        store<Vec<A>>(place + in * step(), square[in]);
      }
    });
  }
  // The taps of all inputs are one stretch of memory.
  void turn_stretch() const {
    A* places[kMostSpan];
    int64_t count = 0, in = 0, tap = 0;
    each_tap([&](A* place, int64_t) { places[count++] = place; });
    const int64_t length = inputs * count;
    for (int64_t first = 0; first < length; first += kLanes<A>) {
      Square<A> square;
      read_square<A, T>(square, from + first, weight.out, outputs, std::min<int64_t>(kLanes<A>, length - first),
                        weight.end);
      transpose(square);
      FASTODE_UNROLL for (int64_t c = 0; c < kLanes<A>; ++c) {
        if (first + c == length) break;
        store<Vec<A>>(places[tap] + in * step(), square[c]);
        if (++tap == count) tap = 0, ++in;
      }
    }
  }
  // The taps of one input lie within `span` elements from the `lowest` on.
  void turn_taps(int64_t lowest, int64_t span) const {
    constexpr int64_t lanes = kLanes<A>;
    for (int64_t first = lowest; first < lowest + span; first += lanes) {
      const int64_t count = std::min(lanes, lowest + span - first);
      A* places[lanes] = {};  // of the columns that are taps
      each_tap([&](A* place, int64_t tap) {
        if (tap >= first && tap < first + count) places[tap - first] = place;
      });
      for (int64_t in = 0; in < inputs; ++in) {
        Square<A> square;
        read_square<A, T>(square, from + in * weight.in + first, weight.out, outputs, count, weight.end);
        transpose(square);
        FASTODE_UNROLL for (int64_t c = 0; c < lanes; ++c) {
          if (c == count) break;
          if (places[c]) store<Vec<A>>(places[c] + in * step(), square[c]);
        }
      }
    }
  }

  static constexpr int64_t kMostSpan = 64;
};

// Weights of one direction in the order of conv.h, `taps` horizontal taps in a set.
template <class A, class T>
void pack_view(const ConvShape& shape, int64_t taps, const WeightView<T>& weight, A* packed) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t vectors = vectors_of<A>(shape.out_channels), width = vectors * lanes;
  const int64_t in_blocks = blocks_of<A>(shape.in_channels);
  const auto pack_cell = [&](int64_t group, int64_t first) {
    const int64_t inputs = std::min(lanes, shape.in_channels - first);
    A* to = packed + (group * shape.in_channels + first) * width * shape.kernel_h * shape.kernel_w;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t out = group * width + v * lanes, outputs = std::min(lanes, shape.out_channels - out);
      const T* from = weight.at + out * weight.out + first * weight.in;
      PackedCell<A, T>{shape, taps, outputs, inputs, width, weight, from, to + v * lanes}.pack();
    }
  };
  in_parallel(blocks_of<A>(shape.out_channels) / vectors * in_blocks, kCells, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) pack_cell(n / in_blocks, n % in_blocks * lanes);
  });
}

// f(first output, first input) for each block of outputs and one of inputs, shared out to the threads.
template <class A, class F>
void each_cell(const ConvShape& shape, const F& f) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t in_blocks = blocks_of<A>(shape.in_channels);
  in_parallel(blocks_of<A>(shape.out_channels) * in_blocks, kCells, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) f(n / in_blocks * lanes, n % in_blocks * lanes);
  });
}

// A block of outputs and one of inputs of a gradient, the parts' accumulators summed in order.
template <class A, class T>
struct GradientCell {
  const ConvShape& shape;
  int64_t outputs, inputs;
  const A* from;  // the first worker's
  int64_t worker_stride, workers;
  T* to;
  const int64_t* strides;

  int64_t row_at(int64_t in, int64_t ky, int64_t kx) const {
    return ((ky * kLanes<A> + in) * shape.kernel_w + kx) * kLanes<A>;
  }
  Vec<A> row(int64_t in, int64_t ky, int64_t kx) const {
    const A* at = from + row_at(in, ky, kx);
    Vec<A> sum = load<Vec<A>>(at);
    for (int64_t w = 1; w < workers; ++w) sum += load<Vec<A>>(at + w * worker_stride);
    return sum;
  }
  // Row `out` of a transposed square to what lies together from `at` on for every output.
  void write(Square<A>& square, T* at, int64_t count) const {
    transpose(square);
    FASTODE_UNROLL for (int64_t out = 0; out < kLanes<A>; ++out, at += strides[0]) {
      if (out == outputs) break;
      if (count == kLanes<A>)
        store_stored(at, square[out]);
      else
        for (int64_t c = 0; c < count; ++c) at[c] = to_storage<T>(A(square[out][c]));
    }
  }

  // One copy of it for all its callers: it is long.
  [[gnu::noinline]] void unpack() const {
    const int64_t height = shape.kernel_h, width = shape.kernel_w;
    if constexpr (std::is_same_v<A, Number<T>>) {
      if (strides[1] == 1) return write_inputs();
      if (strides[3] == 1 && strides[2] == width && strides[1] == height * width) return write_taps();
    }
    for (int64_t in = 0; in < inputs; ++in)
      for (int64_t ky = 0; ky < height; ++ky)
        for (int64_t kx = 0; kx < width; ++kx) {
          const Vec<A> sums = row(in, ky, kx);
          for (int64_t out = 0; out < outputs; ++out)
            to[out * strides[0] + in * strides[1] + ky * strides[2] + kx * strides[3]] = to_storage<T>(A(sums[out]));
        }
  }
  void write_inputs() const {
    for (int64_t ky = 0; ky < shape.kernel_h; ++ky)
      for (int64_t kx = 0; kx < shape.kernel_w; ++kx) {
        Square<A> square = {};
        FASTODE_UNROLL for (int64_t in = 0; in < kLanes<A>; ++in) {
          if (in == inputs) break;
          square[in] = row(in, ky, kx);
        }
        write(square, to + ky * strides[2] + kx * strides[3], inputs);
      }
  }
  // The taps of all inputs are one stretch of memory.
  void write_taps() const {
    const int64_t length = inputs * shape.kernel_h * shape.kernel_w;
    int64_t in = 0, ky = 0, kx = 0;
    const auto next = [&] {
      const Vec<A> found = row(in, ky, kx);
      if (++kx == shape.kernel_w) kx = 0, ++ky;
      if (ky == shape.kernel_h) ky = 0, ++in;
      return found;
    };
    for (int64_t first = 0; first < length; first += kLanes<A>) {
      const int64_t count = std::min<int64_t>(kLanes<A>, length - first);
      Square<A> square = {};
      FASTODE_UNROLL for (int64_t k = 0; k < kLanes<A>; ++k) {
        if (k == count) break;
        square[k] = next();
      }
      write(square, to + first, count);
    }
  }
};

}  // namespace fastode::resident

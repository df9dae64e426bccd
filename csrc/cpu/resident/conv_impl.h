// Packing, loops around the micro-kernels, unpacking. Included by one .cpp per arithmetic type.
#pragma once

#include "conv_kernels.h"
#include "packing.h"

namespace fastode::resident {

// Horizontal taps that share a broadcast.
inline int taps_of(const ConvShape& shape) { return shape.kernel_w == 3 ? 3 : 1; }

template <class A, class T>
void pack_weights(const ConvShape& shape, bool flip, const T* weight, const int64_t* strides, A* packed) {
  const WeightView<T> view(flip ? shape.transposed() : shape, weight, strides);
  pack_view(shape, taps_of(shape), flip ? view.back(shape.kernel_h - 1, shape.kernel_w - 1, 1) : view, packed);
}

template <class A>
void convolve(const Plane<A>& plane, const ConvShape& shape, const A* packed, const A* bias, const ConvJob<A>* jobs,
              int64_t count, Ahead* ahead) {
  constexpr int lanes = kLanes<A>;
  const int taps = taps_of(shape), vectors = vectors_of<A>(shape.out_channels);
  const ConvPlan<A> plan{plane.height,
                         plane.width,
                         shape.kernel_h / 2,
                         shape.kernel_w / 2,
                         blocks_of<A>(shape.out_channels),
                         vectors * lanes * shape.in_channels * shape.kernel_h * shape.kernel_w,
                         packed,
                         shape.in_channels,
                         shape.kernel_h,
                         shape.kernel_w / taps,
                         bias,
                         plane.height};
  if (taps == 3)
    vectors == 2 ? run_plan<A, 2, 3, 1>(plan, jobs, count, ahead) : run_plan<A, 1, 3, 1>(plan, jobs, count, ahead);
  else
    vectors == 2 ? run_plan<A, 2, 1, 1>(plan, jobs, count, ahead) : run_plan<A, 1, 1, 1>(plan, jobs, count, ahead);
}

// Input channels of a gradient tile.
template <class A>
inline constexpr int kInputs = std::min(kLanes<A>, kRegisters / 4);

inline constexpr int64_t kPairs = 16;  // pairs handled while a gradient tile stays in registers

// Of a kernel of one tap and an even number of output vectors, from cotangents of `height` and `width` whose inputs lie
// `step` apart: twelve input channels by two tiles of six, and what is left by smaller ones.
template <class A>
void sum_of_one_tap(int64_t height, int64_t width, int64_t step, const ConvShape& shape, const GradientPair<A>* pairs,
                    int64_t count, A* gradient) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t channels = blocks_of<A>(shape.in_channels) * lanes, by_six = channels / 12 * 12;
  GradientTile<A> tiles[kPairs];
  for (int64_t out = 0; out < shape.out_channels; out += 2 * lanes)
    for (int64_t in = 0, inputs; in < channels; in += inputs) {
      inputs = in < by_six ? 6 : kInputs<A>;
      const auto from_first = [&](int64_t channel, int64_t block) {
        return (channel / lanes - in / lanes) * block + channel % lanes - in % lanes;
      };
      for (int64_t n = 0; n < count; ++n) {
        const View<A>&input = pairs[n].in, &cotangent = pairs[n].cotangent;
        tiles[n] = {input.pixel_at(in / lanes, 0, 0) + in % lanes,
                    cotangent.pixel_at(out / lanes, 0, 0),
                    height,
                    width,
                    step * input.row,
                    step * lanes,
                    cotangent.row,
                    cotangent.block,
                    from_first(in + 2, input.block),
                    from_first(in + 4, input.block)};
      }
      const auto to = [&](int64_t channel) { return gradient + gradient_index<A>(shape, out, channel, 0, 0); };
      const int64_t vector_stride = channels * lanes;
      if (inputs == 6)
        gradient_tile_of_pairs<A>(tiles, count, {to(in), to(in + 2), to(in + 4)}, lanes, vector_stride);
      else
        gradient_tile<A, 2, kInputs<A>>(tiles, count, to(in), lanes, vector_stride);
    }
}

template <class A>
void weight_gradient(const Plane<A>& plane, const ConvShape& shape, const GradientPair<A>* pairs, int64_t count,
                     A* gradient) {
  if (count > kPairs) {
    weight_gradient(plane, shape, pairs, kPairs, gradient);
    return weight_gradient(plane, shape, pairs + kPairs, count - kPairs, gradient);
  }
  constexpr int lanes = kLanes<A>, inputs = kInputs<A>;
  const bool three = taps_of(shape) == 3;
  const int64_t out_blocks = blocks_of<A>(shape.out_channels), in_blocks = blocks_of<A>(shape.in_channels);
  const int64_t vectors = three ? 1 : vectors_of<A>(shape.out_channels);
  if constexpr (kRegisters == 16) {
    if (shape.kernel_h == 1 && shape.kernel_w == 1 && vectors == 2)
      return sum_of_one_tap(plane.height, plane.width, 1, shape, pairs, count, gradient);
  }
  const int64_t pad_y = shape.kernel_h / 2, pad_x = shape.kernel_w / 2;
  const int64_t vector_stride = in_blocks * lanes * lanes * shape.kernel_h * shape.kernel_w;
  GradientTile<A> tiles[kPairs];
  for (int64_t ob = 0; ob < out_blocks; ob += vectors)
    for (int64_t ib = 0; ib < in_blocks; ++ib)
      for (int64_t ky = 0; ky < shape.kernel_h; ++ky) {
        // Output rows whose input row ky - pad_y below them exists.
        const int64_t first = std::max<int64_t>(0, pad_y - ky);
        const int64_t rows = std::min(plane.height, plane.height + pad_y - ky) - first;
        if (rows <= 0) continue;
        for (int64_t i = 0; i < std::min<int64_t>(lanes, shape.in_channels - ib * lanes); i += inputs)
          for (int64_t kx = 0; kx < shape.kernel_w; kx += three ? 3 : 1) {
            for (int64_t n = 0; n < count; ++n)
              tiles[n] = {pairs[n].in.pixel_at(ib, first + ky - pad_y, kx - pad_x) + i,
                          pairs[n].cotangent.pixel_at(ob, first, 0),
                          rows,
                          plane.width,
                          pairs[n].in.row,
                          lanes,
                          pairs[n].cotangent.row,
                          pairs[n].cotangent.block};
            A* to = gradient + gradient_index<A>(shape, ob * lanes, ib * lanes + i, ky, kx);
            if (three)
              gradient_tile_of_three<A, inputs>(tiles, count, to);
            else if (vectors == 2)
              gradient_tile<A, 2, inputs>(tiles, count, to, shape.kernel_w * lanes, vector_stride);
            else
              gradient_tile<A, 1, inputs>(tiles, count, to, shape.kernel_w * lanes, vector_stride);
          }
      }
}

template <class A, class T>
void unpack_gradient(const ConvShape& shape, const A* gradient, int64_t worker_stride, int64_t workers, T* weight,
                     const int64_t* strides) {
  constexpr int64_t lanes = kLanes<A>;
  each_cell<A>(shape, [&](int64_t out, int64_t in) {
    const int64_t outputs = std::min(lanes, shape.out_channels - out), inputs = std::min(lanes, shape.in_channels - in);
    const A* from = gradient + gradient_index<A>(shape, out, in, 0, 0);
    T* to = weight + out * strides[0] + in * strides[1];
    GradientCell<A, T>{shape, outputs, inputs, from, worker_stride, workers, to, strides}.unpack();
  });
}

// What resident_conv_<type>.cpp instantiates: everything above in arithmetic of A, for weights of A or of T.
#define FASTODE_CONVOLUTIONS(keyword, A, T)                                                                         \
  keyword template void pack_weights(const ConvShape&, bool, const A*, const int64_t*, A*);                         \
  keyword template void pack_weights(const ConvShape&, bool, const T*, const int64_t*, A*);                         \
  keyword template void pack_view(const ConvShape&, int64_t, const WeightView<A>&, A*);                             \
  keyword template void pack_view(const ConvShape&, int64_t, const WeightView<T>&, A*);                             \
  keyword template void convolve(const Plane<A>&, const ConvShape&, const A*, const A*, const ConvJob<A>*, int64_t, \
                                 Ahead*);                                                                           \
  keyword template void weight_gradient(const Plane<A>&, const ConvShape&, const GradientPair<A>*, int64_t, A*);    \
  keyword template void unpack_gradient(const ConvShape&, const A*, int64_t, int64_t, A*, const int64_t*);          \
  keyword template void unpack_gradient(const ConvShape&, const A*, int64_t, int64_t, T*, const int64_t*);          \
  keyword template void run_plan<A, 1, 3, 1>(const ConvPlan<A>&, const ConvJob<A>*, int64_t, Ahead*);               \
  keyword template void run_plan<A, 2, 3, 1>(const ConvPlan<A>&, const ConvJob<A>*, int64_t, Ahead*);               \
  keyword template void run_plan<A, 1, 1, 1>(const ConvPlan<A>&, const ConvJob<A>*, int64_t, Ahead*);               \
  keyword template void run_plan<A, 2, 1, 1>(const ConvPlan<A>&, const ConvJob<A>*, int64_t, Ahead*);               \
  keyword template void gradient_tile<A, 1, kInputs<A>>(const GradientTile<A>*, int64_t, A*, int64_t, int64_t);     \
  keyword template void gradient_tile<A, 2, kInputs<A>>(const GradientTile<A>*, int64_t, A*, int64_t, int64_t)

FASTODE_CONVOLUTIONS(extern, float, bfloat16);
FASTODE_CONVOLUTIONS(extern, double, float);

}  // namespace fastode::resident

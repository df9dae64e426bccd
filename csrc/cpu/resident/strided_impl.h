// Packing and loops of strided.h around the micro-kernels. Included by one .cpp per arithmetic type.
#pragma once

#include "average_impl.h"
#include "conv_impl.h"

namespace fastode::resident {

template <class A, class T>
void pack_strided_back(const ConvShape& shape, const T* weight, const int64_t* strides, A* packed) {
  const WeightView<T> view(shape, weight, strides);
  each_parity(shape, [&](int64_t, int64_t, const ParityTaps& rows, const ParityTaps& columns) {
    const ConvShape part{shape.out_channels, shape.in_channels, rows.count, columns.count};
    pack_view(part, columns.count, view.back(rows.last, columns.last, 2), packed);
    packed += part.template packed_size<A>();
  });
}

template <class A, int taps, int step>
void run_strided(const ConvShape& shape, const ConvPlan<A>& plan, const ConvJob<A>* jobs, int64_t count, Ahead* ahead) {
  vectors_of<A>(shape.out_channels) == 2 ? run_plan<A, 2, taps, step>(plan, jobs, count, ahead)
                                         : run_plan<A, 1, taps, step>(plan, jobs, count, ahead);
}

template <class A>
ConvPlan<A> strided_plan(const ConvShape& shape, int64_t height, int64_t width, int64_t up, int64_t left,
                         const A* packed, int64_t taps, const A* bias, int64_t in_height) {
  const int64_t outputs = vectors_of<A>(shape.out_channels) * kLanes<A>;
  return {height,
          width,
          up,
          left,
          blocks_of<A>(shape.out_channels),
          outputs * shape.in_channels * shape.kernel_h * shape.kernel_w,
          packed,
          shape.in_channels,
          shape.kernel_h,
          shape.kernel_w / taps,
          bias,
          in_height};
}

template <class A>
void convolve_strided(const Plane<A>& in, const Plane<A>& out, const ConvShape& shape, const A* packed, const A* bias,
                      const ConvJob<A>* jobs, int64_t count, Ahead* ahead) {
  const int taps = taps_of(shape);
  const ConvPlan<A> plan =
      strided_plan(shape, out.height, out.width, shape.kernel_h / 2, shape.kernel_w / 2, packed, taps, bias, in.height);
  taps == 3 ? run_strided<A, 3, 2>(shape, plan, jobs, count, ahead)
            : run_strided<A, 1, 2>(shape, plan, jobs, count, ahead);
}

template <class A>
void fill_zero(const Plane<A>& plane, int64_t blocks, const View<A>& view) {
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t y = 0; y < plane.height; ++y)
      for (int64_t x = 0; x < plane.width; ++x) store<Vec<A>>(view.pixel_at(b, y, x), Vec<A>{});
}

template <class A>
void convolve_strided_back(const Plane<A>& in, const Plane<A>& out, const ConvShape& shape, const A* packed,
                           const ConvJob<A>* jobs, int64_t count, Ahead* ahead) {
  // A kernel of one row or column leaves inputs that no output has seen.
  if (shape.kernel_h == 1 || shape.kernel_w == 1)
    for (int64_t n = 0; n < count; ++n) fill_zero(in, blocks_of<A>(shape.in_channels), jobs[n].out);
  each_parity(shape, [&](int64_t py, int64_t px, const ParityTaps& rows, const ParityTaps& columns) {
    const ConvShape part{shape.out_channels, shape.in_channels, rows.count, columns.count};
    ConvJob<A> parts[kMostJobs];
    for (int64_t n = 0; n < count; ++n)
      parts[n] = {jobs[n].in, parity(jobs[n].out, py, px), parity(jobs[n].combine, py, px)};
    const int64_t height = (in.height - py + 1) / 2, width = (in.width - px + 1) / 2;
    const ConvPlan<A> plan =
        strided_plan<A>(part, height, width, rows.before, columns.before, packed, columns.count, nullptr, out.height);
    // A map of one row or column has none of the other parity, and tiles are of a row's width.
    if (height > 0 && width > 0)
      columns.count == 2 ? run_strided<A, 2, 1>(part, plan, parts, count, ahead)
                         : run_strided<A, 1, 1>(part, plan, parts, count, ahead);
    packed += part.template packed_size<A>();
  });
}

// Input channels of a tile of three taps and so many vectors.
template <class A, int vectors>
inline constexpr int kRowInputs = std::min(kLanes<A>, 4) / vectors;

// The weight gradient of stride 2 from cotangents of `height` and `width`, whose taps begin `up` rows and `left`
// columns before the pixel that they meet.
template <class A>
void sum_strided(int64_t height, int64_t width, const ConvShape& shape, int64_t up, int64_t left,
                 const GradientPair<A>* pairs, int64_t count, A* gradient) {
  if (count > kPairs) {
    sum_strided(height, width, shape, up, left, pairs, kPairs, gradient);
    return sum_strided(height, width, shape, up, left, pairs + kPairs, count - kPairs, gradient);
  }
  constexpr int lanes = kLanes<A>;
  const int64_t out_blocks = blocks_of<A>(shape.out_channels), in_blocks = blocks_of<A>(shape.in_channels);
  const int64_t vectors = vectors_of<A>(shape.out_channels);
  const int64_t vector_stride = in_blocks * lanes * lanes * shape.kernel_h * shape.kernel_w;
  if constexpr (kRegisters == 16) {
    if (shape.kernel_h == 1 && shape.kernel_w == 1 && vectors == 2)
      return sum_of_one_tap(height, width, 2, shape, pairs, count, gradient);
  }
  const bool row = kRegisters == 16 && shape.kernel_w == 3;  // a kernel's row at once
  const int inputs = !row ? kInputs<A> : vectors == 2 ? kRowInputs<A, 2> : kRowInputs<A, 1>;
  GradientTile<A> tiles[kPairs];
  for (int64_t ob = 0; ob < out_blocks; ob += vectors)
    for (int64_t ib = 0; ib < in_blocks; ++ib)
      for (int64_t i = 0; i < std::min<int64_t>(lanes, shape.in_channels - ib * lanes); i += inputs)
        for (int64_t ky = 0; ky < shape.kernel_h; ++ky)
          for (int64_t kx = 0; kx < shape.kernel_w; kx += row ? 3 : 1) {
            for (int64_t n = 0; n < count; ++n)
              tiles[n] = {pairs[n].in.pixel_at(ib, ky - up, kx - left) + i,
                          pairs[n].cotangent.pixel_at(ob, 0, 0),
                          height,
                          width,
                          2 * pairs[n].in.row,
                          2 * lanes,
                          pairs[n].cotangent.row,
                          pairs[n].cotangent.block};
            A* to = gradient + gradient_index<A>(shape, ob * lanes, ib * lanes + i, ky, kx);
            if constexpr (kRegisters == 16) {
              if (row) {
                vectors == 2 ? gradient_tile_of_row<A, kRowInputs<A, 2>, 2>(tiles, count, to, vector_stride)
                             : gradient_tile_of_row<A, kRowInputs<A, 1>, 1>(tiles, count, to, vector_stride);
                continue;
              }
            }
            if (vectors == 2)
              gradient_tile<A, 2, kInputs<A>>(tiles, count, to, shape.kernel_w * lanes, vector_stride);
            else
              gradient_tile<A, 1, kInputs<A>>(tiles, count, to, shape.kernel_w * lanes, vector_stride);
          }
}

template <class A>
void strided_weight_gradient(const Plane<A>& out, const ConvShape& shape, const GradientPair<A>* pairs, int64_t count,
                             A* gradient) {
  sum_strided(out.height, out.width, shape, shape.kernel_h / 2, shape.kernel_w / 2, pairs, count, gradient);
}

// What resident_conv_<type>.cpp instantiates: everything above in arithmetic of A, for weights of A or of T.
#define FASTODE_STRIDED(keyword, A, T)                                                                              \
  keyword template void pack_strided_back(const ConvShape&, const A*, const int64_t*, A*);                          \
  keyword template void pack_strided_back(const ConvShape&, const T*, const int64_t*, A*);                          \
  keyword template void convolve_strided(const Plane<A>&, const Plane<A>&, const ConvShape&, const A*, const A*,    \
                                         const ConvJob<A>*, int64_t, Ahead*);                                       \
  keyword template void convolve_strided_back(const Plane<A>&, const Plane<A>&, const ConvShape&, const A*,         \
                                              const ConvJob<A>*, int64_t, Ahead*);                                  \
  keyword template void sum_strided(int64_t, int64_t, const ConvShape&, int64_t, int64_t, const GradientPair<A>*,   \
                                    int64_t, A*);                                                                   \
  keyword template void strided_weight_gradient(const Plane<A>&, const ConvShape&, const GradientPair<A>*, int64_t, \
                                                A*);                                                                \
  FASTODE_AVERAGE(keyword, A);                                                                                      \
  keyword template void run_plan<A, 1, 2, 1>(const ConvPlan<A>&, const ConvJob<A>*, int64_t, Ahead*);               \
  keyword template void run_plan<A, 2, 2, 1>(const ConvPlan<A>&, const ConvJob<A>*, int64_t, Ahead*)

FASTODE_STRIDED(extern, float, bfloat16);
FASTODE_STRIDED(extern, double, float);

}  // namespace fastode::resident

// Packing and loops of the stride-2 pair around the micro-kernels. Included by one .cpp per arithmetic type.
#pragma once

#include "skew_narrow.h"
#include "strided_impl.h"

namespace fastode::resident {

// Four taps with two vectors of outputs, and their accumulators, need the larger register file.
inline constexpr int kDownTaps = kRegisters == 32 ? 4 : 2;
inline constexpr int kUpTaps = 2;

template <class A>
int64_t SkewShape::scratch_size() const {
  if constexpr (kWinograd<A>)
    if (winograd)
      return std::max({winograd_scratch_size<A>(down()), winograd_scratch_size<A>(up()),
                       winograd_gradient<A>() ? winograd_gradient_scratch_size<A>(down()) : 0});
  return narrow<A>() ? NarrowRows<A>(*this).size() : 0;
}

template <class A, class T>
void pack_skew(const SkewShape& shape, const T* weight, const int64_t* strides, A* down, A* up) {
  const bool narrow = shape.template narrow<A>();
  if (narrow) pack_narrow(shape, weight, strides, up);
  if (shape.stride == 1) {
    pack_either(shape.down(), shape.winograd, false, weight, strides, down);
    if (!narrow) pack_either(shape.up(), shape.winograd, true, weight, strides, up);
    return;
  }
  const WeightView<T> view(shape.down(), weight, strides);
  pack_view(shape.down(), kDownTaps, view, down);
  if (narrow) return;
  // Row 2 i + parity of z meets row j of y where 2 j + ky - 1 is it: rows i - 1 and i, or i and i + 1.
  for (int64_t py = 0; py < 2; ++py)
    for (int64_t px = 0; px < 2; ++px, up += shape.up().template packed_size<A>())
      pack_view(shape.up(), kUpTaps, view.back(3 - py, 3 - px, 2), up);
}

template <class A, int taps, int step>
void run_skew(const ConvShape& shape, const A* packed, const Plane<A>& out, int64_t up, int64_t left,
              const ConvJob<A>& job, Ahead* ahead) {
  const int64_t vectors = vectors_of<A>(shape.out_channels);
  const ConvPlan<A> plan{out.height,
                         out.width,
                         up,
                         left,
                         blocks_of<A>(shape.out_channels),
                         vectors * kLanes<A> * shape.in_channels * shape.kernel_h * shape.kernel_w,
                         packed,
                         shape.in_channels,
                         shape.kernel_h,
                         shape.kernel_w / taps,
                         nullptr};
  vectors == 2 ? run_plan<A, 2, taps, step>(plan, &job, 1, ahead) : run_plan<A, 1, taps, step>(plan, &job, 1, ahead);
}

template <class A>
void skew_down(const SkewShape& shape, const A* packed, const ConvJob<A>& job, A* scratch, Ahead* ahead) {
  const Plane<A> plane = shape.y_plane<A>();
  const ConvShape down = shape.down();
  if constexpr (kWinograd<A>)
    if (shape.winograd) return convolve_winograd<A>(plane, down, packed, nullptr, &job, 1, scratch, ahead);
  if (shape.stride == 2) return run_skew<A, kDownTaps, 2>(down, packed, plane, 1, 1, job, ahead);
  const int64_t pad = shape.halo();
  // Not convolve(), which takes what lies above and below the plane for halo: here it may be the next band.
  taps_of(down) == 3 ? run_skew<A, 3, 1>(down, packed, plane, pad, pad, job, ahead)
                     : run_skew<A, 1, 1>(down, packed, plane, pad, pad, job, ahead);
}

template <class A>
void skew_up(const SkewShape& shape, const A* packed, const NormRows<A>* norm, const ConvJob<A>& job, A* scratch,
             Ahead* ahead) {
  if (shape.narrow<A>()) return narrow_up(shape, packed, norm, job, scratch, ahead);
  const Plane<A> plane = shape.y_plane<A>();
  if constexpr (kWinograd<A>)
    if (shape.winograd) return convolve_winograd<A>(plane, shape.up(), packed, nullptr, &job, 1, scratch, ahead);
  if (shape.stride == 1) return convolve<A>(plane, shape.up(), packed, nullptr, &job, 1, ahead);
  for (int64_t py = 0; py < 2; ++py)
    for (int64_t px = 0; px < 2; ++px, packed += shape.up().template packed_size<A>()) {
      ConvJob<A> part = job;
      part.out = parity(job.out, py, px);
      for (int i = 0; i < job.combine.count; ++i) part.combine.term[i] = parity(job.combine.term[i], py, px);
      run_skew<A, kUpTaps, 1>(shape.up(), packed, plane, 1 - py, 1 - px, part, ahead);
    }
}

template <class A>
void skew_weight_gradient(const SkewShape& shape, const GradientPair<A>* pairs, int64_t count, const NormRows<A>* norm,
                          A* gradient, A* scratch, Ahead* ahead) {
  const ConvShape down = shape.down();
  if (shape.narrow_gradient<A>()) return narrow_weight_gradient(shape, pairs, count, norm, gradient, scratch, ahead);
  if constexpr (kWinograd<A>)
    if (shape.winograd_gradient<A>())
      return winograd_gradient<A>(shape.y_plane<A>(), down, pairs, count, gradient, false, scratch);
  if (shape.stride == 1) return weight_gradient<A>(shape.y_plane<A>(), down, pairs, count, gradient);
  sum_strided(shape.height, shape.width, down, 1, 1, pairs, count, gradient);
}

}  // namespace fastode::resident

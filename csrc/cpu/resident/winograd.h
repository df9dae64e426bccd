// Convolutions of 3x3 and stride 1 by Winograd's minimal filtering F(2x2, 3x3): of a tile of two rows and two columns
// of outputs sixteen products are summed for each pair of channels, where the direct sum has thirty-six.
//
//   value             Y = A' [sum over input channels of (G g G') * (B' d B)] A
//   weight gradient   dg = G' [sum over tiles of (B' d B) * (A y A')] G
//
// d: the 4x4 inputs under a tile, g: a kernel, y: the 2x2 cotangents; * multiplies element by element.
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015, Section 4.1, with its A, B and G.
#pragma once

#include "packing.h"

namespace fastode::resident {

// In float32 alone: bfloat16 has its own (conv_bf16.h), and float64 is there for its exactness.
template <class A>
inline constexpr bool kWinograd = std::is_same_v<A, float>;

// The products that are saved for each pair of channels, of those that meet the image; none where it cannot be done so.
template <class A>
int64_t winograd_saves(const Plane<A>& plane, const ConvShape& shape, int64_t samples) {
  const int64_t height = plane.height, width = plane.width;
  const bool kernel = shape.kernel_h == 3 && shape.kernel_w == 3 && shape.stride == 1;
  const bool sides = height % 2 == 0 && width % 2 == 0;
  return kernel && sides ? samples * ((3 * height - 2) * (3 * width - 2) - 4 * height * width) : 0;
}

// Whether a convolution of so many samples is faster so. Of few channels, tiles take as long to transform as to
// multiply. Of few pixels, weights take longest to bring in, and here they are nearly twice as large: the products that
// are saved for each pair of channels, of those that meet the image, are to make up for it.
template <class A>
bool suits_winograd(const Plane<A>& plane, const ConvShape& shape, int64_t samples) {
  const bool channels = std::min(shape.in_channels, shape.out_channels) >= 16;
  const int64_t worth = 4 * (shape.in_channels + shape.out_channels), most = kVectorBytes == 64 ? worth : 640;
  return kWinograd<A> && channels && winograd_saves(plane, shape, samples) >= std::min(worth, most);
}

// The same of samples that come one at a time, each of which reads the weights again.
template <class A>
bool suits_winograd_alone(const Plane<A>& plane, const ConvShape& shape, int64_t samples) {
  constexpr int64_t worth = kVectorBytes == 64 ? 8 : 5;
  return suits_winograd(plane, shape, samples) &&
         worth * winograd_saves(plane, shape, 1) >= shape.in_channels + shape.out_channels;
}

// Whether the weight gradient of one that is so is, too.
template <class A>
bool suits_winograd_gradient(const ConvShape& shape) {
  return blocks_of<A>(shape.in_channels) * blocks_of<A>(shape.out_channels) > 1;
}

inline constexpr int kProducts = 16;  // of a tile, for each pair of channels

inline constexpr bool kProductsApart = kVectorBytes < 64;  // winograd_impl.h
template <class A>
inline constexpr int64_t kLine = 64 / sizeof(A);  // elements of a line of the cache

// Elements of packed weights, G g G', and of a weight gradient before it is G' (...) G (winograd_impl.h).
template <class A>
int64_t winograd_size(const ConvShape& shape) {
  const int64_t outputs = blocks_of<A>(shape.out_channels), groups = outputs / vectors_of<A>(shape.out_channels);
  const int64_t lines = kProductsApart ? groups * kLine<A> : 0;
  return kProducts * (outputs * blocks_of<A>(shape.in_channels) * kLanes<A> * kLanes<A> + lines);
}

// Elements of scratch that a call of convolve_winograd needs, and one of winograd_gradient.
template <class A>
int64_t winograd_scratch_size(const ConvShape& shape);
template <class A>
int64_t winograd_gradient_scratch_size(const ConvShape& shape);

// As pack_weights(), in winograd_size elements.
template <class A, class T>
void pack_winograd(const ConvShape& shape, bool flip, const T* weight, const int64_t* strides, A* packed);

// As convolve(). Inputs that are not finite spoil no more outputs than there.
template <class A>
void convolve_winograd(const Plane<A>& plane, const ConvShape& shape, const A* packed, const A* bias,
                       const ConvJob<A>* jobs, int64_t count, A* scratch, Ahead* ahead = nullptr);

// As weight_gradient(), in winograd_size elements, which need hold nothing yet if `fresh`. The pairs' inputs have a
// zero halo.
template <class A>
void winograd_gradient(const Plane<A>& plane, const ConvShape& shape, const GradientPair<A>* pairs, int64_t count,
                       A* gradient, bool fresh, A* scratch);

// As unpack_gradient().
template <class A, class T>
void unpack_winograd_gradient(const ConvShape& shape, const A* gradient, int64_t part_stride, int64_t parts, T* weight,
                              const int64_t* strides);

// Of a convolution that is done so, or else directly: elements of its packed weights and of their gradient.
template <class A>
int64_t weights_size(const ConvShape& shape, bool winograd) {
  return winograd ? winograd_size<A>(shape) : shape.template packed_size<A>();
}
template <class A>
int64_t gradient_size(const ConvShape& shape, bool winograd) {
  return winograd ? winograd_size<A>(shape) : shape.template gradient_size<A>();
}

// As pack_weights() and unpack_gradient(), for either.
template <class A, class T>
void pack_either(const ConvShape& shape, bool winograd, bool flip, const T* weight, const int64_t* strides, A* packed) {
  if constexpr (kWinograd<A>)
    if (winograd) return pack_winograd(shape, flip, weight, strides, packed);
  pack_weights(shape, flip, weight, strides, packed);
}
template <class A, class T>
void unpack_either(const ConvShape& shape, bool winograd, const A* gradient, int64_t part_stride, int64_t parts,
                   T* weight, const int64_t* strides) {
  if constexpr (kWinograd<A>)
    if (winograd) return unpack_winograd_gradient(shape, gradient, part_stride, parts, weight, strides);
  unpack_gradient(shape, gradient, part_stride, parts, weight, strides);
}

}  // namespace fastode::resident

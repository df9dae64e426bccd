// Convolutions of bfloat16 maps with float32 sums, on AMX tiles or by AVX-512's dot products of pairs: for tensors
// stored in bfloat16, whose convolutions PyTorch multiplies in bfloat16 too. Statistics and what is done between two
// convolutions are float32 arithmetic on maps stored in bfloat16, as PyTorch's are.
#pragma once

#include "strided.h"
#include "winograd.h"

namespace fastode::resident {

// Whether programs in this arithmetic may multiply on tiles.
template <class A>
inline constexpr bool kOnTiles = kTiles && std::is_same_v<A, float>;

inline constexpr int64_t kTilePixels = 16;  // of one tile; smaller maps would leave most of it empty

// Whether this build has the kernels and, where they need tiles, the operating system lets this process use them.
bool has_tiles();

// The layout of a map that a convolution on tiles reads: the pixels of a Plane<float>, each with all its channels.
// These are padded to a multiple of 32, so that a tile's row of 64 bytes lies in one pixel; or to 16 where there are no
// more, and then a tile's row is two neighbouring pixels. Where an image's rows are short, the pixels of `together`
// samples alternate, which makes the rows so many times longer. Tiles that reach over the last row read, and drop, some
// padding at the end.
struct Narrow {
  static constexpr int64_t lanes = 16;  // of a block of a View
  int64_t together, depth;              // depth: elements of a pixel of one sample
  int64_t pixel, row, origin, elements;

  Narrow(const Plane<float>& plane, int64_t channels, int64_t together)
      : together(together),
        depth(channels <= lanes ? lanes : divide_up(channels, 2 * lanes) * 2 * lanes),
        pixel(together * depth),
        row((plane.width + plane.halo) * pixel),
        origin(plane.halo * (row + pixel)),
        elements((plane.height + 2 * plane.halo) * row + 2 * plane.halo * pixel + 17 * depth) {}

  // Of the first sample; the others follow at distances of `depth`.
  View<bfloat16> view(bfloat16* base) const { return {base + origin, row, pixel, lanes}; }

  // Zeros around the pixels and behind them, or everywhere.
  void clear(const Plane<float>& plane, bfloat16* base, bool everywhere) const {
    if (everywhere) return void(std::fill_n(base, elements, bfloat16{}));
    std::fill_n(base, origin, bfloat16{});
    bfloat16* end = base + origin;  // of what is done
    for (int64_t y = 0; y < plane.height; ++y, end += row)
      std::fill_n(end + plane.width * pixel, plane.halo * pixel, bfloat16{});
    std::fill(end, base + elements, bfloat16{});
  }

  // How many samples of a group fill the rows of tiles, or the rows that dot products multiply at once with one pixel
  // of each, which lets them leave out the taps beside the image; one where a tile row is two pixels. Of a group that
  // they do not divide the last places are empty, but multiplied.
  static int64_t samples_together(const Plane<float>& plane, int64_t fewest_channels, int64_t group) {
    constexpr int64_t wanted = 32;  // of a weight gradient's sum; two tiles of a convolution
    const int64_t most = plane.width == 8 && !FASTODE_AMX ? 2 * wanted : wanted;
    constexpr int64_t at_once = FASTODE_AMX ? 16 : 8;  // rows
    if (fewest_channels <= lanes || plane.width > wanted / 2 || wanted % plane.width) return 1;
    int64_t best = 1, least = INT64_MAX;
    for (int64_t count = 1; count < 2 * group && count * plane.width <= most; count *= 2) {
      const int64_t places = divide_up(group, count) * count;
      const int64_t row = plane.width + (count * plane.width % kTilePixels ? plane.halo : 0);
      const int64_t taps = 3 * plane.width - (count % at_once ? 0 : 2);  // of a row of a 3x3 kernel
      if (places * row * taps <= least) best = count, least = places * row * taps;
    }
    return best;
  }
};

// In float32 elements.
int64_t tile_weights_size(const ConvShape& shape);

// As pack_weights, for `convolve` below.
template <class T>
void pack_tile_weights(const ConvShape& shape, bool flip, const T* weight, const int64_t* strides, float* packed);

// As conv.h's; the inputs are Narrow maps, and `together` jobs one after the other are those of one of them.
void convolve(const Plane<float>& plane, const ConvShape& shape, int64_t together, const float* packed,
              const float* bias, const ConvJob<bfloat16>* jobs, int64_t count, Ahead* ahead);

// The same of 3x3 by Winograd's filtering, as winograd.h says, in integers (winograd_bf16_impl.h); of stride 2, and its
// pull-back, too, where the inputs are one Narrow map. AMX multiplies so fast that there is nothing to save.
inline constexpr bool kNarrowWinograd = kTiles && !FASTODE_AMX;
enum class Filtering { kStraight, kHalving, kDoubling };

// Whether a convolution of so many samples is faster so: the products that are saved for each pair of channels, of
// those that meet the image, make up for weights that take longer to pack, and with few channels for the tiles'
// transforms.
inline bool suits_narrow_winograd(const Plane<float>& plane, const ConvShape& shape, int64_t samples) {
  const int64_t channels = std::min(shape.in_channels, shape.out_channels);
  const int64_t counted = channels < 32 ? channels * channels / 32 : std::min<int64_t>(channels, 64);
  if (!kNarrowWinograd || channels <= Narrow::lanes) return false;
  if (shape.stride == 1) return winograd_saves(plane, shape, samples) * counted >= 100000;
  const bool whole = shape.kernel_h == 3 && shape.kernel_w == 3 && plane.height % 4 == 0 && plane.width % 4 == 0;
  const int64_t height = plane.height / 2, width = plane.width / 2;  // of the output
  const int64_t saves = (3 * height - 1) * (3 * width - 1) - height * width * 25 / 4;
  return whole && samples * saves * counted >= 40000;
}

// Whether the weight gradient of one that is so is, too; `plane` is that of the cotangent. Of many channels each
// worker's sums, which are added up at last, are larger than what is saved unless there are many tiles.
inline bool suits_narrow_winograd_gradient(const Plane<float>& plane, const ConvShape& shape, int64_t samples) {
  const int64_t tiles = samples * plane.pixels() / 4, weights = shape.in_channels * shape.out_channels;
  return plane.width % 4 == 0 && (weights <= 128 * 128 || tiles * 128 >= weights);
}

// A tensor [out, in, kh, kw] of weights, float32 or bfloat16, as a direct sum multiplies them.
struct KernelView {
  const void* at = nullptr;
  bool narrow = false;
  int64_t out = 0, in = 0, y = 0, x = 0;  // strides in elements

  float operator()(int64_t o, int64_t i, int64_t ky, int64_t kx) const {
    const int64_t place = o * out + i * in + ky * y + kx * x;
    return widen(narrow ? static_cast<const bfloat16*>(at)[place]
                        : fastode::narrow(static_cast<const float*>(at)[place]));
  }
  // Of the convolution that pulls back one of 3x3.
  KernelView back() const {
    const int64_t last = (2 * y + 2 * x) * static_cast<int64_t>(narrow ? sizeof(bfloat16) : sizeof(float));
    return {static_cast<const char*>(at) + last, narrow, in, out, -y, -x};
  }
};

// In float32 elements, and of scratch in bytes.
int64_t narrow_winograd_size(const ConvShape& shape);
int64_t narrow_winograd_scratch_size(const ConvShape& shape, Filtering way);

template <class T>
void pack_narrow_winograd(const ConvShape& shape, Filtering way, bool flip, const T* weight, const int64_t* strides,
                          float* packed);

// `plane` is that of the output, of a pull-back that of its input. `kernels`: the weights that are packed, for sums
// that are direct because they are not finite.
void convolve_winograd(const Plane<float>& plane, const ConvShape& shape, Filtering way, const float* packed,
                       const KernelView& kernels, const float* bias, const ConvJob<bfloat16>* jobs, int64_t count,
                       void* scratch, Ahead* ahead);

// Its weight gradient, as winograd.h's; `plane` is the cotangent's.
int64_t narrow_winograd_gradient_scratch_size(const ConvShape& shape);
void winograd_gradient(const Plane<float>& plane, const ConvShape& shape, const GradientPair<bfloat16>* pairs,
                       int64_t count, float* gradient, bool fresh, void* scratch);

// gradient += sum over the pairs, both Narrow maps, in the layout of conv.h's weight_gradient. The pairs come in sets
// of `together`; what is missing of the last set is zero. `scratch` holds tile_scratch_size bytes.
void weight_gradient(const Plane<float>& plane, const ConvShape& shape, int64_t together,
                     const GradientPair<bfloat16>* pairs, int64_t count, float* gradient, void* scratch);

int64_t tile_scratch_size(const Plane<float>& plane, const ConvShape& shape, int64_t together, int64_t pairs);

// The same of stride 2, as strided.h says. The inputs are four Narrow maps on the output's plane: the pixels of one
// parity each, (0, 0) first, `phase` elements apart, and zero where there are none.
int64_t strided_tile_weights_size(const ConvShape& shape, bool back);

template <class T>
void pack_strided_tile_weights(const ConvShape& shape, bool back, const T* weight, const int64_t* strides,
                               float* packed);

void convolve_strided(const Plane<float>& out, const ConvShape& shape, int64_t together, int64_t phase,
                      const float* packed, const float* bias, const ConvJob<bfloat16>* jobs, int64_t count,
                      Ahead* ahead);

// The inputs are cotangents of the convolution's output, the outputs on the plane `in`.
void convolve_strided_back(const Plane<float>& in, const Plane<float>& out, const ConvShape& shape, int64_t together,
                           const float* packed, const ConvJob<bfloat16>* jobs, int64_t count, Ahead* ahead);

void strided_weight_gradient(const Plane<float>& out, const ConvShape& shape, int64_t together, int64_t phase,
                             const GradientPair<bfloat16>* pairs, int64_t count, float* gradient, void* scratch);

int64_t strided_tile_scratch_size(const Plane<float>& out, const ConvShape& shape, int64_t together, int64_t pairs);

}  // namespace fastode::resident

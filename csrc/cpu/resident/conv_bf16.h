// Convolutions of bfloat16 maps with float32 sums, on AMX tiles: for tensors stored in bfloat16, whose convolutions
// PyTorch multiplies in bfloat16 too. Sums, statistics and everything between two convolutions stay float32 planes.
#pragma once

#include "conv.h"

namespace fastode::resident {

inline constexpr int64_t kTilePixels = 16;  // of one tile; smaller maps would leave most of it empty

// Whether this build has the kernels and the operating system lets this process use the tiles.
bool has_tiles();

// A bfloat16 map on the pixels of a Plane<float>: blocks of 32 channels, or of 16 if there are no more, so that a tile
// row of 64 bytes is one pixel, or two neighbours. Behind the blocks come `slack` elements: one pixel of zeros, and
// what tiles that reach over the last row read and drop.
struct Narrow {
  static constexpr int64_t lanes = 16;  // a float32 map's
  int64_t depth, blocks, size, slack;   // channels of a block, blocks, elements of a block and behind all

  Narrow(const Plane<float>& plane, int64_t channels)
      : depth(channels <= lanes ? lanes : 2 * lanes),
        blocks(divide_up(channels, depth)),
        size(plane.size / lanes * depth),
        slack((plane.halo + 17) * depth) {}

  int64_t elements() const { return blocks * size + slack; }
  // Where the 16 channels of a float32 map's block `b` begin, at its first pixel; pixels are `depth` apart.
  int64_t begin(int64_t b) const { return depth == lanes ? 0 : b / 2 * size + b % 2 * lanes; }
};

// Zeroes what is no pixel of an image, and the channels that fill the last block up.
void clear_narrow_halo(const Plane<float>& plane, int64_t channels, bfloat16* map);

// Rounds a map of `channels` channels; the halo becomes zero.
void narrow_map(const Plane<float>& plane, int64_t channels, const View<float>& from, bfloat16* to);

// In float32 elements.
int64_t tile_weights_size(const ConvShape& shape);

// As pack_weights, for `convolve` below.
template <class T>
void pack_tile_weights(const ConvShape& shape, bool flip, const T* weight, const int64_t* strides, float* packed);

// As ConvJob, from a Narrow map.
struct TileJob {
  const bfloat16* in;
  View<float> out;
  Combine<float> combine = {};
};

void convolve(const Plane<float>& plane, const ConvShape& shape, const float* packed, const float* bias,
              const TileJob* jobs, int64_t count);

// gradient += sum over the pairs, both padded planes with zero halos and rounded here, in the layout of conv.h's
// weight_gradient; `scratch` holds tile_scratch_size bytes.
void weight_gradient(const Plane<float>& plane, const ConvShape& shape, const GradientPair<float>* pairs, int64_t count,
                     float* gradient, void* scratch);

int64_t tile_scratch_size(const Plane<float>& plane, int64_t in_channels, int64_t out_channels, int64_t pairs);

}  // namespace fastode::resident

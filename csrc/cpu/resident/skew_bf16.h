// The skew pair's W, its transpose and its weight gradient of bfloat16 maps with float32 sums, as conv_bf16.h's.
#pragma once

#include <vector>

#include "conv_bf16.h"
#include "skew_conv.h"

namespace fastode::resident {

// The layout of a map that tiles read: the pixels of y's plane with its halo, each with all its channels, padded to 16
// or to a multiple of 32. Tiles that reach over the last pixel read, and drop, some padding at the end.
struct TileMap {
  int64_t row = 0, origin = 0, depth = 0, size = 0;  // in pixels: row, origin; elements of a pixel; of a plane

  TileMap() = default;
  TileMap(const Plane<float>& plane, int64_t channels)
      : row(plane.width + plane.halo),
        origin(plane.halo * (row + 1)),
        depth(channels <= 16 ? 16 : divide_up(channels, 32) * 32),
        size(divide_up(((plane.height + 2 * plane.halo) * row + 2 * plane.halo + 17) * depth, 32) * 32) {}
};

// z at stride 2 is four planes, one for each parity of its rows and columns: W is then a 2 x 2 convolution of every one
// of them, summed, and a tap of the weight gradient is an offset in one of them.
class SkewTiles {
 public:
  SkewTiles() = default;
  explicit SkewTiles(const SkewShape& shape);

  explicit operator bool() const { return on_; }

  int64_t y_size() const { return y_.size; }  // elements
  int64_t z_size() const { return shape_.stride * shape_.stride * z_.size; }
  int64_t down_size() const;  // of the packed weights, in float32 elements
  int64_t up_size() const;
  int64_t gradient_scratch() const;  // elements

  // As pack_skew.
  template <class T>
  void pack(const T* weight, const int64_t* strides, float* down, float* up) const;

  // Rounds rows of y or z, from `first` on, into a map that was zero.
  void round(bool y, const View<float>& from, int64_t first, int64_t rows, bfloat16* to) const;

  // Rows of combine(W z), from `first` on, which is where `out` and the terms begin.
  void down(const float* packed, const bfloat16* z, int64_t first, int64_t rows, const View<float>& out,
            const Combine<float>& combine, Ahead* ahead) const;

  // combine(W^T y) at the rows of z that rows of y, from `first` on, are the first to meet; likewise.
  void up(const float* packed, const bfloat16* y, int64_t first, int64_t rows, const View<float>& out,
          const Combine<float>& combine, Ahead* ahead) const;

  // As skew_weight_gradient, of one pair.
  void weight_gradient(const bfloat16* z, const bfloat16* y, float* gradient, bfloat16* scratch) const;

 private:
  ConvShape part() const;  // of W and its transpose for one parity; W's own at stride 1
  int64_t chunks() const { return divide_up(shape_.height * y_.row, 32); }
  int64_t pitch() const;

  bool on_ = false;
  SkewShape shape_ = {};
  TileMap y_, z_;
  std::vector<int64_t> down_rows_, up_rows_;  // where the summed rows of taps begin
};

}  // namespace fastode::resident

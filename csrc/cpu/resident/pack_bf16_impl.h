// Weights for products of bfloat16 matrices, packed in the order of their steps. Included by conv_bf16_impl.h.
#pragma once

#include <vector>

#include "conv_bf16.h"
#include "packing.h"
#include "pairs.h"
#include "products.h"

namespace fastode::resident {
namespace {

// The steps of a convolution's sum: 32 channels of one tap, or 16 channels of two neighbouring taps.
struct Steps {
  bool paired;
  int64_t blocks, high, wide, taps;  // taps: of a kernel's row
  int64_t pairs;                     // of a tap's inputs

  explicit Steps(const ConvShape& shape)
      : paired(shape.in_channels <= Narrow::lanes),
        blocks(paired ? 1 : divide_up(shape.in_channels, kTileDepth)),
        high(shape.kernel_h),
        wide(paired ? divide_up(shape.kernel_w, 2) : shape.kernel_w),
        taps(shape.kernel_w),
        pairs(divide_up(shape.in_channels, 2)) {}

  int64_t count() const { return blocks * high * wide; }
  // Input channels of a block.
  int64_t depth() const { return paired ? Narrow::lanes : kTileDepth; }
  // Where the weights of a tap's blocks lie one after the other, `kPairwise`: elements of one output tile's from a tap
  // to the next, and whether these are all pairs of inputs and no padding.
  int64_t tap() const { return paired ? kTileElements / 2 : blocks * kTileElements; }
  bool full() const { return pairs * kTileDepth == tap(); }
};

// From one to the next in packed weights of groups of `group` output tiles: a tile, and a pair of its, a block of input
// channels and a kernel's step. Sums of pairs go over all blocks of a row's steps at once, those of tiles over all taps
// of a block, whose inputs stay in the first cache.
struct PackedOrder {
  int64_t tile, pair, block, step;

  PackedOrder(const Steps& steps, int64_t group)
      : tile(kPairwise ? kTileDepth : kTileElements),
        pair(kPairwise ? group * kTileDepth : kTileDepth),
        block((kPairwise ? 1 : steps.high * steps.wide) * group * kTileElements),
        step((kPairwise ? steps.blocks : 1) * group * kTileElements) {}
};

inline int64_t group_of(int64_t tiles) { return tiles % 2 == 0 ? 2 : 1; }

}  // namespace

int64_t tile_weights_size(const ConvShape& shape) {
  return blocks_of<float>(shape.out_channels) * Steps(shape).count() * kTileElements / 2;
}

namespace {

// Whose weights a tile has: 16 output channels in one block of a kernel's steps.
template <class T>
struct PackedTile {
  const ConvShape& shape;
  const Steps& steps;
  const WeightView<T>& weight;
  const T* from;  // of its first output and input
  int64_t outputs, inputs;
  PackedOrder order;
  bfloat16* to;  // the first step's

  static __mmask16 mask_of(int64_t count) {
    return static_cast<__mmask16>((1 << std::clamp<int64_t>(count, 0, kTileRows)) - 1);
  }
  // Where the inputs `in` and in + 1 of a tap lie, for all outputs.
  bfloat16* place(int64_t in, int64_t ky, int64_t kx) const {
    const int64_t step = ky * steps.wide + (steps.paired ? kx / 2 : kx);
    return to + step * order.step + (in / 2 + (steps.paired ? kx % 2 * kTileRows / 2 : 0)) * order.pair;
  }
  struct Tile {
    Words rows[kTileRows];
  };
  void put(int64_t step, const Tile& tile) const {
    bfloat16* at = to + step * order.step;
    for (const Words& row : tile.rows) std::memcpy(at, &row, sizeof(row)), at += order.pair;
  }
  template <class F>
  void each_tap(const F& f) const {
    for (int64_t ky = 0; ky < shape.kernel_h; ++ky)
      for (int64_t kx = 0; kx < shape.kernel_w; ++kx) f(ky, kx, ky * weight.y + kx * weight.x);
  }

  void pack() const {
    if (weight.in == 1) return turn_inputs();
    if (inputs < steps.depth() || (steps.paired && shape.kernel_w % 2))
      for (int64_t step = 0; step < steps.high * steps.wide; ++step) put(step, Tile{});
    if (weight.out == 1) return copy_outputs();
    const int64_t up = (shape.kernel_h - 1) * weight.y, along = (shape.kernel_w - 1) * weight.x;
    const int64_t span = std::abs(up) + std::abs(along) + 1;
    if (span <= kMostSpan) return turn_taps(std::min<int64_t>(0, up) + std::min<int64_t>(0, along), span);
    each_tap([&](int64_t ky, int64_t kx, int64_t tap) { turn_tap(ky, kx, tap); });
  }
  void copy_outputs() const {
    const __mmask16 mask = mask_of(outputs);
    each_tap([&](int64_t ky, int64_t kx, int64_t tap) {
      for (int64_t in = 0; in < inputs; in += 2) {
        const T* at = from + in * weight.in + tap;
        const Words pairs = paired(load_both(mask, at, in + 1 < inputs ? mask : 0, at + weight.in));
        std::memcpy(place(in, ky, kx), &pairs, sizeof(pairs));
      }
    });
  }
  void turn_inputs() const {
    const int64_t beside = steps.paired ? weight.x : kTileRows;
    for (int64_t ky = 0; ky < steps.high; ++ky)
      for (int64_t step = 0; step < steps.wide; ++step) {
        const int64_t kx = steps.paired ? 2 * step : step;
        const int64_t more = !steps.paired ? inputs - kTileRows : kx + 1 < shape.kernel_w ? inputs : 0;
        const __mmask16 mask = mask_of(inputs), other = mask_of(more);
        const T* at = from + ky * weight.y + kx * weight.x;
        Tile tile;
        for (int64_t lane = 0; lane < kTileRows; ++lane, at += weight.out)
          tile.rows[lane] = lane < outputs ? reinterpret_cast<Words>(load_both(mask, at, other, at + beside)) : Words{};
        transpose(tile.rows);
        put(ky * steps.wide + step, tile);
      }
  }
  // `count` neighbours of the inputs `in` and in + 1, from `at` on, for all outputs.
  void turn(int64_t in, const T* at, int64_t count, Words* rows) const {
    const __mmask16 mask = mask_of(count), other = in + 1 < inputs ? mask : 0;
    for (int64_t lane = 0; lane < kTileRows; ++lane, at += weight.out)
      rows[lane] = lane < outputs ? paired(load_both(mask, at, other, at + weight.in)) : Words{};
    transpose(rows);
  }
  // All taps lie within `span` elements from the `lowest` on.
  void turn_taps(int64_t lowest, int64_t span) const {
    for (int64_t in = 0; in < inputs; in += 2)
      for (int64_t first = 0; first < span; first += kTileRows) {
        Words rows[16];
        turn(in, from + in * weight.in + lowest + first, span - first, rows);
        each_tap([&](int64_t ky, int64_t kx, int64_t tap) {
          const int64_t column = tap - lowest - first;
          if (column >= 0 && column < kTileRows) std::memcpy(place(in, ky, kx), rows + column, sizeof(Words));
        });
      }
  }
  void turn_tap(int64_t ky, int64_t kx, int64_t tap) const {
    for (int64_t in = 0; in < inputs; in += 2) {
      Words rows[16];
      turn(in, from + in * weight.in + tap, 1, rows);
      std::memcpy(place(in, ky, kx), rows, sizeof(Words));
    }
  }

  static constexpr int64_t kMostSpan = 64;
};

// A kernel and its weights.
template <class T>
struct Part {
  ConvShape shape;
  WeightView<T> weight;
};

// Packs kernels of the same outputs, for each group of output tiles one after the other, each in its `PackedOrder`; a
// pair of summed numbers is [output channel][of the pair].
template <class T>
void pack_parts(const std::vector<Part<T>>& parts, float* packed) {
  struct Cell {
    const Part<T>* part;
    int64_t tile, block;
    bfloat16* to;
  };
  const int64_t tiles = blocks_of<float>(parts[0].shape.out_channels), group = group_of(tiles);
  std::vector<Cell> cells;
  bfloat16* to = reinterpret_cast<bfloat16*>(packed);
  for (int64_t first = 0; first < tiles; first += group)
    for (const Part<T>& part : parts) {
      const Steps steps(part.shape);
      const PackedOrder order(steps, group);
      for (int64_t block = 0; block < steps.blocks; ++block)
        for (int64_t tile = 0; tile < group; ++tile)
          cells.push_back({&part, first + tile, block, to + block * order.block + tile * order.tile});
      to += steps.count() * group * kTileElements;
    }
  in_parallel(static_cast<int64_t>(cells.size()), kCells, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const Cell& cell = cells[n];
      const ConvShape& shape = cell.part->shape;
      const WeightView<T>& weight = cell.part->weight;
      const Steps steps(shape);
      const int64_t out = cell.tile * kTileRows, in = cell.block * steps.depth();
      const T* from = weight.at + out * weight.out + in * weight.in;
      PackedTile<T>{shape,
                    steps,
                    weight,
                    from,
                    std::min(kTileRows, shape.out_channels - out),
                    std::min(steps.depth(), shape.in_channels - in),
                    PackedOrder(steps, group),
                    cell.to}
          .pack();
    }
  });
}

// The kernel of a parity, and that which pulls back to it.
ConvShape forward_part(const ConvShape& shape, const ParityTaps& rows, const ParityTaps& columns) {
  return {shape.in_channels, shape.out_channels, rows.count, columns.count};
}
ConvShape backward_part(const ConvShape& shape, const ParityTaps& rows, const ParityTaps& columns) {
  return {shape.out_channels, shape.in_channels, rows.count, columns.count};
}

// The kernels of a convolution of stride 2, one for each parity.
template <class T>
std::vector<Part<T>> strided_parts(const ConvShape& shape, bool back, const WeightView<T>& weight) {
  std::vector<Part<T>> parts;
  each_parity(shape, [&](int64_t, int64_t, const ParityTaps& rows, const ParityTaps& columns) {
    WeightView<T> seen = back ? weight.back(rows.last, columns.last, 2) : weight;
    if (!back) seen.at += rows.first * weight.y + columns.first * weight.x, seen.y *= 2, seen.x *= 2;
    parts.push_back({(back ? backward_part : forward_part)(shape, rows, columns), seen});
  });
  return parts;
}

}  // namespace

template <class T>
void pack_tile_weights(const ConvShape& shape, bool flip, const T* weight, const int64_t* strides, float* packed) {
  const WeightView<T> view(flip ? shape.transposed() : shape, weight, strides);
  pack_parts<T>({{shape, flip ? view.back(shape.kernel_h - 1, shape.kernel_w - 1, 1) : view}}, packed);
}

int64_t strided_tile_weights_size(const ConvShape& shape, bool back) {
  int64_t size = 0;
  each_parity(shape, [&](int64_t, int64_t, const ParityTaps& rows, const ParityTaps& columns) {
    size += tile_weights_size((back ? backward_part : forward_part)(shape, rows, columns));
  });
  return size;
}

template <class T>
void pack_strided_tile_weights(const ConvShape& shape, bool back, const T* weight, const int64_t* strides,
                               float* packed) {
  const auto parts = strided_parts(shape, back, WeightView<T>(shape, weight, strides));
  if (!back) return pack_parts(parts, packed);
  for (const auto& part : parts) {  // each with all its outputs
    pack_parts<T>({part}, packed);
    packed += tile_weights_size(part.shape);
  }
}

template void pack_strided_tile_weights(const ConvShape&, bool, const float*, const int64_t*, float*);
template void pack_strided_tile_weights(const ConvShape&, bool, const bfloat16*, const int64_t*, float*);
template void pack_tile_weights(const ConvShape&, bool, const float*, const int64_t*, float*);
template void pack_tile_weights(const ConvShape&, bool, const bfloat16*, const int64_t*, float*);

}  // namespace fastode::resident

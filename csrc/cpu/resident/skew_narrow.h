// The skew pair's transpose and weight gradient where z has few channels. The channels of one tap would leave most of a
// vector empty, so here a vector holds (tap, channel) pairs, all of a pixel's in a row. Included by skew_conv_impl.h.
#pragma once

#include "conv_impl.h"
#include "skew_conv.h"
#include "skew_passes.h"

namespace fastode::resident {

// Products of `pixels` pixels of y with `vectors` vectors of (tap, channel).
template <class A, int vectors, int pixels>
void multiply_pixels(const A* in, int64_t pixel, int64_t block, int64_t channels, const A* weights, int64_t taps,
                     A* out, Ahead* ahead) {
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<A>;
  V sums[pixels][vectors] = {};
  const Asking asking(ahead, channels, in);
  for (int64_t done = 0; done < channels; done += lanes, in += block) {
    const int64_t count = std::min(channels - done, lanes);
    for (int64_t c = 0; c < count; ++c, weights += taps) {
      asking.at(done + c);
      V w[vectors];
      FASTODE_UNROLL for (int v = 0; v < vectors; ++v) w[v] = in_register(load<V>(weights + v * lanes));
      FASTODE_UNROLL for (int x = 0; x < pixels; ++x) {
        const V value = in_register(splat<V>(in[x * pixel + c]));
        FASTODE_UNROLL for (int v = 0; v < vectors; ++v) sums[x][v] += value * w[v];
      }
    }
  }
  FASTODE_UNROLL for (int x = 0; x < pixels; ++x) {
    FASTODE_UNROLL for (int v = 0; v < vectors; ++v) store<V>(out + x * taps + v * lanes, sums[x][v]);
  }
}

template <class A, int vectors, int pixels = kRegisters / 4>
void multiply_row(const View<A>& in, int64_t width, int64_t channels, const A* weights, int64_t taps, A* out,
                  Ahead* ahead) {
  int64_t x = 0;
  for (; x + pixels <= width; x += pixels)
    multiply_pixels<A, vectors, pixels>(in.pixel_at(0, 0, x), in.pixel, in.block, channels, weights, taps,
                                        out + x * taps, ahead);
  View<A> rest = in;
  rest.at += x * in.pixel;
  if constexpr (pixels > 1)
    multiply_row<A, vectors, pixels / 2>(rest, width - x, channels, weights, taps, out + x * taps, ahead);
}

// Rows of products, as many as one row of z meets, and one row of normalised input.
template <class A>
struct NarrowRows {
  static constexpr int64_t lanes = kLanes<A>, unroll = 8;  // pixels of z at a time
  const SkewShape& shape;
  const int64_t taps, row;

  explicit NarrowRows(const SkewShape& shape)
      : shape(shape), taps(shape.template narrow_taps<A>()), row((shape.width + 2 * shape.halo()) * taps) {}

  // Also of a band of y, for the weight gradient.
  int64_t size() const {
    const int64_t pixels = std::max(shape.width, kBandPixels);
    return shape.kernel * row + unroll * taps + lanes + blocks_of<A>(shape.channels) * pixels * lanes;
  }
  A* products(A* scratch, int64_t y, int64_t x) const {
    return scratch + y % shape.kernel * row + (x + shape.halo()) * taps;
  }
  View<A> normalised(A* scratch) const {
    return {scratch + shape.kernel * row + unroll * taps + lanes, 0, lanes, shape.width * lanes};
  }

  // Row `at` of z: every product that falls on a pixel of it.
  void gather(A* scratch, int64_t at, const ConvJob<A>& job) const {
    using Four = typename VectorOf<A, std::min(4 * static_cast<int>(sizeof(A)), kVectorBytes)>::type;
    const bool few = shape.in_channels <= 4;
    if (shape.stride == 1)
      few ? gather_as<Four, 1>(scratch, at, job) : gather_as<Vec<A>, 1>(scratch, at, job);
    else
      few ? gather_as<Four, 2>(scratch, at, job) : gather_as<Vec<A>, 2>(scratch, at, job);
  }

  // With V just long enough for the channels of a pixel: a tap's products begin anywhere, and a longer vector would
  // often straddle two cache lines.
  template <class V, int64_t step>
  void gather_as(A* scratch, int64_t at, const ConvJob<A>& job) const {
    const int64_t kernel = shape.kernel, pad = shape.halo();
    V inside = {};
    for (int64_t c = 0; c < shape.in_channels; ++c) inside[c] = 1;
    for (int64_t first = 0; first < step; ++first)
      for (int64_t x = first; x < shape.width * step; x += unroll * step) {
        V sums[unroll] = {};
        for (int64_t ky = 0; ky < kernel; ++ky) {
          const int64_t from_y = at + pad - ky;
          if (from_y < 0 || from_y % step || from_y / step >= shape.height) continue;
          const A* line = products(scratch, from_y / step, 0) + ky * kernel * shape.in_channels;
          for (int64_t kx = 0; kx < kernel; ++kx) {
            const int64_t from_x = x + pad - kx;
            if (from_x % step) continue;
            const A* from = line + from_x / step * taps + kx * shape.in_channels;
            FASTODE_UNROLL for (int64_t i = 0; i < unroll; ++i) sums[i] += load<V>(from + i * taps);
          }
        }
        for (int64_t i = 0, to = x; i < unroll && to < shape.width * step; ++i, to += step) {
          V value = inside != 0 ? sums[i] * job.combine.scale : V{};
          for (int t = 0; t < job.combine.count; ++t)
            value += job.combine.coef[t] * load<V>(job.combine.term[t].pixel_at(0, at, to));
          if (sizeof(V) < sizeof(Vec<A>)) store<Vec<A>>(job.out.pixel_at(0, at, to), Vec<A>{});
          store<V>(job.out.pixel_at(0, at, to), value);
        }
      }
  }
};

template <class A, class T>
void pack_narrow(const SkewShape& shape, const T* weight, const int64_t* strides, A* packed) {
  const int64_t taps = shape.narrow_taps<A>();
  std::fill(packed, packed + shape.channels * taps, A(0));
  for (int64_t out = 0; out < shape.channels; ++out, packed += taps)
    for (int64_t ky = 0; ky < shape.kernel; ++ky)
      for (int64_t kx = 0; kx < shape.kernel; ++kx)
        for (int64_t in = 0; in < shape.in_channels; ++in)
          packed[(ky * shape.kernel + kx) * shape.in_channels + in] =
              to_accumulator<A>(weight[out * strides[0] + in * strides[1] + ky * strides[2] + kx * strides[3]]);
}

// As skew_up, of norm(in) where there is one; `in` needs no halo.
template <class A>
void narrow_up(const SkewShape& shape, const A* packed, const NormRows<A>* norm, const ConvJob<A>& job, A* scratch,
               Ahead* ahead) {
  constexpr int64_t lanes = kLanes<A>;
  const NarrowRows<A> rows(shape);
  const Plane<A> line(1, shape.width, 0);
  for (int64_t y = 0; y < shape.kernel; ++y) {
    std::fill(rows.products(scratch, y, -shape.halo()), rows.products(scratch, y, 0), A(0));
    A* right = rows.products(scratch, y, shape.width);
    std::fill(right, right + shape.halo() * rows.taps, A(0));
  }
  int64_t gathered = 0;
  for (int64_t y = 0; y < shape.height; ++y) {
    View<A> in = job.in;
    in.at += y * in.row;
    if (norm) {
      apply<A>(line, blocks_of<A>(shape.channels), *norm, {}, in, rows.normalised(scratch), {});
      in = rows.normalised(scratch);
    }
    int64_t done = 0;
    for (A* to = rows.products(scratch, y, 0); done < rows.taps;) {
      const bool two = done + 2 * lanes <= rows.taps;
      two ? multiply_row<A, 2>(in, shape.width, shape.channels, packed + done, rows.taps, to + done, ahead)
          : multiply_row<A, 1>(in, shape.width, shape.channels, packed + done, rows.taps, to + done, ahead);
      done += two ? 2 * lanes : lanes;
    }
    const bool last = y + 1 == shape.height;
    const int64_t ready = last ? shape.height * shape.stride : (y + 1) * shape.stride - shape.halo();
    for (; gathered < ready; ++gathered) rows.gather(scratch, gathered, job);
  }
}

template <class A, int vectors>
void narrow_gradient_tile(int64_t inputs, const GradientTile<A>* tiles, int64_t count, A* to, int64_t vector_stride,
                          Ahead* ahead) {
  switch (inputs) {
    case 1:
      return gradient_tile_of_row<A, 1, vectors>(tiles, count, to, vector_stride, ahead);
    case 2:
      return gradient_tile_of_row<A, 2, vectors>(tiles, count, to, vector_stride, ahead);
    case 3:
      return gradient_tile_of_row<A, 3, vectors>(tiles, count, to, vector_stride, ahead);
    default:
      return gradient_tile_of_row<A, 4, vectors>(tiles, count, to, vector_stride, ahead);
  }
}

// As skew_weight_gradient, for 3 x 3 at stride 1, in bands that stay in the first cache.
template <class A>
void narrow_weight_gradient(const SkewShape& shape, const GradientPair<A>* pairs, int64_t count,
                            const NormRows<A>* norm, A* gradient, A* scratch, Ahead* ahead) {
  constexpr int64_t lanes = kLanes<A>, most = 4;  // channels of a tile
  constexpr int wide = kRegisters == 32 ? 2 : 1;
  const ConvShape down = shape.down();
  const int64_t blocks = blocks_of<A>(down.out_channels), vector_stride = lanes * lanes * 9;
  GradientTile<A> tiles[2];
  each_band(shape.y_plane<A>(), [&](const Plane<A>& band, int64_t at) {
    View<A> cotangents[2];
    for (int64_t n = 0; n < count; ++n) cotangents[n] = below(pairs[n].cotangent, at);
    if (norm) {
      const View<A> here = band.compact(scratch);
      apply<A>(band, blocks, *norm, {}, cotangents[count - 1], here, {});
      cotangents[count - 1] = here;
    }
    for (int64_t ob = 0; ob < blocks; ob += wide)
      for (int64_t ky = 0; ky < 3; ++ky)
        for (int64_t i = 0; i < down.in_channels; i += most) {
          for (int64_t n = 0; n < count; ++n)
            tiles[n] = {pairs[n].in.pixel_at(0, at + ky - 1, -1) + i,
                        cotangents[n].pixel_at(ob, 0, 0),
                        band.height,
                        band.width,
                        pairs[n].in.row,
                        lanes,
                        cotangents[n].row,
                        cotangents[n].block};
          A* to = gradient + gradient_index<A>(down, ob * lanes, i, ky, 0);
          const int64_t inputs = std::min(most, down.in_channels - i);
          ob + wide <= blocks ? narrow_gradient_tile<A, wide>(inputs, tiles, count, to, vector_stride, ahead)
                              : narrow_gradient_tile<A, 1>(inputs, tiles, count, to, vector_stride, ahead);
        }
  });
}

}  // namespace fastode::resident

// Included by one .cpp.
#pragma once

#include "conv_kernels.h"
#include "winograd_tiles.h"

namespace fastode::resident {

inline constexpr int kAccumulators = kRegisters == 32 ? 16 : 12;  // of a product
// Tiles that are transformed together, and groups of outputs that are multiplied between two looks at them. With
// AVX-512 more of either was not measured.
inline constexpr int64_t kChunk = kRegisters == 32 ? 32 : 72;
inline constexpr int64_t kGroupsTogether = kRegisters == 32 ? 1 : 8;

// From one product of the tiles to the next, and from one block of channels: [block][product][tile][channel], with a
// line between the products, so that they do not meet in one set of the cache.
template <class A>
inline constexpr int64_t kOneProduct = (kChunk + 1) * kLanes<A>;
template <class A>
inline constexpr int64_t kAllProducts = kProducts * kOneProduct<A>;

// Where packed weights, and their gradient, lie: from one product to the next, from one block of inputs to the next,
// and from one group of outputs to the next. They are [output group][product][input channel][output channel], with a
// line behind each product, because they lie powers of two apart otherwise, in one set of the cache; with AVX-512,
// where that was not measured, and bfloat16 has the same gradients, [output group][input block][product][input
// channel][output channel].
template <class A>
struct WeightsLayout {
  explicit WeightsLayout(const ConvShape& shape)
      : width(vectors_of<A>(shape.out_channels) * kLanes<A>),
        product(kProductsApart ? blocks_of<A>(shape.in_channels) * kLanes<A> * width + kLine<A> : kLanes<A> * width),
        block(kProductsApart ? kLanes<A> * width : kProducts * product),
        group(kProductsApart ? kProducts * product : blocks_of<A>(shape.in_channels) * block) {}

  // The row of an input channel in the first product of a group.
  int64_t row(int64_t in) const { return in / kLanes<A> * block + in % kLanes<A> * width; }
  // Where the numbers of one vector of outputs and one input begin in the first product.
  int64_t at(int64_t out, int64_t in) const {
    return out / width * group + row(in) + out % width / kLanes<A> * kLanes<A>;
  }

  int64_t width, product, block, group;
};

template <class A, class T>
void pack_winograd(const ConvShape& shape, bool flip, const T* weight, const int64_t* strides, A* packed) {
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<A>;
  const WeightView<T> straight(flip ? shape.transposed() : shape, weight, strides);
  const WeightView<T> view = flip ? straight.back(2, 2, 1) : straight;
  const WeightsLayout<A> layout(shape);
  each_cell<A>(shape, [&](int64_t out, int64_t first) {
    alignas(64) A cell[9 * lanes * lanes];
    const int64_t inputs = std::min(lanes, shape.in_channels - first);
    const int64_t outputs = std::min(lanes, shape.out_channels - out);
    const T* from = view.at + out * view.out + first * view.in;
    PackedCell<A, T>{shape, 1, outputs, inputs, lanes, view, from, cell}.pack();
    A* to = packed + layout.at(out, first);
    for (int64_t in = 0; in < inputs; ++in, to += layout.width) {
      V g[3][3], u[4][4];
      FASTODE_UNROLL for (int k = 0; k < 9; ++k) g[k / 3][k % 3] = load<V>(cell + (k * inputs + in) * lanes);
      spread_kernel(g, u);
      FASTODE_UNROLL for (int p = 0; p < kProducts; ++p) store<V>(to + p * layout.product, u[p / 4][p % 4]);
    }
  });
}

// Whether one group has all outputs. Then its products go over the inputs that they are made of: no other group reads
// these again.
template <class A>
bool is_one_group(const ConvShape& shape) {
  return blocks_of<A>(shape.out_channels) == vectors_of<A>(shape.out_channels);
}

template <class A>
int64_t groups_together(const ConvShape& shape) {
  const int64_t groups = blocks_of<A>(shape.out_channels) / vectors_of<A>(shape.out_channels);
  return std::min(groups, kGroupsTogether);
}

template <class A>
int64_t winograd_scratch_size(const ConvShape& shape) {
  const int64_t blocks = blocks_of<A>(shape.in_channels);
  const int64_t outputs = groups_together<A>(shape) * vectors_of<A>(shape.out_channels);
  return (is_one_group<A>(shape) ? std::max(blocks, outputs) : blocks + outputs) * kAllProducts<A>;
}

// How many blocks of cotangents of a weight gradient are spread together.
template <class A>
int64_t cotangents_together(const ConvShape& shape) {
  return kProductsApart ? blocks_of<A>(shape.out_channels) : vectors_of<A>(shape.out_channels);
}

template <class A>
int64_t winograd_gradient_scratch_size(const ConvShape& shape) {
  return (blocks_of<A>(shape.in_channels) + cotangents_together<A>(shape)) * kAllProducts<A>;
}

// Of all tiles of a chunk and all blocks of channels; view(sample) is that of its input.
template <class A, class F>
inline void spread_chunk(const Chunks<kChunk>& chunk, int64_t blocks, A* v, const F& view) {
  for (int64_t b = 0; b < blocks; ++b)
    chunk.each_run([&](const RowOfTiles& run) {
      A* const to = v + b * kAllProducts<A> + run.place * kLanes<A>;
      spread_inputs(view(run.sample), b, run,
                    [=](int p, int64_t t, auto value) { store(to + p * kOneProduct<A> + t * kLanes<A>, value); });
    });
}

// One product of so many tiles: m[output vector][tile] = sum over input channels of v[tile] u, both from one block of
// these to the next. It may be written over v.
template <class A, int vectors, int tiles>
inline void multiply_tiles(const A* v, const A* u, int64_t in_channels, A* m, const char* ahead, int64_t ahead_step) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>;
  V sums[tiles][vectors] = {};
  for (int64_t remaining = in_channels; remaining > 0; remaining -= lanes) {
    const A* end = v + (remaining < lanes ? remaining : lanes);
    for (const A* at = v; at < end; ++at, u += vectors * lanes) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += ahead_step;
      V w[vectors];
      FASTODE_UNROLL for (int o = 0; o < vectors; ++o) w[o] = load<V>(u + o * lanes);
      FASTODE_UNROLL for (int t = 0; t < tiles; ++t) {
        const V value = splat<V>(at[t * lanes]);
        FASTODE_UNROLL for (int o = 0; o < vectors; ++o) sums[t][o] += value * w[o];
      }
    }
    v += kAllProducts<A>;
    if constexpr (!kProductsApart) u += (kProducts - 1) * lanes * vectors * lanes;
  }
  FASTODE_UNROLL for (int o = 0; o < vectors; ++o) {
    FASTODE_UNROLL for (int t = 0; t < tiles; ++t) store<V>(m + o * kAllProducts<A> + t * lanes, sums[t][o]);
  }
}

// Of any number of tiles; the last ones, fewer than fill the accumulators, in halves.
template <class A, int vectors, int tiles = kAccumulators / vectors>
inline void multiply(const A* v, const A* u, int64_t in_channels, A* m, int64_t count, Ahead* ahead) {
  for (; count >= tiles; count -= tiles, v += tiles * kLanes<A>, m += tiles * kLanes<A>) {
    const char* soon = ahead ? ahead->take(in_channels) : nullptr;
    multiply_tiles<A, vectors, tiles>(v, u, in_channels, m, soon ? soon : reinterpret_cast<const char*>(v),
                                      soon ? Ahead::line : 0);
  }
  if constexpr (tiles > 1)
    if (count > 0) multiply<A, vectors, tiles / 2>(v, u, in_channels, m, count, ahead);
}

template <class A, int vectors>
void run_winograd(const Plane<A>& plane, const ConvShape& shape, const A* packed, const A* bias, const ConvJob<A>* jobs,
                  int64_t count, A* scratch, Ahead* ahead) {
  constexpr int lanes = kLanes<A>;
  const WeightsLayout<A> layout(shape);
  const int64_t blocks = blocks_of<A>(shape.in_channels), channels = shape.in_channels;
  const int64_t outputs = blocks_of<A>(shape.out_channels);
  const int64_t together = groups_together<A>(shape) * vectors;
  A *v = scratch, *m = is_one_group<A>(shape) ? v : v + blocks * kAllProducts<A>;
  for (Chunks<kChunk> chunk(plane, count); chunk.next();) {
    spread_chunk(chunk, blocks, v, [&](int64_t sample) { return jobs[sample].in; });
    for (int64_t first = 0; first < outputs; first += together) {
      const int64_t end = std::min(first + together, outputs);
      const auto group = [&](int64_t ob) { return packed + ob / vectors * layout.group; };
      for (int p = 0; p < kProducts; ++p)
        for (int64_t ob = first; ob < end; ob += vectors) {
          chunk.each_run([&](const RowOfTiles& run) { ask_for<vectors>(jobs[run.sample].out, ob, run, p); });
          multiply<A, vectors>(v + p * kOneProduct<A>, group(ob) + p * layout.product, channels,
                               m + (ob - first) * kAllProducts<A> + p * kOneProduct<A>, chunk.tiles, ahead);
        }
      for (int64_t ob = first; ob < end; ++ob)
        chunk.each_run([&](const RowOfTiles& run) {
          const A* const u = group(ob) + ob % vectors * lanes;
          const auto kernel = [=](int64_t c, auto& g) {
            Vec<A> spread_out[4][4];
            for (int p = 0; p < kProducts; ++p)
              spread_out[p / 4][p % 4] = load<Vec<A>>(u + layout.row(c) + p * layout.product);
            kernel_of(spread_out, g);
          };
          const auto direct = [&](int64_t t, auto& sums) {
            sum_directly(jobs[run.sample].in, 2 * run.y, 2 * (run.x + t), channels, kernel, sums);
          };
          const A* const at = m + (ob - first) * kAllProducts<A> + run.place * lanes;
          const auto gather = [=](int64_t t, auto& sums) {
            gather_tile([=](int p) { return load<Vec<A>>(at + p * kOneProduct<A> + t * lanes); }, sums);
          };
          gather_outputs<2>(
              run, gather, [](int64_t) { return A(1); }, bias ? bias + ob * lanes : nullptr, jobs[run.sample], ob,
              direct);
        });
    }
  }
}

template <class A>
void convolve_winograd(const Plane<A>& plane, const ConvShape& shape, const A* packed, const A* bias,
                       const ConvJob<A>* jobs, int64_t count, A* scratch, Ahead* ahead) {
  vectors_of<A>(shape.out_channels) == 2 ? run_winograd<A, 2>(plane, shape, packed, bias, jobs, count, scratch, ahead)
                                         : run_winograd<A, 1>(plane, shape, packed, bias, jobs, count, scratch, ahead);
}

// A y A' of the tiles of a run.
template <class A>
inline void spread_cotangents(const View<A>& cotangent, int64_t b, const RowOfTiles& run, A* to) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>;
  const A* at = cotangent.pixel_at(b, 2 * run.y, 2 * run.x);
  const int64_t row = cotangent.row;
  for (int64_t t = 0; t < run.count; ++t, to += lanes, at += 2 * lanes) {
    V c[2][4];
    FASTODE_UNROLL for (int x = 0; x < 2; ++x) {
      const V above = load<V>(at + x * lanes), below = load<V>(at + x * lanes + row);
      c[x][0] = above, c[x][1] = above + below, c[x][2] = above - below, c[x][3] = -below;
    }
    FASTODE_UNROLL for (int r = 0; r < 4; ++r) {
      A* here = to + 4 * r * kOneProduct<A>;
      store<V>(here, c[0][r]), store<V>(here + kOneProduct<A>, c[0][r] + c[1][r]);
      store<V>(here + 2 * kOneProduct<A>, c[0][r] - c[1][r]), store<V>(here + 3 * kOneProduct<A>, -c[1][r]);
    }
  }
}

// One product of all tiles, of so many input channels: sum[input][output vector] = or += sum over tiles of v q.
template <class A, int vectors, int inputs>
inline void add_products(const A* v, const A* q, int64_t tiles, A* sum, bool fresh) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>;
  V sums[inputs][vectors] = {};
  for (int64_t t = 0; t < tiles; ++t, v += lanes, q += lanes) {
    V g[vectors];
    FASTODE_UNROLL for (int o = 0; o < vectors; ++o) g[o] = in_register(load<V>(q + o * kAllProducts<A>));
    FASTODE_UNROLL for (int i = 0; i < inputs; ++i) {
      const V value = in_register(splat<V>(v[i]));
      FASTODE_UNROLL for (int o = 0; o < vectors; ++o) sums[i][o] += value * g[o];
    }
  }
  FASTODE_UNROLL for (int i = 0; i < inputs; ++i) {
    FASTODE_UNROLL for (int o = 0; o < vectors; ++o) {
      A* to = sum + (i * vectors + o) * lanes;
      store<V>(to, fresh ? sums[i][o] : load<V>(to) + sums[i][o]);
    }
  }
}

template <class A, int vectors>
void run_gradient(const Plane<A>& plane, const ConvShape& shape, const GradientPair<A>* pairs, int64_t count,
                  A* gradient, bool fresh, A* scratch) {
  constexpr int lanes = kLanes<A>, most = kRegisters / 2 / vectors, inputs = most < lanes ? most : lanes;
  const WeightsLayout<A> layout(shape);
  const int64_t blocks = blocks_of<A>(shape.in_channels), outputs = blocks_of<A>(shape.out_channels);
  const int64_t together = cotangents_together<A>(shape);
  A *v = scratch, *q = scratch + blocks * kAllProducts<A>;
  for (Chunks<kChunk> chunk(plane, count); chunk.next(); fresh = false) {
    spread_chunk(chunk, blocks, v, [&](int64_t sample) { return pairs[sample].in; });
    for (int64_t first = 0; first < outputs; first += together) {
      for (int64_t o = 0; o < together; ++o)
        chunk.each_run([&](const RowOfTiles& run) {
          spread_cotangents(pairs[run.sample].cotangent, first + o, run, q + o * kAllProducts<A> + run.place * lanes);
        });
      for (int p = 0; p < kProducts; ++p)
        for (int64_t o = 0; o < together; o += vectors)
          for (int64_t b = 0; b < blocks; ++b) {
            A* sum = gradient + (first + o) / vectors * layout.group + p * layout.product + b * layout.block;
            for (int i = 0; i < lanes; i += inputs, sum += inputs * vectors * lanes)
              add_products<A, vectors, inputs>(v + b * kAllProducts<A> + p * kOneProduct<A> + i,
                                               q + o * kAllProducts<A> + p * kOneProduct<A>, chunk.tiles, sum, fresh);
          }
    }
  }
}

template <class A>
void winograd_gradient(const Plane<A>& plane, const ConvShape& shape, const GradientPair<A>* pairs, int64_t count,
                       A* gradient, bool fresh, A* scratch) {
  vectors_of<A>(shape.out_channels) == 2 ? run_gradient<A, 2>(plane, shape, pairs, count, gradient, fresh, scratch)
                                         : run_gradient<A, 1>(plane, shape, pairs, count, gradient, fresh, scratch);
}

template <class A, class T>
void unpack_winograd_gradient(const ConvShape& shape, const A* gradient, int64_t part_stride, int64_t parts, T* weight,
                              const int64_t* strides) {
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<A>;
  const WeightsLayout<A> layout(shape);
  each_cell<A>(shape, [&](int64_t out, int64_t first) {
    alignas(64) A cell[9 * lanes * lanes];
    const int64_t outputs = std::min(lanes, shape.out_channels - out);
    const int64_t inputs = std::min(lanes, shape.in_channels - first);
    const GradientCell<A, T> direct{shape,  outputs, inputs, cell, 0, 1, weight + out * strides[0] + first * strides[1],
                                    strides};
    const A* from = gradient + layout.at(out, first);
    for (int64_t in = 0; in < inputs; ++in, from += layout.width) {
      const auto gather = [&](V s0, V s1, V s2, V s3, V(&to)[3]) {
        shape.stride == 2 ? gather_strided_kernel(s0, s1, s2, s3, to) : gather_kernel(s0, s1, s2, s3, to);
      };
      V columns[4][3];
      FASTODE_UNROLL for (int x = 0; x < 4; ++x) {
        V s[4];
        FASTODE_UNROLL for (int y = 0; y < 4; ++y) {
          s[y] = load<V>(from + (4 * y + x) * layout.product);
          for (int64_t part = 1; part < parts; ++part)
            s[y] += load<V>(from + (4 * y + x) * layout.product + part * part_stride);
        }
        gather(s[0], s[1], s[2], s[3], columns[x]);
      }
      FASTODE_UNROLL for (int y = 0; y < 3; ++y) {
        V row[3];
        gather(columns[0][y], columns[1][y], columns[2][y], columns[3][y], row);
        FASTODE_UNROLL for (int x = 0; x < 3; ++x) store<V>(cell + direct.row_at(in, y, x), row[x]);
      }
    }
    direct.unpack();
  });
}

// What resident_conv_f32.cpp instantiates: everything above in arithmetic of A, for weights of A or of T.
#define FASTODE_WINOGRAD(keyword, A, T)                                                                             \
  keyword template int64_t winograd_scratch_size<A>(const ConvShape&);                                              \
  keyword template int64_t winograd_gradient_scratch_size<A>(const ConvShape&);                                     \
  keyword template void pack_winograd(const ConvShape&, bool, const A*, const int64_t*, A*);                        \
  keyword template void pack_winograd(const ConvShape&, bool, const T*, const int64_t*, A*);                        \
  keyword template void convolve_winograd(const Plane<A>&, const ConvShape&, const A*, const A*, const ConvJob<A>*, \
                                          int64_t, A*, Ahead*);                                                     \
  keyword template void winograd_gradient(const Plane<A>&, const ConvShape&, const GradientPair<A>*, int64_t, A*,   \
                                          bool, A*);                                                                \
  keyword template void unpack_winograd_gradient(const ConvShape&, const A*, int64_t, int64_t, A*, const int64_t*); \
  keyword template void unpack_winograd_gradient(const ConvShape&, const A*, int64_t, int64_t, T*, const int64_t*)

}  // namespace fastode::resident

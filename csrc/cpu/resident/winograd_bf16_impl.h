// Winograd's filtering of bfloat16 maps in integers of 16 bits. Included by gradient_bf16_impl.h.
//
// Of bfloat16 operands B' d B and G g G' would be rounded to half their numbers' last places once more, and A' m A
// makes that error larger: twice that of direct sums. As integers they are about as exact as direct sums of bfloat16
// are.
#pragma once

#include "conv_bf16_impl.h"
#include "fixed_point.h"
#include "winograd_tiles.h"

namespace fastode::resident {
namespace {

constexpr int64_t kTogether = 32;  // tiles that are transformed together

// B' d B of the inputs: [block of channels that are summed][product][tile][channel]. A line more from a product to the
// next, so that they do not meet in one set of the cache.
constexpr int64_t kInputProduct = kTogether * kSummed + kTileDepth, kInputBlock = kProducts * kInputProduct;
static_assert(kSummed == 4 * kTileRows);

// The sums of a group of N output tiles: [product][tile][channel].
template <int N>
constexpr int64_t kSumProduct = (kTogether + 1) * N * kTileRows;

// Packed weights G g G': of a group of output tiles [product][pair of input channels][output channel][of the pair], and
// behind all groups what brings each output channel's sums back.
struct PackedWinograd {
  int64_t group, pairs, product, group_size, factors;  // sizes in numbers of 16 bits

  explicit PackedWinograd(const ConvShape& shape)
      : group(group_of(blocks_of<float>(shape.out_channels))),
        pairs(divide_up(shape.in_channels, 2)),
        product(pairs * group * kTileDepth),
        group_size(kProducts * product),
        factors(blocks_of<float>(shape.out_channels) / group * group_size) {}
};

// sums[R][N * 16] = or += sum over pairs of channels of R tiles' inputs times weights.
template <int R, int N>
[[gnu::noinline]] void add_tiles(const int16_t* inputs, const int16_t* weights, int64_t pairs, float* sums,
                                 bool fresh) {
  __m512i totals[R][N];
  clear(totals);
  for (; pairs > 0; --pairs, inputs += 2, weights += N * kTileDepth) add_pair(inputs, kSummed, weights, totals);
  FASTODE_UNROLL for (int r = 0; r < R; ++r) for (int n = 0; n < N; ++n) {
    float* to = sums + (r * N + n) * kTileRows;
    const __m512 total = _mm512_cvtepi32_ps(totals[r][n]);
    _mm512_storeu_ps(to, fresh ? total : _mm512_add_ps(total, _mm512_loadu_ps(to)));
  }
}

// One product of so many tiles, R at a time.
template <int R, int N>
void multiply_tiles(const int16_t* inputs, const int16_t* weights, int64_t pairs, int64_t tiles, float* sums,
                    Ahead* ahead) {
  constexpr int64_t most = kSummed / 2;  // pairs
  const int64_t lines = pairs / 4;
  for (; tiles > 0; tiles -= R, inputs += R * kSummed, sums += R * N * kTileRows) {
    if (const char* soon = ahead ? ahead->take(lines) : nullptr)
      for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(soon + i * Ahead::line, 0, 2);
    const int16_t* block = inputs;
    for (int64_t first = 0; first < pairs; first += most, block += kInputBlock)
      add_tiles<R, N>(block, weights + first * N * kTileDepth, std::min(most, pairs - first), sums, first == 0);
  }
}

// The scales of a run's tiles, by the largest of their inputs in all channels. An output is made of what its own inputs
// give, so that one whose inputs are all zero is zero; but where they are much smaller than the tile's largest, too
// little would be left of them: then the tile's sums are to be direct.
inline void find_scales(const View<bfloat16>& in, int64_t in_channels, const RowOfTiles& run, float* to, float* back) {
  constexpr int too_small = 5 << 7;    // bits between numbers that are 32 times apart
  __m512i rows[2][2 * kTogether + 2];  // of every column the largest in the rows of the upper and of the lower outputs
  const bfloat16* at = in.pixel_at(0, 2 * run.y - 1, 2 * run.x - 1);
  for (int64_t x = 0; x < 2 * run.count + 2; ++x, at += in.pixel) {
    __m512i upper = _mm512_setzero_si512(), lower = upper;
    for (int64_t c = 0; c < in_channels; c += kTileDepth) {
      const bfloat16* from = at + c;
      const __m512i both = _mm512_max_epu16(magnitudes(from + in.row), magnitudes(from + 2 * in.row));
      upper = _mm512_max_epu16(upper, _mm512_max_epu16(both, magnitudes(from)));
      lower = _mm512_max_epu16(lower, _mm512_max_epu16(both, magnitudes(from + 3 * in.row)));
    }
    rows[0][x] = upper, rows[1][x] = lower;
  }
  const auto of_three = [](const __m512i* column) {
    return _mm512_max_epu16(_mm512_max_epu16(column[0], column[1]), column[2]);
  };
  for (int64_t t = 0; t < run.count; ++t) {
    const __m512i* const column[2] = {rows[0] + 2 * t, rows[1] + 2 * t};
    const __m512i outputs[4] = {of_three(column[0]), of_three(column[0] + 1), of_three(column[1]),
                                of_three(column[1] + 1)};
    const int most =
        largest(_mm512_max_epu16(_mm512_max_epu16(outputs[0], outputs[1]), _mm512_max_epu16(outputs[2], outputs[3])));
    const Scale scale(most);
    to[t] = scale.to, back[t] = scale.back;
    const __m512i least = _mm512_set1_epi16(static_cast<int16_t>(std::max(1, most - too_small)));
    FASTODE_UNROLL for (const __m512i& output : outputs) if (_mm512_cmpge_epu16_mask(output, least) == 0) [[unlikely]]
    if (largest(output) > 0) back[t] = std::numeric_limits<float>::quiet_NaN();
  }
}

template <int N>
void run_winograd(const Plane<float>& plane, const ConvShape& shape, const int16_t* weights, const KernelView& kernels,
                  const float* bias, const ConvJob<bfloat16>* jobs, int64_t count, int16_t* inputs, Ahead* ahead) {
  using V = Vec<float>;
  const PackedWinograd packed(shape);
  const float* const factors = reinterpret_cast<const float*>(weights + packed.factors);
  float* const sums = reinterpret_cast<float*>(inputs + divide_up(shape.in_channels, kSummed) * kInputBlock);
  const int64_t blocks = blocks_of<float>(shape.in_channels), out_blocks = blocks_of<float>(shape.out_channels);
  float scale[kTogether], back[kTogether];  // of the tiles
  for (Chunks<kTogether> chunk(plane, count); chunk.next();) {
    chunk.each_run([&](const RowOfTiles& run) {
      find_scales(jobs[run.sample].in, shape.in_channels, run, scale + run.place, back + run.place);
    });
    for (int64_t b = 0; b < blocks; ++b)
      chunk.each_run([&](const RowOfTiles& run) {
        int16_t* const to = inputs + b / 4 * kInputBlock + run.place * kSummed + b % 4 * kTileRows;
        const float* const scales = scale + run.place;
        spread_inputs(jobs[run.sample].in, b, run, [=](int p, int64_t t, V value) {
          store_rounded(to + p * kInputProduct + t * kSummed, (__m512)(value * scales[t]));
        });
      });
    const int16_t* group = weights;
    for (int64_t block = 0; block < out_blocks; block += N, group += packed.group_size) {
      for (int p = 0; p < kProducts; ++p) {
        chunk.each_run([&](const RowOfTiles& run) { ask_for<N>(jobs[run.sample].out, block, run, p); });
        multiply_tiles<kRowsAtOnce<N>, N>(inputs + p * kInputProduct, group + p * packed.product, packed.pairs,
                                          chunk.tiles, sums + p * kSumProduct<N>, ahead);
      }
      for (int64_t n = 0; n < N; ++n)
        chunk.each_run([&](const RowOfTiles& run) {
          const ConvJob<bfloat16>& job = jobs[run.sample];
          const auto kernel = [&](int64_t c, auto& g) {
            const int64_t out = (block + n) * kLanes<float>, last = shape.out_channels - out;
            for (int tap = 0; tap < 9; ++tap)
              for (int lane = 0; lane < kLanes<float>; ++lane)
                g[tap / 3][tap % 3][lane] = lane < last ? kernels(out + lane, c, tap / 3, tap % 3) : 0;
          };
          const auto direct = [&](int64_t t, auto& anew) {
            sum_directly(job.in, 2 * run.y, 2 * (run.x + t), shape.in_channels, kernel, anew);
          };
          const float* const at = sums + (run.place * N + n) * kTileRows;
          const V factor = load<V>(factors + (block + n) * kLanes<float>);
          gather_outputs(
              run, [=](int p, int64_t t) { return at + p * kSumProduct<N> + t * N * kTileRows; },
              [factor, scales = back + run.place](int64_t t) { return factor * scales[t]; },
              bias ? bias + (block + n) * kLanes<float> : nullptr, job, block + n, direct);
        });
    }
  }
}

// Of the weight gradient: B' d B and A y A' of so many tiles, two neighbours' numbers in pairs, and the sums over them.
// Of the inputs [block][product][pair of tiles][channel], of a group of N blocks of cotangents [product][pair of
// tiles][channel], both in pairs.
constexpr int64_t kGradientTiles = kSummed;
constexpr int64_t kPairProduct = (kGradientTiles / 2 + 1) * kTileDepth, kPairBlock = kProducts * kPairProduct;

// The largest magnitudes of a block's channels, in the rows and columns of a run's tiles and so many around them.
inline __m256i largest_of(const View<bfloat16>& map, int64_t b, const RowOfTiles& run, int64_t around, __m256i most) {
  const bfloat16* at = map.pixel_at(b, 2 * run.y - around, 2 * run.x - around);
  for (int64_t y = 0; y < 2 + 2 * around; ++y, at += map.row)
    for (int64_t x = 0; x < 2 * (run.count + around); ++x)
      most = _mm256_max_epu16(most, half_magnitudes(at + x * map.pixel));
  return most;
}

// B' d B of the pairs of tiles of a run, whose number is even; to(product, pair) is where they go.
template <class F>
inline void spread_input_pairs(const View<bfloat16>& in, int64_t b, const RowOfTiles& run, __m512 scale, const F& to) {
  using V = Vec<float>;
  const bfloat16* at = in.pixel_at(b, 2 * run.y - 1, 2 * run.x - 1);
  const int64_t row = in.row, pixel = in.pixel;
  const auto column = [=](const bfloat16* from, V(&c)[4]) {
    const V factor = (V)scale;
    spread(load_stored(from) * factor, load_stored(from + row) * factor, load_stored(from + 2 * row) * factor,
           load_stored(from + 3 * row) * factor, c);
  };
  V c[6][4];
  column(at, c[0]), column(at + pixel, c[1]);
  for (int64_t pair = 0; 2 * pair < run.count; ++pair, at += 4 * pixel) {
    FASTODE_UNROLL for (int k = 2; k < 6; ++k) column(at + k * pixel, c[k]);
    FASTODE_UNROLL for (int r = 0; r < 4; ++r) {
      V one[4], two[4];
      spread(c[0][r], c[1][r], c[2][r], c[3][r], one);
      spread(c[2][r], c[3][r], c[4][r], c[5][r], two);
      FASTODE_UNROLL for (int k = 0; k < 4; ++k) store_pairs(to(4 * r + k, pair), (__m512)one[k], (__m512)two[k]);
    }
    FASTODE_UNROLL for (int r = 0; r < 4; ++r) c[0][r] = c[4][r], c[1][r] = c[5][r];
  }
}

// A y A' of the same.
template <class F>
inline void spread_cotangent_pairs(const View<bfloat16>& cotangent, int64_t b, const RowOfTiles& run, __m512 scale,
                                   const F& to) {
  using V = Vec<float>;
  const bfloat16* at = cotangent.pixel_at(b, 2 * run.y, 2 * run.x);
  const int64_t row = cotangent.row, pixel = cotangent.pixel;
  const auto along = [](V first, V second, V(&q)[4]) {
    q[0] = first, q[1] = first + second, q[2] = first - second, q[3] = -second;
  };
  for (int64_t pair = 0; 2 * pair < run.count; ++pair, at += 4 * pixel) {
    V c[4][4];
    FASTODE_UNROLL for (int x = 0; x < 4; ++x) {
      const bfloat16* from = at + x * pixel;
      along(load_stored(from) * (V)scale, load_stored(from + row) * (V)scale, c[x]);
    }
    FASTODE_UNROLL for (int r = 0; r < 4; ++r) {
      V one[4], two[4];
      along(c[0][r], c[1][r], one), along(c[2][r], c[3][r], two);
      FASTODE_UNROLL for (int k = 0; k < 4; ++k) store_pairs(to(4 * r + k, pair), (__m512)one[k], (__m512)two[k]);
    }
  }
}

// sums[R][N * 16] = or += sum over pairs of tiles of R inputs times N vectors of cotangents, brought back by their
// factors.
template <int R, int N>
[[gnu::noinline]] void add_pairs(const int16_t* inputs, const int16_t* cotangents, int64_t pairs, const float* back,
                                 const __m512* cotangent_back, float* sums, bool fresh) {
  __m512i totals[R][N];
  clear(totals);
  for (; pairs > 0; --pairs, inputs += kTileDepth, cotangents += N * kTileDepth)
    add_pair(inputs, 2, cotangents, totals);
  FASTODE_UNROLL for (int r = 0; r < R; ++r) for (int n = 0; n < N; ++n) {
    float* to = sums + (r * N + n) * kTileRows;
    const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(back[r]), cotangent_back[n]);
    const __m512 before = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(totals[r][n]), factor, before));
  }
}

template <int N>
void run_gradient(const Plane<float>& plane, const ConvShape& shape, const GradientPair<bfloat16>* pairs, int64_t count,
                  float* gradient, bool fresh, int16_t* inputs) {
  constexpr int R = kRowsAtOnce<N>;
  constexpr int64_t cell = kTileRows * N * kTileRows;  // of a product and a block of inputs
  const int64_t blocks = blocks_of<float>(shape.in_channels), out_blocks = blocks_of<float>(shape.out_channels);
  int16_t* const cotangents = inputs + blocks * kPairBlock;
  float* const back = reinterpret_cast<float*>(cotangents + N * kPairBlock);  // of the input channels
  for (Chunks<kGradientTiles> chunk(plane, count); chunk.next(); fresh = false) {
    const auto scales_of = [&](const auto& map, int64_t b, int64_t around, float most) {
      __m256i magnitude = _mm256_setzero_si256();
      chunk.each_run(
          [&](const RowOfTiles& run) { magnitude = largest_of(map(pairs[run.sample]), b, run, around, magnitude); });
      return Scales(magnitude, most);
    };
    for (int64_t b = 0; b < blocks; ++b) {
      const Scales scales = scales_of([](const auto& pair) { return pair.in; }, b, 1, kMostInput);
      _mm512_storeu_ps(back + b * kTileRows, scales.back);
      chunk.each_run([&](const RowOfTiles& run) {
        int16_t* const to = inputs + b * kPairBlock + run.place / 2 * kTileDepth;
        spread_input_pairs(pairs[run.sample].in, b, run, scales.to,
                           [=](int p, int64_t t) { return to + p * kPairProduct + t * kTileDepth; });
      });
    }
    float* group = gradient;
    for (int64_t block = 0; block < out_blocks; block += N) {
      __m512 cotangent_back[N];
      for (int64_t n = 0; n < N; ++n) {
        const Scales scales = scales_of([](const auto& pair) { return pair.cotangent; }, block + n, 0, kMostWeight / 4);
        cotangent_back[n] = scales.back;
        chunk.each_run([&](const RowOfTiles& run) {
          int16_t* const to = cotangents + (run.place / 2 * N + n) * kTileDepth;
          spread_cotangent_pairs(pairs[run.sample].cotangent, block + n, run, scales.to,
                                 [=](int p, int64_t t) { return to + (p * kPairProduct + t * kTileDepth) * N; });
        });
      }
      for (int64_t b = 0; b < blocks; ++b)
        for (int p = 0; p < kProducts; ++p, group += cell)
          for (int first = 0; first < kTileRows; first += R)
            add_pairs<R, N>(inputs + b * kPairBlock + p * kPairProduct + 2 * first, cotangents + p * kPairProduct * N,
                            chunk.tiles / 2, back + b * kTileRows + first, cotangent_back,
                            group + first * N * kTileRows, fresh);
    }
  }
}

}  // namespace

int64_t narrow_winograd_size(const ConvShape& shape) {
  return PackedWinograd(shape).factors / 2 + blocks_of<float>(shape.out_channels) * kTileRows;
}

int64_t narrow_winograd_scratch_size(const ConvShape& shape) {
  const bool two = group_of(blocks_of<float>(shape.out_channels)) == 2;
  const int64_t sums = kProducts * (two ? kSumProduct<2> : kSumProduct<1>);
  return divide_up(shape.in_channels, kSummed) * kInputBlock * 2 + sums * 4;
}

template <class T>
void pack_narrow_winograd(const ConvShape& shape, bool flip, const T* weight, const int64_t* strides, float* packed) {
  using V = Vec<float>;
  constexpr int64_t lanes = kLanes<float>, cell = 9 * lanes * lanes;
  const WeightView<T> straight(flip ? shape.transposed() : shape, weight, strides);
  const WeightView<T> view = flip ? straight.back(2, 2, 1) : straight;
  const PackedWinograd order(shape);
  const int64_t blocks = blocks_of<float>(shape.in_channels);
  int16_t* const numbers = reinterpret_cast<int16_t*>(packed);
  float* const factors = reinterpret_cast<float*>(numbers + order.factors);
  const auto pack = [&](int64_t tile, float* kernels) {
    const int64_t out = tile * lanes, outputs = std::min(lanes, shape.out_channels - out);
    V most = {}, sum = {};
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * lanes, inputs = std::min(lanes, shape.in_channels - first);
      float* const here = kernels + b * cell;
      PackedCell<float, T>{shape, 1, outputs, inputs, lanes, view, view.at + out * view.out + first * view.in, here}
          .pack();
      for (int64_t k = 0; k < 9 * inputs; ++k) {
        const V value = load<V>(here + k * lanes), size = absolute(value);
        most = size > most ? size : most, sum += value - value;  // the latter is NaN where one is not finite
      }
    }
    // |G g G'| is at most 9/4 of the largest |g|.
    const V bound = most * 2.25f, fits = bound > 1e-30f ? bound : V{} + 1e-30f, to = kMostWeight / fits;
    store<V>(factors + out, fits / kMostWeight + sum);
    int16_t* group = numbers + tile / order.group * order.group_size + tile % order.group * kTileDepth;
    for (int64_t pair = 0; pair < order.pairs; ++pair, group += order.group * kTileDepth) {
      V u[2][4][4] = {};
      for (int64_t k = 0; k < 2 && 2 * pair + k < shape.in_channels; ++k) {
        const int64_t c = 2 * pair + k, inputs = std::min(lanes, shape.in_channels - c / lanes * lanes);
        V g[3][3];
        FASTODE_UNROLL for (int tap = 0; tap < 9; ++tap) g[tap / 3][tap % 3] =
            load<V>(kernels + c / lanes * cell + (tap * inputs + c % lanes) * lanes) * to;
        spread_kernel(g, u[k]);
      }
      FASTODE_UNROLL for (int p = 0; p < kProducts; ++p)
          store_pairs(group + p * order.product, (__m512)u[0][p / 4][p % 4], (__m512)u[1][p / 4][p % 4]);
    }
  };
  in_parallel(blocks_of<float>(shape.out_channels), std::max<int64_t>(1, kCells / 2 / blocks),
              [&](int64_t begin, int64_t end) {
                std::vector<float> kernels(blocks * cell);
                for (int64_t tile = begin; tile < end; ++tile) pack(tile, kernels.data());
              });
}

void convolve_winograd(const Plane<float>& plane, const ConvShape& shape, const float* packed,
                       const KernelView& kernels, const float* bias, const ConvJob<bfloat16>* jobs, int64_t count,
                       void* scratch, Ahead* ahead) {
  const int16_t* weights = reinterpret_cast<const int16_t*>(packed);
  int16_t* const memory = static_cast<int16_t*>(scratch);
  if (group_of(blocks_of<float>(shape.out_channels)) == 2)
    run_winograd<2>(plane, shape, weights, kernels, bias, jobs, count, memory, ahead);
  else
    run_winograd<1>(plane, shape, weights, kernels, bias, jobs, count, memory, ahead);
}

int64_t narrow_winograd_gradient_scratch_size(const ConvShape& shape) {
  const int64_t blocks = blocks_of<float>(shape.in_channels), group = group_of(blocks_of<float>(shape.out_channels));
  return (blocks + group) * kPairBlock * 2 + blocks * kTileRows * 4;
}

void winograd_gradient(const Plane<float>& plane, const ConvShape& shape, const GradientPair<bfloat16>* pairs,
                       int64_t count, float* gradient, bool fresh, void* scratch) {
  int16_t* const memory = static_cast<int16_t*>(scratch);
  if (group_of(blocks_of<float>(shape.out_channels)) == 2)
    run_gradient<2>(plane, shape, pairs, count, gradient, fresh, memory);
  else
    run_gradient<1>(plane, shape, pairs, count, gradient, fresh, memory);
}

template void pack_narrow_winograd(const ConvShape&, bool, const float*, const int64_t*, float*);
template void pack_narrow_winograd(const ConvShape&, bool, const bfloat16*, const int64_t*, float*);

}  // namespace fastode::resident

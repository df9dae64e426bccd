// Winograd's filtering of bfloat16 maps in integers of 16 bits, of stride 1 and 2 (filtering.h). Included by
// gradient_bf16_impl.h.
//
// Of bfloat16 operands B' d B and G g G' would be rounded to half their numbers' last places once more, and A' m A
// makes that error larger: twice that of direct sums. As integers they are about as exact as direct sums of bfloat16
// are.
#pragma once

#include "conv_bf16_impl.h"
#include "filtering_gradient.h"
#include "pack_filtered_impl.h"

namespace fastode::resident {

namespace {

constexpr int64_t kTogether = 32;  // tiles that are transformed together

// What tiles' inputs are spread to: [block of channels that are summed][of a tile][tile][channel]. A line more from one
// of a tile's to the next, so that they do not meet in one set of the cache.
constexpr int64_t kInputProduct = kTogether * kSummed + kTileDepth;
template <class Way>
constexpr int64_t kInputBlock = Way::kInputs * kInputProduct;
static_assert(kSummed == 4 * kTileRows);

// The sums of a group of N output tiles: [of a tile][tile][channel].
template <int N>
constexpr int64_t kSumProduct = (kTogether + 1) * N * kTileRows;

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

// One product of so many tiles, R at a time; inputs of one block of channels and the next lie `block` apart.
template <int R, int N>
void multiply_tiles(const int16_t* inputs, int64_t block, const int16_t* weights, int64_t pairs, int64_t tiles,
                    float* sums, bool fresh, Ahead* ahead) {
  constexpr int64_t most = kSummed / 2;  // pairs
  const int64_t lines = pairs / 4;
  for (; tiles > 0; tiles -= R, inputs += R * kSummed, sums += R * N * kTileRows) {
    if (const char* soon = ahead ? ahead->take(lines) : nullptr)
      for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(soon + i * Ahead::line, 0, 2);
    const int16_t* at = inputs;
    for (int64_t first = 0; first < pairs; first += most, at += block)
      add_tiles<R, N>(at, weights + first * N * kTileDepth, std::min(most, pairs - first), sums, fresh && first == 0);
  }
}

// The scales of a run's tiles, by the largest of their inputs in all channels. An output is made of what its own inputs
// give, so that one whose inputs are all zero is zero; but where they are much smaller than the tile's largest, too
// little would be left of them: then the tile's sums are to be direct.
template <class Way>
void find_scales(const View<bfloat16>& in, int64_t in_channels, const bfloat16* powers, const RowOfTiles& run,
                 float* to, float* back) {
  constexpr int too_small = 5 << 7;  // bits between numbers that are 32 times apart
  constexpr int patch = Way::kPatch, step = Way::kStep, windows = Way::kWindows;
  __m512i rows[step * kTogether + patch][windows];  // the largest of each column, in each window of rows
  const int64_t columns = step * (run.count - 1) + patch;
  const bfloat16* at = in.pixel_at(0, step * run.y - Way::kBefore, step * run.x - Way::kBefore);
  for (int64_t x = 0; x < columns; ++x, at += in.pixel) {
    __m512i most[windows];
    std::fill_n(most, windows, _mm512_setzero_si512());
    for (int64_t c = 0; c < in_channels; c += kTileDepth) {
      __m512i line[patch], here[windows];
      FASTODE_UNROLL for (int y = 0; y < patch; ++y) line[y] = magnitudes(at + y * in.row + c);
      if (powers) {
        const __m512i exponents = _mm512_sub_epi16(magnitudes(powers + c), _mm512_set1_epi16(kOne));
        FASTODE_UNROLL for (__m512i& each : line) each =
            _mm512_mask_adds_epu16(each, _mm512_test_epi16_mask(each, each), each, exponents);
      }
      Way::windows(line, here);
      FASTODE_UNROLL for (int w = 0; w < windows; ++w) most[w] = _mm512_max_epu16(most[w], here[w]);
    }
    std::copy_n(most, windows, rows[x]);
  }
  for (int64_t t = 0; t < run.count; ++t) {
    __m512i outputs[windows][windows], all = _mm512_setzero_si512();
    FASTODE_UNROLL for (int w = 0; w < windows; ++w) {
      __m512i line[patch];
      FASTODE_UNROLL for (int x = 0; x < patch; ++x) line[x] = rows[step * t + x][w];
      Way::windows(line, outputs[w]);
      FASTODE_UNROLL for (int x = 0; x < patch; ++x) all = _mm512_max_epu16(all, line[x]);
    }
    const int most = largest(all);
    const Scale scale(most);
    to[t] = scale.to, back[t] = scale.back;
    const __m512i least = _mm512_set1_epi16(static_cast<int16_t>(std::max(1, most - too_small)));
    FASTODE_UNROLL for (const auto& row : outputs) {
      FASTODE_UNROLL for (const __m512i& output : row) if (_mm512_cmpge_epu16_mask(output, least) == 0) [[unlikely]]
      if (largest(output) > 0) back[t] = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

// `plane` has the tiles: the outputs' of stride 1 and 2, the cotangents' of the latter's pull-back.
template <class Way, int N>
void run_winograd(const Plane<float>& plane, const ConvShape& shape, const int16_t* weights, const KernelView& kernels,
                  const float* bias, const ConvJob<bfloat16>* jobs, int64_t count, int16_t* inputs, Ahead* ahead) {
  using V = Vec<float>;
  constexpr int side = Way::kSide;
  constexpr int64_t input_block = kInputBlock<Way>;
  const PackedWinograd packed(shape);
  const float* const factors = reinterpret_cast<const float*>(weights + packed.factors);
  const bfloat16* powers = reinterpret_cast<const bfloat16*>(weights + packed.powers);
  if (are_ones(powers, shape.in_channels)) powers = nullptr;
  float* const sums = reinterpret_cast<float*>(inputs + divide_up(shape.in_channels, kSummed) * input_block);
  const int64_t blocks = blocks_of<float>(shape.in_channels), out_blocks = blocks_of<float>(shape.out_channels);
  float scale[kTogether], back[kTogether];  // of the tiles
  for (Chunks<kTogether> chunk(plane, count); chunk.next();) {
    chunk.each_run([&](const RowOfTiles& run) {
      find_scales<Way>(jobs[run.sample].in, shape.in_channels, powers, run, scale + run.place, back + run.place);
    });
    for (int64_t b = 0; b < blocks; ++b)
      chunk.each_run([&](const RowOfTiles& run) {
        int16_t* const to = inputs + b / 4 * input_block + run.place * kSummed + b % 4 * kTileRows;
        const float* const scales = scale + run.place;
        const auto put = [=](int p, int64_t t, V value) {
          store_rounded(to + p * kInputProduct + t * kSummed, (__m512)(value * scales[t]));
        };
        if (!powers) return Way::spread_run(jobs[run.sample].in, b, run, put);
        const V power = load_stored(powers + b * kTileRows);
        Way::spread_run(jobs[run.sample].in, b, run, [=](int p, int64_t t, V value) { put(p, t, value * power); });
      });
    const int16_t* group = weights;
    for (int64_t block = 0; block < out_blocks; block += N, group += packed.group_size) {
      int done = 0;
      Way::products([&](int input, int weight, int sum, bool fresh) {
        chunk.each_run(
            [&](const RowOfTiles& run) { ask_for<N, side>(jobs[run.sample].out, block, run, done, Way::kProducts); });
        multiply_tiles<kRowsAtOnce<N>, N>(inputs + input * kInputProduct, input_block, group + weight * packed.product,
                                          packed.pairs, chunk.tiles, sums + sum * kSumProduct<N>, fresh, ahead);
        ++done;
      });
      for (int64_t n = 0; n < N; ++n)
        chunk.each_run([&](const RowOfTiles& run) {
          const ConvJob<bfloat16>& job = jobs[run.sample];
          const auto kernel = [&](int64_t c, auto& g) {
            const int64_t out = (block + n) * kLanes<float>, last = shape.out_channels - out;
            for (int tap = 0; tap < 9; ++tap)
              for (int lane = 0; lane < kLanes<float>; ++lane)
                g[tap / 3][tap % 3][lane] = lane < last ? kernels(out + lane, c, tap / 3, tap % 3) : 0;
          };
          const auto direct = [&](int64_t t, V(&anew)[side][side]) {
            Way::directly(job.in, run, t, shape.in_channels, kernel, anew);
          };
          const float* const at = sums + (run.place * N + n) * kTileRows;
          const auto gather = [=](int64_t t, V(&of_tile)[side][side]) {
            Way::gather([=](int p) { return load<V>(at + p * kSumProduct<N> + t * N * kTileRows); }, of_tile);
          };
          const V factor = load<V>(factors + (block + n) * kLanes<float>);
          gather_outputs<side>(
              run, gather, [factor, scales = back + run.place](int64_t t) { return factor * scales[t]; },
              bias ? bias + (block + n) * kLanes<float> : nullptr, job, block + n, direct);
        });
    }
  }
}

// Of the weight gradient: what so many tiles' inputs and cotangents are spread to, two neighbours' numbers in pairs,
// and the sums over them. Of the inputs [block][of a tile][pair of tiles][channel], of a group of N blocks of
// cotangents [of a tile][pair of tiles][channel], both in pairs.
constexpr int64_t kGradientTiles = kSummed;
constexpr int64_t kPairProduct = (kGradientTiles / 2 + 1) * kTileDepth;

// The largest magnitudes of a block's channels in the patches of a run's tiles.
inline __m256i largest_of(const View<bfloat16>& map, int64_t b, const RowOfTiles& run, const Patches& patches,
                          __m256i most) {
  const auto [side, step, before] = patches;
  const bfloat16* at = map.pixel_at(b, step * run.y - before, step * run.x - before);
  for (int64_t y = 0; y < side; ++y, at += map.row)
    for (int64_t x = 0; x < step * (run.count - 1) + side; ++x)
      most = _mm256_max_epu16(most, half_magnitudes(at + x * map.pixel));
  return most;
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

template <class Way, int N>
void run_gradient(const Plane<float>& plane, const ConvShape& shape, const GradientPair<bfloat16>* pairs, int64_t count,
                  float* gradient, bool fresh, int16_t* inputs) {
  constexpr int R = kRowsAtOnce<N>;
  constexpr int64_t cell = kTileRows * N * kTileRows;  // of a sum and a block of inputs
  constexpr int64_t input_block = Way::kInputs * kPairProduct;
  const int64_t blocks = blocks_of<float>(shape.in_channels), out_blocks = blocks_of<float>(shape.out_channels);
  int16_t* const cotangents = inputs + blocks * input_block;
  float* const back = reinterpret_cast<float*>(cotangents + N * Way::kCotangents * kPairProduct);  // of input channels
  for (Chunks<kGradientTiles> chunk(plane, count); chunk.next(); fresh = false) {
    const auto scales_of = [&](const auto& map, int64_t b, const Patches& patches, float most) {
      __m256i magnitude = _mm256_setzero_si256();
      chunk.each_run(
          [&](const RowOfTiles& run) { magnitude = largest_of(map(pairs[run.sample]), b, run, patches, magnitude); });
      return Scales(magnitude, most);
    };
    for (int64_t b = 0; b < blocks; ++b) {
      const Scales scales = scales_of([](const auto& pair) { return pair.in; }, b, Way::kPatches, kMostInput);
      _mm512_storeu_ps(back + b * kTileRows, scales.back);
      chunk.each_run([&](const RowOfTiles& run) {
        int16_t* const to = inputs + b * input_block + run.place / 2 * kTileDepth;
        Way::spread_input_pairs(pairs[run.sample].in, b, run, scales.to,
                                [=](int p, int64_t t) { return to + p * kPairProduct + t * kTileDepth; });
      });
    }
    float* group = gradient;
    for (int64_t block = 0; block < out_blocks; block += N) {
      __m512 cotangent_back[N];
      for (int64_t n = 0; n < N; ++n) {
        const Scales scales =
            scales_of([](const auto& pair) { return pair.cotangent; }, block + n, {2, 2, 0}, kMostWeight / 4);
        cotangent_back[n] = scales.back;
        chunk.each_run([&](const RowOfTiles& run) {
          int16_t* const to = cotangents + (run.place / 2 * N + n) * kTileDepth;
          Way::spread_cotangent_pairs(pairs[run.sample].cotangent, block + n, run, scales.to,
                                      [=](int p, int64_t t) { return to + (p * kPairProduct + t * kTileDepth) * N; });
        });
      }
      for (int64_t b = 0; b < blocks; ++b, group += kProducts * cell)
        Way::products([&](int input, int cotangent, int sum, bool first) {
          for (int row = 0; row < kTileRows; row += R)
            add_pairs<R, N>(inputs + b * input_block + input * kPairProduct + 2 * row,
                            cotangents + cotangent * kPairProduct * N, chunk.tiles / 2, back + b * kTileRows + row,
                            cotangent_back, group + sum * cell + row * N * kTileRows, fresh && first);
        });
    }
  }
}

// f(the way, the vectors of outputs that are multiplied at once).
template <class Way, class F>
auto with_group(Way way, const ConvShape& shape, const F& f) {
  return group_of(blocks_of<float>(shape.out_channels)) == 2 ? f(way, std::integral_constant<int, 2>{})
                                                             : f(way, std::integral_constant<int, 1>{});
}

template <class F>
auto with_way(Filtering way, const ConvShape& shape, const F& f) {
  if (way == Filtering::kHalving) return with_group(Halving{}, shape, f);
  return way == Filtering::kDoubling ? with_group(Doubling{}, shape, f) : with_group(Straight{}, shape, f);
}

template <class F>
auto with_gradient_way(const ConvShape& shape, const F& f) {
  return shape.stride == 2 ? with_group(HalvingGradient{}, shape, f) : with_group(StraightGradient{}, shape, f);
}

}  // namespace

int64_t narrow_winograd_size(const ConvShape& shape) { return PackedWinograd(shape).size / 2; }

int64_t narrow_winograd_scratch_size(const ConvShape& shape, Filtering way) {
  return with_way(way, shape, [&](auto of, auto group) {
    using Way = decltype(of);
    return divide_up(shape.in_channels, kSummed) * kInputBlock<Way> * 2 + Way::kSums * kSumProduct<group()> * 4;
  });
}

void convolve_winograd(const Plane<float>& plane, const ConvShape& shape, Filtering way, const float* packed,
                       const KernelView& kernels, const float* bias, const ConvJob<bfloat16>* jobs, int64_t count,
                       void* scratch, Ahead* ahead) {
  with_way(way, shape, [&](auto of, auto group) {
    run_winograd<decltype(of), group()>(plane, shape, reinterpret_cast<const int16_t*>(packed), kernels, bias, jobs,
                                        count, static_cast<int16_t*>(scratch), ahead);
  });
}

int64_t narrow_winograd_gradient_scratch_size(const ConvShape& shape) {
  const int64_t blocks = blocks_of<float>(shape.in_channels);
  return with_gradient_way(shape, [&](auto of, auto group) {
    using Way = decltype(of);
    return (blocks * Way::kInputs + group() * Way::kCotangents) * kPairProduct * 2 + blocks * kTileRows * 4;
  });
}

void winograd_gradient(const Plane<float>& plane, const ConvShape& shape, const GradientPair<bfloat16>* pairs,
                       int64_t count, float* gradient, bool fresh, void* scratch) {
  with_gradient_way(shape, [&](auto of, auto group) {
    run_gradient<decltype(of), group()>(plane, shape, pairs, count, gradient, fresh, static_cast<int16_t*>(scratch));
  });
}

}  // namespace fastode::resident

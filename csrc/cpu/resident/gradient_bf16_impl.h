// The weight gradient in bfloat16. Included after conv_bf16_impl.h.
#pragma once

#include "conv_bf16_impl.h"
#if !FASTODE_AMX
#include "winograd_bf16_impl.h"
#endif

namespace fastode::resident {

// The weight gradient sums over positions: the pixels of an image and, in turn, of the samples that lie together. Its
// left factor is the input as rows of channels along the positions, a copy for each of the kernel's columns, so that a
// kernel's row is an offset by whole rows of the image: tiles that begin anywhere take six times as long to load. Where
// sums begin at any pair of positions, and samples lie together, a kernel's column is an offset too. The right factor
// is the cotangent with neighbouring positions paired, 32 to a tile; where each input is to meet the three cotangents
// of a kernel's row, the cotangent's odd positions with their neighbours, too.
namespace {

struct Positions {
  int64_t span, pad, rows;  // span: positions of an image's row; rows: of a copy, with those that the kernel adds
  int64_t chunks, pitch;    // chunks: of 32 positions; pitch: of a channel of a copy
  int64_t copies;
  bool three;  // inputs meet three cotangents

  // Of `height` rows of an image.
  Positions(const Plane<float>& plane, const ConvShape& shape, int64_t together, int64_t height)
      : span(plane.width * together),
        pad(shape.kernel_h / 2),
        rows(height + 2 * pad),
        chunks(divide_up(height * span, kTileDepth)),
        // Odd, so that the channels lie in different sets of the cache.
        pitch((divide_up(chunks * kTileDepth + 2 * pad * span, kTileDepth) | 1) * kTileDepth),
        copies(kPairwise && together % 2 == 0 && span % kTileDepth == 0 ? 1 : shape.kernel_w),
        three(kPairwise && together == 1 && span == kTileDepth && shape.kernel_w == 3) {
    if (three) copies = 1;
  }

  // Whether chunks are rows, or whole parts of them, of which one copy will do.
  bool whole() const { return span == kTileDepth || (copies == 1 && span % kTileDepth == 0); }
  int64_t copy() const { return kTileRows * pitch; }  // of one block and column of the kernel
  int64_t block() const { return copies * copy(); }   // of the input
  // Of one block: the pairs of even positions, then those of odd ones.
  int64_t cotangent() const { return chunks * (kTileElements + (three ? odd_row() : 0)); }
  int64_t odd_row() const { return (kTileRows + 1) * kTileDepth; }
};

// How much of the sum is worked on at a time: some sets of samples, or some rows of one, so that a block's copies stay
// in the first cache, beside the maps themselves where there is only one block.
struct Portion {
  int64_t sets, rows;

  Portion(const Plane<float>& plane, const ConvShape& shape, int64_t together, int64_t all) : rows(plane.height) {
    const bool little = shape.in_channels <= Narrow::lanes || Positions(plane, shape, together, rows).three;
    const int64_t room = little ? 1 << 14 : 9 << 12, second = 1 << 17;  // bytes
    const auto bytes = [&] { return Positions(plane, shape, together, rows).block() * 2; };
    sets = std::clamp<int64_t>(second / bytes(), 1, all);
    while (Positions(plane, shape, together, rows).whole() && rows > 4 && bytes() > room) rows = divide_up(rows, 2);
    if (rows < plane.height) sets = 1;
  }
};

// The positions of some rows of a Narrow map, one after the other, and zeros behind them.
class Source {
 public:
  Source(const bfloat16* at, const Narrow& narrow, int64_t span, int64_t rows)
      : at_(at), depth_(narrow.depth), gap_(narrow.row - span * narrow.depth), span_(span), left_(span), rows_(rows) {}

  const bfloat16* next() {
    static constexpr bfloat16 zeros[Narrow::lanes] = {};
    if (rows_ == 0) return zeros;
    const bfloat16* here = at_;
    at_ += depth_;
    if (--left_ == 0) at_ += gap_, left_ = span_, --rows_;
    return here;
  }

 private:
  const bfloat16* at_;
  int64_t depth_, gap_, span_, left_, rows_;
};

constexpr int16_t kPlaces[kTileDepth] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                         16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

// to: [channel][pitch], of one block and column of the kernel.
void transpose_input(const Positions& positions, Source from, bfloat16* to) {
  for (int64_t p = 0; p < positions.pitch; p += kTileDepth) {
    Words rows[16];
    for (int i = 0; i < 16; ++i) {
      const bfloat16* low = from.next();
      rows[i] = pair_of(low, from.next());
    }
    transpose(rows);
    FASTODE_UNROLL for (int i = 0; i < 16; ++i) std::memcpy(to + i * positions.pitch + p, rows + i, sizeof(Words));
  }
}

// Of all copies, where chunks are whole: what moves into a row from beside the image is zero. `in` is the first of
// `count` rows, the copies' row `at`.
void transpose_rows(const Positions& positions, const ConvShape& shape, const Narrow& narrow, const bfloat16* in,
                    int64_t at, int64_t count, bfloat16* to) {
  const int64_t depth = narrow.depth;
  for (int64_t y = at; y < at + count; ++y, in += narrow.row)
    for (int64_t p = 0; p < positions.span; p += kTileDepth) {
      Words rows[16];
      const bfloat16* from = in + p * depth;
      FASTODE_UNROLL for (int i = 0; i < 16; ++i) rows[i] = pair_of(from + 2 * i * depth, from + (2 * i + 1) * depth);
      transpose(rows);
      bfloat16* row = to + y * positions.span + p;
      if (positions.copies == 1) {
        FASTODE_UNROLL for (int i = 0; i < 16; ++i) std::memcpy(row + i * positions.pitch, rows + i, sizeof(Words));
        continue;
      }
      for (int64_t kx = 0; kx < shape.kernel_w; ++kx, row += positions.copy()) {
        const int64_t shift = (kx - shape.kernel_w / 2) * narrow.together;
        const __m512i places =
            _mm512_add_epi16(_mm512_loadu_si512(kPlaces), _mm512_set1_epi16(static_cast<int16_t>(shift)));
        const __mmask32 inside = _mm512_cmplt_epu16_mask(places, _mm512_set1_epi16(kTileDepth));
        FASTODE_UNROLL for (int i = 0; i < 16; ++i) _mm512_storeu_si512(
            row + i * positions.pitch, _mm512_maskz_permutexvar_epi16(inside, places, (__m512i)rows[i]));
      }
    }
}

// to: [chunk] tiles, of one block, and of each row the pairs that begin one position before; `in` is the first row's.
void pair_cotangent(const Positions& positions, const Narrow& narrow, const bfloat16* in, int64_t height,
                    bfloat16* to) {
  const auto put = [&](const bfloat16* low, const bfloat16* high) {
    const Words pairs = pair_of(low, high);
    std::memcpy(to, &pairs, sizeof(pairs));
    to += kTileDepth;
  };
  if (positions.whole()) {
    const int64_t depth = narrow.depth;
    for (int64_t y = 0; y < height; ++y, in += narrow.row)
      for (int64_t p = 0; p < positions.span; p += kTileDepth) {
        const bfloat16* from = in + p * depth;
        FASTODE_UNROLL for (int64_t i = 0; i < kTileDepth; i += 2) put(from + i * depth, from + (i + 1) * depth);
      }
    in -= height * narrow.row;
    for (int64_t y = 0; positions.three && y < height; ++y, in += narrow.row)
      for (int64_t i = -1; i < kTileDepth; i += 2) put(in + i * depth, in + (i + 1) * depth);
    return;
  }
  Source from(in, narrow, positions.span, height);
  for (int64_t p = 0; p < positions.chunks * kTileDepth; p += 2) {
    const bfloat16* low = from.next();
    put(low, from.next());
  }
}

// Which taps of a kernel a gradient is of: every `step`-th from these on.
struct Taps {
  const ConvShape& of;
  int64_t row = 0, column = 0, step = 1;
};

struct GradientRun {
  const bfloat16 *in, *cotangent;  // of the first set
  int64_t sets, in_set, cotangent_set, in_bytes, gradient_bytes;
  int64_t tap;         // elements of the gradient from a tap to the next
  int64_t span, next;  // positions of a row; elements of the input from a tap to the next
  int64_t begin, end;  // rows
  bool shifts;         // the first tap's input lies `shift` positions behind the cotangent, in the same copy
  int64_t shift;
  int64_t channels;  // of the input's block
};

// Calls chunk(in, cotangent, pairs) for what a tap of one set sums: rows that lie one after the other, in whole chunks,
// or of each row what has an input, `shift` positions from it.
template <class F>
void each_chunk(const GradientRun& run, int64_t shift, const bfloat16* in, const bfloat16* cotangent, const F& chunk) {
  int64_t from = run.begin * run.span / kTileDepth * kTileDepth;
  int64_t length = divide_up(run.end * run.span, kTileDepth) * kTileDepth - from, step = length, count = 1;
  if (shift != 0) from += std::max<int64_t>(0, -shift), length = run.span - std::abs(shift), step = run.span;
  if (shift != 0) count = run.end - run.begin;
  if constexpr (!kPairwise) count = length / kTileDepth, length = step = kTileDepth;
  // Called at one place, or its sums would not stay in registers.
  for (; count > 0; --count, from += step) chunk(in + from, cotangent + from / 2 * kTileDepth, length / 2);
}

// Adds M x N tiles: of 16 input channels at neighbouring taps times N times 16 output channels, whose cotangents lie
// `block` apart and whose gradients lie `out_stride` apart.
template <int M, int N>
void add_gradient(const GradientRun& run, int64_t block, float* gradient, int64_t out_stride) {
  const int64_t offset[3] = {0, run.next, 2 * run.next};
  float* const to[3] = {gradient, gradient + run.tap, gradient + 2 * run.tap};
  add_chunks<M, N>(
      [&](int m, const auto& chunk) {
        const int64_t shift = run.shifts ? run.shift + m * run.next : 0;
        for (int64_t n = 0; n < run.sets; ++n)
          each_chunk(run, shift, run.in + n * run.in_set, run.cotangent + n * run.cotangent_set, chunk);
      },
      run.channels, offset, run.in_bytes, block, to, run.gradient_bytes, out_stride);
}

#if !FASTODE_AMX
// Adds the tiles of a kernel's row: 16 input channels times 16 output channels at each of its taps.
void add_three_taps(const GradientRun& run, const Positions& positions, float* gradient) {
  add_three_chunks(
      [&](const auto& chunk) {
        for (int64_t n = 0; n < run.sets; ++n) {
          const bfloat16 *in = run.in + n * run.in_set, *even = run.cotangent + n * run.cotangent_set;
          const bfloat16* odd = even + positions.chunks * kTileElements;
          for (int64_t y = run.begin; y < run.end; ++y) {
            const bfloat16 *here = even + y * kTileElements, *before = odd + y * positions.odd_row();
            // The first tap's input is that of the cotangent one position on.
            chunk(in + y * kTileDepth, {before + kTileDepth, here, before}, kTileRows);
          }
        }
      },
      run.channels, run.in_bytes, gradient, run.gradient_bytes);
}
#endif

// Of some sets of samples, from rows of the image from `top` on; `shape` has the taps alone.
void add_portion(const Plane<float>& plane, const ConvShape& shape, const Taps& taps, int64_t together,
                 const GradientPair<bfloat16>* pairs, int64_t sets, int64_t top, int64_t height, float* gradient,
                 bfloat16* scratch) {
  constexpr int64_t lanes = kLanes<float>;
  const Positions positions(plane, shape, together, height);
  const Narrow input(plane, shape.in_channels, together), cotangent(plane, shape.out_channels, together);
  const int64_t in_blocks = blocks_of<float>(shape.in_channels), out_blocks = blocks_of<float>(shape.out_channels);
  const int64_t in_set = positions.block(), cotangent_set = out_blocks * positions.cotangent();
  const int64_t pad = positions.pad, wide = taps.of.kernel_w, all = taps.of.kernel_h * wide;
  bfloat16* cotangents = scratch + sets * in_set;
  for (int64_t n = 0; n < sets; ++n)
    for (int64_t ob = 0; ob < out_blocks; ++ob)
      pair_cotangent(positions, cotangent, pairs[n * together].cotangent.at + top * cotangent.row + ob * lanes, height,
                     cotangents + n * cotangent_set + ob * positions.cotangent());
  // The rows of the image that the copies have.
  const int64_t first = std::max<int64_t>(0, top - pad), last = std::min(plane.height, top + height + pad);
  const bool shifts = positions.copies < shape.kernel_w;
  const int64_t next = shifts ? together : positions.copy();
  GradientRun run{
      scratch,        nullptr, sets, in_set, cotangent_set, positions.pitch * 2, wide * lanes * 4, taps.step * lanes,
      positions.span, next,    0,    0,      shifts};
  for (int64_t ib = 0; ib < in_blocks; ++ib) {
    run.channels = std::min(lanes, shape.in_channels - ib * lanes);
    for (int64_t n = 0; n < sets; ++n) {
      const bfloat16* in = pairs[n * together].in.at + ib * lanes;
      bfloat16* to = scratch + n * in_set;
      if (positions.whole()) {
        transpose_rows(positions, shape, input, in + first * input.row, first - top + pad, last - first, to);
      } else {
        in += (top - pad) * input.row - shape.kernel_w / 2 * input.pixel;
        for (int64_t kx = 0; kx < shape.kernel_w; ++kx)
          transpose_input(positions, {in + kx * input.pixel, input, positions.span, positions.rows},
                          to + kx * positions.copy());
      }
    }
    const auto add = [&](auto group, int64_t ob) {
      constexpr int N = group();
      const int64_t block = positions.cotangent(), out_stride = in_blocks * all * lanes * lanes;
      for (int64_t ky = 0; ky < shape.kernel_h; ++ky) {
        // Those whose input row exists.
        run.begin = std::max(top, pad - ky) - top, run.end = std::min(top + height, plane.height + pad - ky) - top;
        if (run.begin >= run.end) continue;
        run.cotangent = cotangents + ob * block;
        float* to = gradient + ((ob * in_blocks + ib) * all + (taps.row + ky * taps.step) * wide) * lanes * lanes +
                    taps.column * lanes;
#if !FASTODE_AMX
        if (positions.three) {
          run.in = scratch + ky * positions.span;
          add_three_taps(run, positions, to);
          continue;
        }
#endif
        for (int64_t kx = 0; kx < shape.kernel_w; kx += 3, to += 3 * run.tap) {
          run.shift = (kx - shape.kernel_w / 2) * together;
          run.in = scratch + ky * positions.span + (shifts ? run.shift : kx * next);
          if (kx + 3 <= shape.kernel_w)
            add_gradient<3, N>(run, block, to, out_stride);
          else if (kx + 2 == shape.kernel_w)
            add_gradient<2, N>(run, block, to, out_stride);
          else
            add_gradient<1, N>(run, block, to, out_stride);
        }
      }
    };
    int64_t ob = 0;
    for (; ob + kGradientBlocks <= out_blocks && !positions.three; ob += kGradientBlocks)
      add(std::integral_constant<int, kGradientBlocks>{}, ob);
    for (; ob < out_blocks; ++ob) add(std::integral_constant<int, 1>{}, ob);
  }
}

void add_taps(const Plane<float>& plane, const ConvShape& shape, const Taps& taps, int64_t together,
              const GradientPair<bfloat16>* pairs, int64_t count, float* gradient, void* scratch) {
  const int64_t sets = divide_up(count, together);
  const Portion portion(plane, shape, together, sets);
  const TileScope scope;
  for (int64_t set = 0; set < sets; set += portion.sets)
    for (int64_t y = 0; y < plane.height; y += portion.rows)
      add_portion(plane, shape, taps, together, pairs + set * together, std::min(portion.sets, sets - set), y,
                  std::min(portion.rows, plane.height - y), gradient, static_cast<bfloat16*>(scratch));
}

}  // namespace

int64_t tile_scratch_size(const Plane<float>& plane, const ConvShape& shape, int64_t together, int64_t pairs) {
  const Portion portion(plane, shape, together, divide_up(pairs, together));
  const Positions positions(plane, shape, together, portion.rows);
  const int64_t set = positions.block() + blocks_of<float>(shape.out_channels) * positions.cotangent();
  return portion.sets * set * static_cast<int64_t>(sizeof(bfloat16));
}

int64_t strided_tile_scratch_size(const Plane<float>& out, const ConvShape& shape, int64_t together, int64_t pairs) {
  int64_t size = 0;
  each_parity(shape, [&](int64_t, int64_t, const ParityTaps& rows, const ParityTaps& columns) {
    size = std::max(size, tile_scratch_size(out, forward_part(shape, rows, columns), together, pairs));
  });
  return size;
}

void weight_gradient(const Plane<float>& plane, const ConvShape& shape, int64_t together,
                     const GradientPair<bfloat16>* pairs, int64_t count, float* gradient, void* scratch) {
  add_taps(plane, shape, {shape}, together, pairs, count, gradient, scratch);
}

// The taps of a parity are those of a kernel of one or two rows and columns, which end at the position.
void strided_weight_gradient(const Plane<float>& out, const ConvShape& shape, int64_t together, int64_t phase,
                             const GradientPair<bfloat16>* pairs, int64_t count, float* gradient, void* scratch) {
  each_parity(shape, [&](int64_t py, int64_t px, const ParityTaps& rows, const ParityTaps& columns) {
    GradientPair<bfloat16> moved[kMostJobs];
    for (int64_t n = 0; n < count; ++n) {
      moved[n] = pairs[n];
      moved[n].in.at += (2 * py + px) * phase;
    }
    add_taps(out, forward_part(shape, rows, columns), {shape, rows.first, columns.first, 2}, together, moved, count,
             gradient, scratch);
  });
}

}  // namespace fastode::resident

// The gradients of the parameters, from what a backward program left: those of the convolutions as products over pixels
// on the tensor cores, a block's share of samples and stages at a time, and the sum of all blocks' shares.
#pragma once

#include "grid.cuh"
#include "second.cuh"

namespace fastode::device {

// The product of a map's shifts with a cotangent: [tap][in][out], in tiles of 16 by 8 for each mma. A warp has one or
// more squares of 16 × 16 channels at all taps, or at so many from `first` on; where there are fewer squares than
// warps, the warps share out the pixels.
template <class Tile, int kTaps = 9>
struct Products {
  using T = typename Tile::Type;
  static constexpr int C = Tile::kChannels, W = Tile::kSide, kWarps = Tile::kThreads / 32;
  static constexpr int kSide = C / 16, kSquares = kSide * kSide;
  static constexpr int kEach = kSquares > kWarps ? kSquares / kWarps : 1;  // squares of a warp, beside each other
  static constexpr int kParts = kWarps * kEach / kSquares;                 // of the pixels
  static constexpr int kSteps = W * W / 16 / kParts;
  static constexpr int kEntries = 9 * C * C;
  static_assert(kParts * kSquares == kWarps * kEach && kSide % kEach == 0 && kSteps * kParts * 16 == W * W);

  float value[kTaps][kEach][2][4];
  int first = 0;

  static FASTODE_DEVICE int part() { return Tile::warp() % kParts; }
  static FASTODE_DEVICE int first_in() { return Tile::warp() / kParts * kEach / kSide * 16; }
  static FASTODE_DEVICE int first_out() { return Tile::warp() / kParts * kEach % kSide * 16; }

  FASTODE_DEVICE void clear() {
    FASTODE_UNROLLED
    for (int tap = 0; tap < kTaps; ++tap) {
      FASTODE_UNROLLED
      for (int i = 0; i < kEach * 8; ++i) value[tap][i / 8][i / 4 % 2][i % 4] = 0;
    }
  }

  // Puts two kept maps where `add` reads them.
  static FASTODE_DEVICE void put(char* map, char* bare, const char* input, const char* cotangent) {
    FASTODE_ROLLED
    for (int tile = 0; tile < Tile::kTiles; ++tile) {
      const Words in = Tile::kept_tile(input, tile), out = Tile::kept_tile(cotangent, tile);
      FASTODE_UNROLLED
      for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<uint32_t*>(Tile::word_in(map, tile, i / 2, i % 2)) = in.word[i];
        *reinterpret_cast<uint32_t*>(Tile::bare_word_in(bare, tile, i / 2, i % 2)) = out.word[i];
      }
    }
  }

  // `map` has a border, `bare` none.
  FASTODE_DEVICE void add(const char* map, const char* bare) {
    const int matrix = lane() / 8, in_matrix = lane() % 8;
    FASTODE_ROLLED
    for (int step = part() * kSteps; step < (part() + 1) * kSteps; ++step) {
      // The 16 pixels of a step are two matrices of eight, beside or above each other.
      const int row = W == 8 ? 2 * step : step / Tile::kHalves, column = step % Tile::kHalves * 16;
      uint32_t right[kEach][2][2];
      FASTODE_UNROLLED
      for (int each = 0; each < kEach; ++each) {
        const int eight = first_out() / 8 + 2 * each + matrix / 2, pixel = step * 16 + matrix % 2 * 8 + in_matrix;
        uint32_t found[4];
        ldmatrix_x4_transposed(found, bare + (eight * W * W + pixel) * 16);
        FASTODE_UNROLLED
        for (int i = 0; i < 4; ++i) right[each][i / 2][i % 2] = found[i];
      }
      const int half = matrix / 2 * (W == 8 ? W + 2 : 8);
      const char* at = map + ((first_in() / 8 + matrix % 2) * Tile::kPixels + (row + first / 3) * (W + 2) + column +
                              half + in_matrix) *
                                 16;
      FASTODE_UNROLLED
      for (int tap = 0; tap < kTaps; ++tap) {
        uint32_t left[4];
        ldmatrix_x4_transposed(left, at + (tap / 3 * (W + 2) + tap % 3) * 16);
        FASTODE_UNROLLED
        for (int i = 0; i < kEach * 2; ++i) T::mma(value[tap][i / 2][i % 2], left, right[i / 2][i % 2]);
      }
    }
  }

  // The taps of a turn are put at, or added to, [tap][in][out].
  FASTODE_DEVICE void store(float* to, int turn = 0) const {
    FASTODE_UNROLLED
    for (int tap = 0; tap < kTaps; ++tap) {
      const bool mine = (first + tap) % kParts == (part() + turn) % kParts;
      FASTODE_UNROLLED
      for (int i = 0; i < kEach * 8; ++i) {
        const int in = first_in() + lane() / 4 + i / 2 % 2 * 8;
        const int out = first_out() + i / 8 * 16 + i / 4 % 2 * 8 + lane() % 4 * 2 + i % 2;
        float& place = to[((first + tap) * C + in) * C + out];
        const float own = value[tap][i / 8][i / 4 % 2][i % 4];
        if (mine) place = turn > 0 ? place + own : own;  // not around all: as a choice of taps they would be in memory
      }
    }
  }
};

// The sums of a block's products: at `to` or, where parts share the entries, in shared memory first.
template <class Tile>
struct ProductSums {
  static constexpr bool kShares = Products<Tile>::kParts > 1;
  static constexpr size_t kBytes = kShares ? Products<Tile>::kEntries * sizeof(float) : 0;

  float *to, *shared;

  FASTODE_DEVICE void begin() const {
    FASTODE_ROLLED
    for (int i = thread(); i < Products<Tile>::kEntries; i += Tile::kThreads) (kShares ? shared : to)[i] = 0;
  }

  // `more`: to what is there, with `begin` at first. In each turn a part adds other taps than its neighbours do, so
  // that all of them work at once, and in an order that is always the same.
  template <int kTaps>
  FASTODE_DEVICE void add(const Products<Tile, kTaps>& products, bool more) const {
    if constexpr (kShares) {
      FASTODE_ROLLED
      for (int turn = 0; turn < Products<Tile>::kParts; ++turn) {
        products.store(shared, more ? turn + Products<Tile>::kParts : turn);
        block_barrier();  // unseen: where all turns add, the test machine's threads do so one after the other
      }
    } else {
      products.store(to, more);
    }
  }

  // After the last products.
  FASTODE_DEVICE void finish(bool more = false) const {
    FASTODE_ROLLED
    for (int i = thread(); kShares && i < Products<Tile>::kEntries; i += Tile::kThreads)
      to[i] = more ? to[i] + shared[i] : shared[i];
  }
};

// Where a row of shares begins, each so many entries long.
FASTODE_DEVICE float* row_of(const cuda::Shares& shares, int row, int64_t entries) {
  return row < shares.split ? shares.first + row * entries : shares.second + (row - shares.split) * entries;
}

// A block's share of the gradients of one unit's convolution.
template <class Tile>
struct WeightGradients {
  static constexpr int threads = Tile::kThreads;
  static constexpr bool meets = true;
  static constexpr int C = Tile::kChannels;

  // Behind the branch's: the cotangent for the products, the two maps that are on their way, sums of warps.
  static constexpr size_t bytes(int units) {
    return Memory<Tile>::bytes(units, 0) + 3 * Tile::kKeptBytes + ProductSums<Tile>::kBytes;
  }
  static int most_items(const cuda::WeightsCall& call) { return call.samples * call.count * call.branch.count; }

  static FASTODE_DEVICE void run(const cuda::WeightsCall& call) {
    const int units = call.branch.count, u = block() % units;
    Second<Tile> branch(call.branch, call.samples, false);
    char* const bare = branch.memory().end;
    const Incoming incoming{bare + Tile::kKeptBytes, bare + 2 * Tile::kKeptBytes};
    Products<Tile> products;
    products.clear();
    float bias[1][4] = {};
    const int items = call.samples * call.count, stride = blocks() / units;
    const int first = block() / units;
    if (first < items) request(branch, call, u, first, incoming);
    FASTODE_ROLLED
    for (int item = first; item < items; item += stride) {
      const cuda::Product& product = call.product[item / call.samples];
      await_copies();
      block_barrier();
      put_input(branch, call, product, u, item % call.samples, incoming);
      // A tangent has no bias.
      put_cotangent(bare, product, u, incoming.cotangent, bias[0]);
      block_barrier();
      // The next item's maps come while the products are made.
      if (item + stride < items) request(branch, call, u, item + stride, incoming);
      products.add(branch.memory().map, bare);
    }
    branch.leave_partial(bias);
    float* const shared = reinterpret_cast<float*>(bare + 3 * Tile::kKeptBytes);
    if constexpr (ProductSums<Tile>::kShares) ProductSums<Tile>{nullptr, shared}.add(products, false);
    // Anew, so that nothing of it waits in a register while products are made.
    const int group = anew(block()) / call.branch.count, unit = anew(block()) % call.branch.count;
    const int rows = call.shares.rows, turns = (blocks() / call.branch.count + rows - 1) / rows;
    constexpr int64_t entries = Products<Tile>::kEntries + C;
    float* const to = row_of(call.shares, group % rows, call.branch.count * entries) + unit * entries;
    FASTODE_ROLLED
    for (int turn = 0; turn < turns; ++turn) {
      grid_barrier();  // shares lie where maps have been that blocks read
      if (turn == group / rows) leave_share(branch, products, {to, shared}, turn > 0);
    }
  }

 private:
  // Puts a block's share to a row or, with `more`, adds it.
  static FASTODE_DEVICE void leave_share(const Second<Tile>& branch, const Products<Tile>& products,
                                         const ProductSums<Tile>& sums, bool more) {
    FASTODE_ROLLED
    for (int c = thread(); c < C; c += Tile::kThreads) {
      float& place = sums.to[Products<Tile>::kEntries + c];
      const float own = branch.sum_channel(0, c);
      place = more ? place + own : own;
    }
    if constexpr (ProductSums<Tile>::kShares)
      sums.finish(more);
    else
      sums.add(products, more);
  }

  // Where a unit's input and the cotangent of its convolution come.
  struct Incoming {
    char *input, *cotangent;
  };

  static FASTODE_DEVICE void request(const Second<Tile>& branch, const cuda::WeightsCall& call, int u, int item,
                                     const Incoming& incoming) {
    const cuda::Product& product = call.product[item / call.samples];
    const int n = item % call.samples;
    Tile::request(incoming.cotangent, Branch<Tile>::place(call.room, product.cotangent[u], n));
    if (product.tangent[u] < 0)
      branch.request(u, n, product.evaluation, Branch<Tile>::place(call.room, product.input[u], n), incoming.input);
  }

  static FASTODE_DEVICE void put_input(Second<Tile>& branch, const cuda::WeightsCall& call,
                                       const cuda::Product& product, int u, int n, const Incoming& incoming) {
    if (product.tangent[u] < 0) return branch.revisit(u, incoming.input);
    branch.revisit_tangent(u, n, product.evaluation, product.tangent_evaluation,
                           Branch<Tile>::place(call.room, product.input[u], n),
                           Branch<Tile>::place(call.room, product.tangent[u], n));
  }

  // Its sums over the pixels are the bias's.
  static FASTODE_DEVICE void put_cotangent(char* bare, const cuda::Product& product, int u, const char* slot,
                                           float (&bias)[4]) {
    using T = typename Tile::Type;
    FASTODE_ROLLED
    for (int tile = 0; tile < Tile::kTiles; ++tile) {
      const float factor = product.factor[anew(u)];  // here, for registers are scarce
      const bool sums = product.tangent[anew(u)] < 0;
      const Words kept = Tile::kept_tile(slot, tile);
      FASTODE_UNROLLED
      for (int i = 0; i < 4; ++i) {
        Pair pair = T::unpack(kept.word[i]);
        uint32_t word = kept.word[i];
        if (factor != 1) word = T::pack(factor * pair.low, factor * pair.high), pair = T::unpack(word);
        *reinterpret_cast<uint32_t*>(Tile::bare_word_in(bare, tile, i / 2, i % 2)) = word;
        if (sums) bias[i / 2 * 2] += pair.low, bias[i / 2 * 2 + 1] += pair.high;
      }
    }
  }
};

// The sums of all blocks' shares, in the order of the blocks, rounded to the parameters' dtype.
template <class T>
struct FinishGradients {
  static constexpr int kAcross = 32, kDown = 8, threads = kAcross * kDown;

  static int entries(const cuda::FinishCall& call) { return call.units * unit_entries(call) + norm_entries(call); }
  static size_t bytes() { return threads * sizeof(float); }

  static FASTODE_DEVICE void run(const cuda::FinishCall& call) {
    float* const parts = reinterpret_cast<float*>(shared_memory());
    const int first = call.units * unit_entries(call), total = first + norm_entries(call);
    const int entry = block() * kAcross + thread() % kAcross;
    float sum = 0;
    if (entry < total) {
      const bool norm = entry >= first;
      const int64_t width = norm ? norm_entries(call) : first;
      const int rows = norm ? call.sums_rows : call.shares.rows;
      const int fold = norm ? fold_of(call, entry - first) : 1;
      for (int row = thread() / kAcross; row < rows; row += kDown) {
        const float* const from =
            norm ? call.sums + row * width + entry - first : row_of(call.shares, row, width) + entry;
        for (int i = 0; i < fold; ++i) sum += from[i];
      }
    }
    parts[thread()] = sum;
    block_barrier();
    if (thread() >= kAcross || entry >= total) return;
    sum = 0;
    FASTODE_UNROLLED
    for (int i = 0; i < kDown; ++i) sum += parts[i * kAcross + thread()];
    if (call.before) sum += call.before[entry];
    if (call.after)
      call.after[entry] = sum;
    else
      put(call, entry, first, sum);
  }

 private:
  static FASTODE_DEVICE_HOST int unit_entries(const cuda::FinishCall& call) {
    return (9 * call.channels + 1) * call.channels;
  }
  static FASTODE_DEVICE_HOST int norm_entries(const cuda::FinishCall& call) { return call.norms * 2 * call.channels; }

  // How many entries of a norm, from the first one on, belong to one channel; 0: this one is none or not the first.
  static FASTODE_DEVICE int fold_of(const cuda::FinishCall& call, int entry) {
    const int half = entry / (2 * call.channels) % 2, c = entry % call.channels;
    const int fold = half == 1 ? call.stride * call.stride : 1;
    return c < call.own[half] * fold && c % fold == 0 ? fold : 0;
  }

  // Where a product at a tap of two maps' channels lies in a convolution's weight; -1: it has none.
  static FASTODE_DEVICE int weight_at(const cuda::FinishCall& call, int tap, int in, int out) {
    const int stride = call.stride, side = stride + 2;
    const int row = stride * (tap / 3 - 1) + in / stride % stride + 1;
    const int column = stride * (tap % 3 - 1) + in % stride + 1, c = in / (stride * stride);
    if (out >= call.own[0] || c >= call.own[1] || row < 0 || row >= side || column < 0 || column >= side) return -1;
    return ((out * call.own[1] + c) * side + row) * side + column;
  }

  static FASTODE_DEVICE void put(const cuda::FinishCall& call, int entry, int first, float value) {
    const int channels = call.channels;
    void* to = nullptr;
    int at = 0;
    if (entry >= first) {
      const int fold = fold_of(call, entry - first);
      const cuda::UnitGradients& unit = call.unit[(entry - first) / (2 * channels)];
      const bool weight = (entry - first) / channels % 2 == 1;
      to = weight ? unit.norm_weight : unit.norm_bias;
      at = fold == 0 ? -1 : (entry - first) % channels / fold;
    } else {
      const cuda::UnitGradients& unit = call.unit[entry / unit_entries(call)];
      const int i = entry % unit_entries(call), tap = i / (channels * channels);
      const bool bias = tap == 9;
      to = bias ? unit.bias : unit.weight;
      at = bias ? i % channels : weight_at(call, tap, i / channels % channels, i % channels);
    }
    if (to && at >= 0) static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(T::pack(value, 0));
  }
};

}  // namespace fastode::device

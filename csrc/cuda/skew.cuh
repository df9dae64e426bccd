// The skew pair in a block, a sample at a time: an evaluation, and a solution by equal steps. Equations: README.md of
// fastode/ops/schemes/skew_pair.
#pragma once

#include "branch.cuh"

namespace fastode::device {

enum { kPreY = 0, kPreZ, kPostY, kPostZ };

// Where the maps of a sample lie: the state, the norms' results at a stage's point, then ẏ and ż of each stage.
enum { kStateY = 0, kStateZ, kHatY, kHatZ, kSlopes };

template <class Tile>
class SkewPair : public Sums<Tile> {
  using Base = Sums<Tile>;

 public:
  using typename Base::State;
  using typename Base::T;
  using Sum = typename Tile::Sum;
  using Base::C;

  // Reads all parameters. A norm that does not measure its statistics has them in the place of the sums.
  FASTODE_DEVICE explicit SkewPair(const cuda::Pair& pair) : Base(cuda::kPairNorms, 1), pair_(pair) {
    Tile::clear_border(memory_.map);
    Tile::put_weight(memory_.weight(0), static_cast<const uint16_t*>(pair.weight), pair.weight_strides);
    FASTODE_ROLLED
    for (int which = 0; which < cuda::kPairNorms; ++which) {
      const cuda::PairNorm& norm = pair.norm[which];
      FASTODE_ROLLED
      for (int c = thread(); c < C; c += Tile::kThreads) {
        memory_.norm_weight(which)[c] = Branch<Tile>::number(norm.weight, c, 1);
        memory_.norm_bias(which)[c] = Branch<Tile>::number(norm.bias, c, 0);
        memory_.sums(which)[c] = Branch<Tile>::number(norm.mean, c, 0);
        memory_.sums(which)[C + c] = rsqrt(Branch<Tile>::number(norm.variance, c, 1) + norm.eps);
      }
    }
    block_barrier();
  }

  // (1) at the point whose ŷ lies at `hat_y`, and ẑ at `hat_z` and in `hat`: ẏ, in `hat`.
  FASTODE_DEVICE void slope_y(State& hat, const char* hat_y) { slope<false>(hat, hat_y, kPostY); }

  // Likewise ż, from ŷ in `hat`.
  FASTODE_DEVICE void slope_z(State& hat, const char* hat_z) { slope<true>(hat, hat_z, kPostZ); }

  FASTODE_DEVICE void normalise(int which, State& state) {
    const cuda::PairNorm& norm = pair_.norm[which];
    if (norm.mode == kNoNorm) return;
    const bool measured = norm.mode == kGroupNorm;
    if (measured) this->take_statistics(norm.groups, norm.eps, state);
    const float* const found = measured ? memory_.mean : memory_.sums(which);
    FASTODE_UNROLLED
    for (int eight = 0; eight < 2; ++eight) {
      const int c = Tile::channel(eight);
      const float mean[2] = {found[c], found[c + 1]};
      const float factor[2] = {found[C + c] * memory_.norm_weight(which)[c],
                               found[C + c + 1] * memory_.norm_weight(which)[c + 1]};
      const float shift[2] = {memory_.norm_bias(which)[c], memory_.norm_bias(which)[c + 1]};
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        FASTODE_UNROLLED
        for (int half = 0; half < 2; ++half) {
          uint32_t& word = state.word[tile][eight][half];
          const Pair pair = T::unpack(word);
          word = T::pack((pair.low - mean[0]) * factor[0] + shift[0], (pair.high - mean[1]) * factor[1] + shift[1]);
        }
      }
    }
  }

 private:
  using Base::memory_;

  // norm(σ(W hat − γ other)), or with −Wᵀ in W's place.
  template <bool kTransposed>
  FASTODE_DEVICE void slope(State& hat, const char* other, int norm) {
    Sum sum;
    block_barrier();
    Tile::put(memory_.map, hat);
    block_barrier();
    Tile::clear(sum);
    Tile::template convolve<kTransposed>(sum, memory_.map, memory_.weight(0));
    if (kTransposed) Tile::scale(sum, -1);
    if (pair_.gamma != 0) Tile::add_kept(sum, -pair_.gamma, other);
    const ActivationArguments act{pair_.activation, pair_.p, pair_.q};
    FASTODE_UNROLLED
    for (int tile = 0; tile < Tile::kTiles; ++tile) {
      FASTODE_UNROLLED
      for (int i = 0; i < 8; ++i) sum.value[tile][i / 4][i % 4] = activate(act, sum.value[tile][i / 4][i % 4]);
    }
    Tile::round(hat, sum);
    normalise(norm, hat);
  }

  const cuda::Pair& pair_;
};

// y(t₁) from x, which is y(0) and z(0).
template <class Tile>
struct MarchForward {
  static constexpr int threads = Tile::kThreads;
  using State = typename Tile::State;

  static constexpr size_t bytes(int) { return Memory<Tile>::bytes(cuda::kPairNorms, 1); }

  static FASTODE_DEVICE void run(const cuda::MarchCall& call) {
    SkewPair<Tile> pair(call.pair);
    FASTODE_ROLLED
    for (int n = block(); n < call.samples; n += blocks()) {
      State state;
      Tile::load(state, call.x, n);
      Tile::keep(state, place(call, n, kStateY));
      Tile::keep(state, place(call, n, kStateZ));
      FASTODE_ROLLED
      for (int step = 0; step < call.steps; ++step) {
        const cuda::Used& used = call.used[step >= call.turn];
        FASTODE_ROLLED
        for (int i = 0; i < call.stages; ++i) stage(pair, call, used, n, i);
        if (step + 1 == call.steps) break;
        combine(state, call, used.z, n, kStateZ, call.stages);
        Tile::keep(state, place(call, n, kStateZ));
        combine(state, call, used.y, n, kStateY, call.stages);
        Tile::keep(state, place(call, n, kStateY));
      }
      combine(state, call, call.used[1].y, n, kStateY, call.stages);
      Tile::store(state, call.result, n);
    }
  }

 private:
  static FASTODE_DEVICE char* place(const cuda::MarchCall& call, int n, int slot) {
    return Branch<Tile>::place(call.room, slot, n);
  }

  // One half of a stage's point or, at row `stages`, of the next state. A slope that is not used is not there.
  static FASTODE_DEVICE void combine(State& state, const cuda::MarchCall& call, uint32_t used, int n, int half,
                                     int row) {
    typename Tile::Sum sum;
    Tile::clear(sum);
    Tile::add_kept(sum, 1, place(call, n, half));
    FASTODE_ROLLED
    for (int j = 0; j < row; ++j) {
      const float factor = call.table[row][j];
      if (factor != 0 && used >> j & 1) Tile::add_kept(sum, factor, place(call, n, kSlopes + 2 * j + half));
    }
    Tile::round(state, sum);
  }

  static FASTODE_DEVICE void stage(SkewPair<Tile>& pair, const cuda::MarchCall& call, const cuda::Used& used, int n,
                                   int i) {
    const bool y = used.y >> i & 1, z = used.z >> i & 1, damped = call.pair.gamma != 0;
    State hat;
    if (z || (y && damped)) {
      combine(hat, call, used.y, n, kStateY, i);
      pair.normalise(kPreY, hat);
      Tile::keep(hat, place(call, n, kHatY));
    }
    if (y || (z && damped)) {
      combine(hat, call, used.z, n, kStateZ, i);
      pair.normalise(kPreZ, hat);
      if (z && damped) Tile::keep(hat, place(call, n, kHatZ));
    }
    if (y) {
      pair.slope_y(hat, place(call, n, kHatY));
      Tile::keep(hat, place(call, n, kSlopes + 2 * i + kStateY));
    }
    if (z) {
      Tile::recall(hat, place(call, n, kHatY));
      pair.slope_z(hat, place(call, n, kHatZ));
      Tile::keep(hat, place(call, n, kSlopes + 2 * i + kStateZ));
    }
  }
};

}  // namespace fastode::device

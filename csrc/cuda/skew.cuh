// The skew pair in a block, a sample at a time: an evaluation and its pull-back. Equations: README.md of
// fastode/ops/schemes/skew_pair.
#pragma once

#include "activation.cuh"
#include "norms.cuh"

namespace fastode::device {

enum { kPreY = 0, kPreZ, kPostY, kPostZ };

// What an evaluation leaves of a half to its pull-back: the activation's input, and mean and rstd of the norms.
struct Trace {
  char* input;
  float *before, *after;  // W; the activation
};

template <class Tile>
class SkewPair : public Norms<Tile> {
  using Base = Norms<Tile>;

 public:
  using Base::C;
  using typename Base::State;
  using typename Base::Sum;
  using typename Base::T;

  // Reads all parameters. Forwards a norm that does not measure its statistics has them in the place of the sums.
  FASTODE_DEVICE SkewPair(const cuda::Pair& pair, bool forward, bool sums)
      : Base(cuda::kPairNorms, 1), pair_(pair), sums_(sums) {
    Tile::clear_border(memory_.map);
    Tile::put_weight(memory_.weight(0), static_cast<const uint16_t*>(pair.weight), pair.weight_strides);
    FASTODE_ROLLED
    for (int which = 0; which < cuda::kPairNorms; ++which) {
      const cuda::PairNorm& norm = pair.norm[which];
      FASTODE_ROLLED
      for (int c = thread(); c < C; c += Tile::kThreads) {
        memory_.norm_weight(which)[c] = Base::number(norm.weight, c, 1);
        memory_.norm_bias(which)[c] = Base::number(norm.bias, c, 0);
        memory_.sums(which)[c] = forward ? Base::number(norm.mean, c, 0) : 0;
        memory_.sums(which)[C + c] = forward ? rsqrt(Base::number(norm.variance, c, 1) + norm.eps) : 0;
      }
    }
    block_barrier();
  }

  // (1) at the point whose ŷ lies at `hat_y`, and ẑ at `hat_z` and in `hat`: ẏ, in `hat`.
  FASTODE_DEVICE void slope_y(State& hat, const char* hat_y, const Trace& left) {
    slope<false>(hat, hat_y, kPostY, left);
  }

  // Likewise ż, from ŷ in `hat`.
  FASTODE_DEVICE void slope_z(State& hat, const char* hat_z, const Trace& left) {
    slope<true>(hat, hat_z, kPostZ, left);
  }

  // The slope again, from what its evaluation left.
  FASTODE_DEVICE void slope_again(State& state, int norm, const Trace& left) const {
    activate_again(state, left.input);
    normalise_again(norm, state, left.after);
  }

  // `rows`: where mean and rstd are kept, or null.
  FASTODE_DEVICE void normalise(int which, State& state, float* rows) {
    const cuda::PairNorm& norm = pair_.norm[which];
    if (norm.mode == kNoNorm) return;
    const bool measured = norm.mode == kGroupNorm;
    if (measured) this->take_statistics(norm.groups, norm.eps, state);
    const float* const found = measured ? memory_.mean : memory_.sums(which);
    FASTODE_ROLLED
    for (int i = thread(); rows && i < 2 * C; i += Tile::kThreads) rows[i] = found[i];
    normalise_again(which, state, found);
  }

  // `found`: mean, then rstd.
  FASTODE_DEVICE void normalise_again(int which, State& state, const float* found) const {
    if (pair_.norm[which].mode == kNoNorm) return;
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

  // Whether the pull-back of a norm reads the norm's input.
  FASTODE_DEVICE bool reads(int which) const { return pair_.norm[which].mode == kGroupNorm || wanted(which); }

  // bar becomes the cotangent of the input `x` of a norm with mean and rstd `found`.
  FASTODE_DEVICE void pull(int which, const State& x, Sum& bar, const float* found) {
    const cuda::PairNorm& norm = pair_.norm[which];
    if (norm.mode == kNoNorm) return;
    const bool coupled = norm.mode == kGroupNorm;
    if (reads(which)) this->sum_channels(x, bar, found);
    if (coupled) this->take_means(norm.groups, memory_.norm_weight(which), 2, 0);
    if (wanted(which)) this->add_sums(which);
    if (reads(which)) block_barrier();
    this->pull_norm(which, x, bar, found, coupled);
  }

  // What the activation made of its input, again.
  FASTODE_DEVICE void activate_again(State& state, const char* input) const {
    const ActivationArguments act{pair_.activation, pair_.p, pair_.q};
    Tile::recall(state, input);
    FASTODE_UNROLLED
    for (int tile = 0; tile < Tile::kTiles; ++tile) {
      FASTODE_UNROLLED
      for (int i = 0; i < 4; ++i) {
        uint32_t& word = state.word[tile][i / 2][i % 2];
        const Pair pair = T::unpack(word);
        word = T::pack(activate(act, pair.low), activate(act, pair.high));
      }
    }
  }

  // bar becomes the cotangent of the activation's input.
  FASTODE_DEVICE void pull_activation(Sum& bar, const char* input) const {
    const ActivationArguments act{pair_.activation, pair_.p, pair_.q};
    FASTODE_UNROLLED
    for (int eight = 0; eight < 2; ++eight) {
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        uint32_t words[2];
        Tile::kept_words(words, input, tile, eight);
        FASTODE_UNROLLED
        for (int half = 0; half < 2; ++half) {
          const Pair pair = T::unpack(words[half]);
          bar.value[tile][eight][2 * half] *= derive(act, pair.low);
          bar.value[tile][eight][2 * half + 1] *= derive(act, pair.high);
        }
      }
    }
  }

  // Puts a map where a convolution reads it.
  FASTODE_DEVICE void put(const State& map) const {
    block_barrier();
    Tile::put(memory_.map, map);
    block_barrier();
  }

  // sum = W times that map, or Wᵀ.
  template <bool kTransposed>
  FASTODE_DEVICE void convolve(Sum& sum) const {
    Tile::clear(sum);
    Tile::template convolve<kTransposed>(sum, memory_.map, memory_.weight(0));
  }

  FASTODE_DEVICE float gamma() const { return pair_.gamma; }

 private:
  using Base::memory_;

  FASTODE_DEVICE bool wanted(int which) const {
    const cuda::PairNorm& norm = pair_.norm[which];
    return sums_ && norm.mode != kNoNorm && (norm.weight.data || norm.bias.data);
  }

  // norm(σ(W hat − γ other)), or with −Wᵀ in W's place.
  template <bool kTransposed>
  FASTODE_DEVICE void slope(State& hat, const char* other, int norm, const Trace& left) {
    Sum sum;
    put(hat);
    convolve<kTransposed>(sum);
    if (kTransposed) Tile::scale(sum, -1);
    if (pair_.gamma != 0) Tile::add_kept(sum, -pair_.gamma, other);
    if (left.input) {
      Tile::round(hat, sum);
      Tile::keep(hat, left.input);
    }
    const ActivationArguments act{pair_.activation, pair_.p, pair_.q};
    FASTODE_UNROLLED
    for (int tile = 0; tile < Tile::kTiles; ++tile) {
      FASTODE_UNROLLED
      for (int i = 0; i < 8; ++i) sum.value[tile][i / 4][i % 4] = activate(act, sum.value[tile][i / 4][i % 4]);
    }
    Tile::round(hat, sum);
    normalise(norm, hat, left.after);
  }

  const cuda::Pair& pair_;
  const bool sums_;
};

}  // namespace fastode::device

// The skew pair in a block, a sample at a time: an evaluation and its pull-back. Equations: README.md of
// fastode/ops/schemes/skew_pair.
#pragma once

#include "activation.cuh"
#include "norms.cuh"

namespace fastode::device {

inline constexpr int kY = 0, kZ = 1;  // the halves of a state or of a slope

enum { kPreY = 0, kPreZ, kPostY, kPostZ };

// As which map a tensor is read: as y or z, or x as y(0).
enum class As { kY, kZ, kStart };

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

  // Reads all parameters, which are there after a barrier. Forwards a norm that does not measure its statistics has
  // them in the place of the sums or, where both are needed, in `fixed`, [norm][mean, rstd][C].
  FASTODE_DEVICE SkewPair(const cuda::Pair& pair, bool forward, bool sums, float* fixed = nullptr)
      : Base(cuda::kPairNorms, 1), pair_(pair), sums_(sums), fixed_(fixed) {
    Tile::clear_border(memory_.map);
    const uint16_t* const weight = static_cast<const uint16_t*>(pair.weight);
    if (whole())
      Tile::put_weight(memory_.weight(0), weight, pair.weight_strides);
    else
      put_part(memory_.weight(0), weight, pair.weight_strides);
    FASTODE_ROLLED
    for (int i = thread(); i < 2 * C; i += Tile::kThreads) memory_.mean[i] = memory_.means[i] = 0;
    FASTODE_ROLLED
    for (int which = 0; which < cuda::kPairNorms; ++which) {
      const cuda::PairNorm& norm = pair.norm[which];
      FASTODE_ROLLED
      for (int c = thread(); c < C; c += Tile::kThreads) {
        const bool own = c < channels(which);
        const int at = c >> bits(which);
        memory_.norm_weight(which)[c] = own ? Base::number(norm.weight, at, 1) : 0;
        memory_.norm_bias(which)[c] = own ? Base::number(norm.bias, at, 0) : 0;
        memory_.sums(which)[c] = memory_.sums(which)[C + c] = 0;
        if (!forward) continue;
        fixed_statistics(which)[c] = own ? Base::number(norm.mean, at, 0) : 0;
        fixed_statistics(which)[C + c] = own ? rsqrt(Base::number(norm.variance, at, 1) + norm.eps) : 0;
      }
    }
  }

  // (1) at a point that point(state, half) makes: the slopes of the halves that are asked for. `at` says where they are
  // kept, where ŷ and ẑ meanwhile, and what is left to a pull-back.
  template <class At, class Point>
  FASTODE_DEVICE void evaluate(const At& at, bool y, bool z, const Point& point) {
    const bool damped = gamma() != 0;
    // ŷ, then ẑ and from it ẏ, then from ŷ again ż: in turns, so that the code of a norm or a slope is there once.
    FASTODE_ROLLED
    for (int turn = 0; turn < 3; ++turn) {
      const int half = turn == 1 ? kZ : kY;  // whose map is at hand
      const bool own = half == kY ? y : z, other = half == kY ? z : y;
      State hat;
      if (turn < 2) {
        if (!other && !(own && damped)) continue;
        point(hat, half);
        normalise(kPreY + half, hat, at.trace(half).before);
        if (half == kY || (own && damped)) Tile::keep(hat, at.hat(half));
        if (half == kY) continue;
      }
      if (!other) continue;
      if (turn == 2) Tile::recall(hat, at.hat(kY));
      const int asked = kZ - half;
      slope(hat, asked, at.hat(asked), at.trace(asked));
      Tile::keep(hat, at.slope(asked));
    }
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
    if (measured) this->take_statistics(norm.groups, norm.eps, state, channels(which));
    const float* const found = measured ? memory_.mean : fixed_statistics(which);
    FASTODE_ROLLED
    for (int i = thread(); rows && i < 2 * C; i += Tile::kThreads) rows[i] = i % C < channels(which) ? found[i] : 0;
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
    if (coupled) this->take_means(norm.groups, memory_.norm_weight(which), 2, 0, channels(which));
    if (wanted(which)) this->add_sums(which);
    if (reads(which)) block_barrier();
    this->pull_norm(which, x, bar, found, coupled);
  }

  // What the activation made of its input, again.
  FASTODE_DEVICE void activate_again(State& state, const char* input) const {
    Tile::recall(state, input);
    with_activation(activation(), [&](const auto& act) {
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        FASTODE_UNROLLED
        for (int i = 0; i < 4; ++i) {
          uint32_t& word = state.word[tile][i / 2][i % 2];
          word = T::pack(act.activate(T::unpack(word)));
        }
      }
    });
  }

  // bar becomes the cotangent of the activation's input.
  FASTODE_DEVICE void pull_activation(Sum& bar, const char* input) const {
    with_activation(activation(), [&](const auto& act) {
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        FASTODE_UNROLLED
        for (int eight = 0; eight < 2; ++eight) {
          uint32_t words[2];
          Tile::kept_words(words, input, tile, eight);
          FASTODE_UNROLLED
          for (int half = 0; half < 2; ++half) {
            const Pair factor = act.derive(T::unpack(words[half]));
            bar.value[tile][eight][2 * half] *= factor.low;
            bar.value[tile][eight][2 * half + 1] *= factor.high;
          }
        }
      }
    });
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

  // Channels of the map of a half, or of a norm.
  FASTODE_DEVICE int channels(int which) const { return pair_.channels[which % 2] << bits(which); }

  // Whether y and z have all channels of the programs' maps.
  FASTODE_DEVICE bool whole() const { return pair_.stride == 1 && pair_.channels[kY] == C && pair_.channels[kZ] == C; }

  // Reads a tensor to where a kept map lies.
  FASTODE_DEVICE void bring(char* to, const cuda::Map& map, int64_t sample, As as) const {
    const uint16_t* const data = static_cast<const uint16_t*>(map.data);
    const auto read = [&](int64_t at) { return at < 0 ? 0 : static_cast<uint32_t>(data[at]); };
    each_word(to, [&](uint32_t& word, int own, int tile, int i) {
      word = read(offset(map, sample, as, own, tile, i, 0)) | read(offset(map, sample, as, own, tile, i, 1)) << 16;
    });
  }

  // Writes a kept map to a tensor.
  FASTODE_DEVICE void take(char* from, const cuda::Map& map, int64_t sample, As as) const {
    uint16_t* const data = static_cast<uint16_t*>(map.data);
    each_word(from, [&](uint32_t& word, int own, int tile, int i) {
      const int64_t low = offset(map, sample, as, own, tile, i, 0), high = offset(map, sample, as, own, tile, i, 1);
      if (map.words && low >= 0 && high == low + 1) {
        *reinterpret_cast<uint32_t*>(data + low) = word;
        return;
      }
      if (low >= 0) data[low] = static_cast<uint16_t>(word);
      if (high >= 0) data[high] = static_cast<uint16_t>(word >> 16);
    });
  }

  // Adds to a kept z̄(0) what x gets of the ȳ(0) in shared memory.
  FASTODE_DEVICE void add_start(char* z_bar) const {
    each_word(z_bar, [&](uint32_t& word, int own, int tile, int i) {
      const Pair pair = T::unpack(word);
      word = T::pack(pair.low + repeats(own, tile, i, 0), pair.high + repeats(own, tile, i, 1));
    });
  }

 private:
  using Base::memory_;

  FASTODE_DEVICE float* fixed_statistics(int which) const {
    return fixed_ ? fixed_ + which * 2 * C : memory_.sums(which);
  }

  // How often y's side is half of z's: 0 or 1.
  FASTODE_DEVICE int halvings() const { return pair_.stride - 1; }
  // By how many bits more the number of a channel of a norm's map has than that of the tensor's channel.
  FASTODE_DEVICE int bits(int which) const { return which % 2 == kZ ? 2 * halvings() : 0; }

  // As Tile::put_weight.
  FASTODE_DEVICE void put_part(char* place, const uint16_t* weight, const int64_t (&strides)[4]) const {
    uint16_t* const target = reinterpret_cast<uint16_t*>(place);
    const int stride = pair_.stride;
    FASTODE_ROLLED
    for (int i = thread(); i < C * C; i += Tile::kThreads) {
      const int out = i / C, in = i % C;
      const bool own = out < channels(kY) && in < channels(kZ);
      FASTODE_UNROLLED
      for (int tap = 0; tap < 9; ++tap) {
        const int row = stride * (tap / 3 - 1) + (in >> halvings() & halvings()) + 1;
        const int column = stride * (tap % 3 - 1) + (in & halvings()) + 1;
        const bool there = own && row >= 0 && row < stride + 2 && column >= 0 && column < stride + 2;
        const int64_t from = out * strides[0] + (in >> bits(kZ)) * strides[1] + row * strides[2] + column * strides[3];
        target[((tap * (C / 8) + in / 8) * C + out) * 8 + in % 8] = there ? weight[from] : 0;
      }
    }
  }

  // Calls f(word, thread, tile, which of the tile's words) for each of a thread's words of a kept map.
  template <class F>
  static FASTODE_DEVICE void each_word(char* place, const F& f) {
    const int own = anew(thread());
    FASTODE_ROLLED
    for (int tile = 0; tile < Tile::kTiles; ++tile) {
      FASTODE_UNROLLED
      for (int i = 0; i < 4; ++i)
        f(reinterpret_cast<uint32_t*>(place)[(tile * Tile::kThreads + own) * 4 + i], own, tile, i);
    }
  }

  // Where an entry of a thread lies in a tensor; -1: nowhere.
  FASTODE_DEVICE int64_t offset(const cuda::Map& map, int64_t sample, As as, int own, int tile, int i, int odd) const {
    const int c = Tile::channel_of(own, i / 2) + odd, halvings = as == As::kY ? 0 : this->halvings();
    if (c >= channels(as == As::kZ ? kZ : kY)) return -1;
    const int from = as == As::kStart ? c % pair_.channels[kZ] << 2 * halvings : c;
    const int row = (Tile::row_of(own, tile, i % 2) << halvings) + (from >> halvings & halvings);
    const int column = (Tile::column_of(own, tile, i % 2) << halvings) + (from & halvings);
    return sample * map.sample + (from >> 2 * halvings) * map.channel + row * map.row + column * map.column;
  }

  // The sum of the channels of the map in shared memory that a channel of x was repeated to.
  FASTODE_DEVICE float repeats(int own, int tile, int i, int odd) const {
    const int c = Tile::channel_of(own, i / 2) + odd;
    float sum = 0;
    if (c >= channels(kZ) || (c & halvings()) != 0 || (c >> halvings() & halvings()) != 0) return sum;
    const int pixel = (Tile::row_of(own, tile, i % 2) + 1) * (Tile::kSide + 2) + Tile::column_of(own, tile, i % 2) + 1;
    const uint16_t* const map = reinterpret_cast<const uint16_t*>(memory_.map);
    FASTODE_ROLLED
    for (int from = c >> bits(kZ); from < channels(kY); from += pair_.channels[kZ])
      sum += T::unpack(map[(from / 8 * Tile::kPixels + pixel) * 8 + from % 8]).low;
    return sum;
  }

  FASTODE_DEVICE ActivationArguments activation() const { return {pair_.activation, pair_.p, pair_.q}; }

  FASTODE_DEVICE bool wanted(int which) const {
    const cuda::PairNorm& norm = pair_.norm[which];
    return sums_ && norm.mode != kNoNorm && (norm.weight.data || norm.bias.data);
  }

  // The slope of y, norm(σ(W hat − γ other)), or that of z, with −Wᵀ in W's place.
  FASTODE_DEVICE void slope(State& hat, int half, const char* other, const Trace& left) {
    Sum sum;
    put(hat);
    if (half == kY) {
      convolve<false>(sum);
    } else {
      convolve<true>(sum);
      Tile::scale(sum, -1);
    }
    if (pair_.gamma != 0) Tile::add_kept(sum, -pair_.gamma, other);
    if (left.input) {
      Tile::round(hat, sum);
      Tile::keep(hat, left.input);
    }
    with_activation(activation(), [&](const auto& act) {
      FASTODE_UNROLLED
      for (int tile = 0; tile < Tile::kTiles; ++tile) {
        FASTODE_UNROLLED
        for (int i = 0; i < 4; ++i) {
          const float* const pair = &sum.value[tile][i / 2][i % 2 * 2];
          hat.word[tile][i / 2][i % 2] = T::pack(act.activate({pair[0], pair[1]}));
        }
      }
    });
    normalise(kPostY + half, hat, left.after);
  }

  const cuda::Pair& pair_;
  const bool sums_;
  float* const fixed_;
};

}  // namespace fastode::device

// The way back through the choice of a solve's first step: what is summed up, and how the blocks go on with the sums.
// Equations: README.md of fastode/ops/schemes/skew_pair, (8) and (9).
#pragma once

#include "solving.cuh"

namespace fastode::device {

// What a solve pulls back through until its blocks meet: its steps; the trial step; what the trial's size is made of
// and the slopes at time 0, which are all that is left where no size counts.
enum SolvePhase { kSteps, kTrial, kStart };
// Of what (8) and (9) have sums: products of slopes with their cotangents, and the move of y(t₁) in the last step.
enum SolveSum { kProduct, kPlace };

// How a solve stands on its way back; one thread writes it.
struct alignas(16) BackStand {
  double sums[cuda::kSolveSums];
  resident::FirstStepBar bar;
  float weights[kMostStages], rates[kMostStages];  // of y(t₁), times the last step's size; of its place in the step
  float trial, change, slope, state;               // the trial's size; factors of the pull-backs of three norms
  int phase, change_half, slope_half, state_half;
  int steps, every;     // of how many steps there is one whose beginning was kept
  int through, failed;  // whether the first size counts; whether a solve of the block did not reach t₁
};

// Of the pull-back of a root mean square: its cotangent over the value and over how many numbers it is of.
FASTODE_DEVICE float factor_of(double bar, const resident::Halves& values, double of_y, double of_z, int& half) {
  const resident::Larger larger(values);
  half = static_cast<int>(larger.half);
  return bar == 0 ? 0 : static_cast<float>(bar / (larger.value * (half == kY ? of_y : of_z)));
}

// From the sums of a phase to what the next one needs, with the numbers that a norm of y is over and one of z. By a
// call: little is done here, of which nothing should wait in a register meanwhile.
FASTODE_DEVICE_CALL void decide_by(BackStand& stand, const cuda::SolveTaken& taken, int64_t order, float size,
                                   double of_y, double of_z) {
  const resident::FirstStep& first = taken.first;
  if (stand.phase == kSteps) {
    const double place = stand.sums[kPlace] * (stand.steps == 1 ? taken.at : 1);
    stand.bar = resident::FirstStepBar(first, order, stand.sums[kProduct] / size - place);
    stand.change = factor_of(stand.bar.change, first.change, of_y, of_z, stand.change_half);
    stand.phase = kTrial;
    if (stand.change != 0) return;
  } else {
    stand.bar.trial += stand.sums[kProduct];
  }
  stand.bar.settle_trial(first);
  stand.slope = factor_of(stand.bar.slope, first.slope, of_y, of_z, stand.slope_half);
  stand.state = factor_of(stand.bar.state, first.state, of_y, of_z, stand.state_half);
  stand.phase = kStart;
}

// What a thread does for it.
template <class Tile>
struct ChoiceBack {
  using T = typename Tile::Type;
  using Sum = typename Tile::Sum;

  // The sum of products of a map with a kept one, as far as this thread has them.
  static FASTODE_DEVICE float dot(const Sum& map, const char* place) {
    float total = 0;
    FASTODE_UNROLLED
    for (int tile = 0; tile < Tile::kTiles; ++tile) {
      FASTODE_UNROLLED
      for (int eight = 0; eight < 2; ++eight) {
        uint32_t words[2];
        Tile::kept_words(words, place, tile, eight);
        FASTODE_UNROLLED
        for (int i = 0; i < 2; ++i) {
          const auto both = T::unpack(words[i]);
          total += map.value[tile][eight][2 * i] * both.low + map.value[tile][eight][2 * i + 1] * both.high;
        }
      }
    }
    return total;
  }

  // Adds the pull-back of the squares of a map in units of the tolerance to the cotangents of the map and of the state.
  // The map is a kept one or, with `minus`, a difference. It is done once for a solve: rolled, because unrolled code of
  // it takes long to compile.
  static FASTODE_DEVICE void pull_squares(const cuda::SolveCall& call, int channels, const char* start, float factor,
                                          const char* map, const char* minus, char* bar, char* state_bar) {
    const float rtol = static_cast<float>(call.rtol), atol = static_cast<float>(call.atol);
    FASTODE_ROLLED
    for (int tile = 0; tile < Tile::kTiles; ++tile) {
      FASTODE_ROLLED
      for (int eight = 0; eight < 2; ++eight) {
        uint32_t words[2], mapped[2], less[2] = {0, 0};
        Tile::kept_words(words, start, tile, eight);
        Tile::kept_words(mapped, map, tile, eight);
        if (minus) Tile::kept_words(less, minus, tile, eight);
        float pulled[4], of_state[4];
        FASTODE_UNROLLED
        for (int i = 0; i < 4; ++i) {
          const float u = part<T>(words[i / 2], i % 2), sign = u > 0 ? 1.0f : u < 0 ? -1.0f : 0.0f;
          const float value = part<T>(mapped[i / 2], i % 2) - part<T>(less[i / 2], i % 2);
          const float unit = 1 / (atol + rtol * (u < 0 ? -u : u)), scaled = value * unit;
          const bool own = Tile::channel(eight) + i % 2 < channels;
          pulled[i] = own ? factor * scaled * unit : 0;
          of_state[i] = own ? -rtol * sign * scaled * pulled[i] : 0;
        }
        add_words(bar, tile, eight, pulled);
        add_words(state_bar, tile, eight, of_state);
      }
    }
  }

  static FASTODE_DEVICE void add_words(char* place, int tile, int eight, const float (&values)[4]) {
    uint32_t words[2];
    Tile::kept_words(words, place, tile, eight);
    FASTODE_UNROLLED
    for (int i = 0; i < 2; ++i) {
      const auto both = T::unpack(words[i]);
      words[i] = T::pack(both.low + values[2 * i], both.high + values[2 * i + 1]);
    }
    reinterpret_cast<Half*>(place)[(tile * Tile::kThreads + thread()) * 2 + eight] = {{words[0], words[1]}};
  }
};

}  // namespace fastode::device

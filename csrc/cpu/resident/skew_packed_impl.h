// The pair's parameters, packed, and their gradients, unpacked. Included by one .cpp per arithmetic type.
#pragma once

#include "skew_engine.h"

namespace fastode::resident {

template <class A>
PackedPair<A>::PackedPair(const PairArguments& arguments, const Tensor& y, Asked asked) : arguments_(arguments) {
  Arena count(nullptr);
  read(count, y, asked);
  Arena arena(memory_.take(count.used()));
  read(arena, y, asked);
  arena.check();
}

// Takes every row and weight from the arena; fills them where it has memory.
template <class A>
void PackedPair<A>::read(Arena& arena, const Tensor& y, Asked asked) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t height = y.size(2), width = y.size(3);
  const Tensor& weight = arguments_.parameters[0];
  const int64_t* integers = arguments_.integers.data();
  const double* numbers = arguments_.numbers.data();
  spec = {};
  spec.shape = {weight.size(0), weight.size(1), weight.size(2), integers[0], height, width};
  spec.act = {integers[1], {static_cast<A>(numbers[1]), static_cast<A>(numbers[2])}};
  spec.tells = spec.act.kind == kIdentity || spec.act.kind == kRelu || (spec.act.kind == kLeakyRelu && numbers[1] > 0);
  spec.gamma = static_cast<A>(numbers[0]);
  const int64_t length = lanes * blocks_of<A>(std::max(weight.size(0), weight.size(1)));
  const auto constant = [&](A value, int64_t count) {
    A* row = arena.take<A>(length);
    if (row) std::fill(row, row + count, value), std::fill(row + count, row + length, A(0));
    return row;
  };
  spec.zeros = constant(0, 0), spec.ones = constant(1, length);
  size_t next = 1;
  const auto row_of = [&](int64_t count) {
    const Tensor& tensor = arguments_.parameters[next++];
    A* row = constant(0, 0);
    const int64_t stride = tensor.strides()[0];
    if (row)
      with_data<A>(tensor, [&](auto* data) {
        for (int64_t c = 0; c < count; ++c) row[c] = to_accumulator<A>(data[c * stride]);
      });
    return row;
  };
  const auto accumulate = [&](int64_t count, bool wanted) {
    if (!wanted) return int64_t{-1};
    spec.gradients += divide_up(count, 16) * 16;
    return spec.gradients - divide_up(count, 16) * 16;
  };
  for (int which = 0; which < kPairNorms; ++which) {
    PairNorm<A>& norm = spec.norms[which];
    const int64_t* code = integers + 2 + 3 * which;
    const int64_t present = code[2];
    norm.mode = code[0], norm.groups = code[1], norm.eps = numbers[3 + which];
    norm.channels = which == kPreY || which == kPostY ? spec.shape.channels : spec.shape.in_channels;
    norm.weight = present & kWeight ? row_of(norm.channels) : constant(1, norm.channels);
    norm.bias = present & kBias ? row_of(norm.channels) : spec.zeros;
    norm.weight_at = accumulate(norm.channels, asked.norms && (present & kWeight));
    norm.bias_at = accumulate(norm.channels, asked.norms && (present & kBias));
    norm.mean = present & kRunning ? row_of(norm.channels) : spec.zeros;
    A* rstd = present & kRunning ? row_of(norm.channels) : constant(1, norm.channels);
    for (int64_t c = 0; rstd && (present & kRunning) && c < norm.channels; ++c)
      rstd[c] = static_cast<A>(1 / std::sqrt(static_cast<double>(rstd[c]) + norm.eps));
    norm.rstd = rstd;
    A* unit = constant(0, 0);
    for (int64_t c = 0; unit && c < norm.channels; ++c) unit[c] = 1 / norm.weight[c];
    norm.unit = unit;
    norm.statistics_at = spec.statistics;
    if (norm.measured()) spec.statistics += 2 * norm.blocks() * lanes;
  }
  // As PyTorch's convolutions multiply such states; smaller maps would leave most of a tile empty.
  if constexpr (kOnTiles<A>)
    if (y.scalar_type() == ScalarType::BFloat16 && height * width >= kTilePixels && has_tiles())
      spec.tiles = SkewTiles(spec.shape);
  spec.shape.winograd = y.scalar_type() == scalar_type<A>() && spec.shape.stride == 1 &&
                        suits_winograd_alone(spec.shape.template y_plane<A>(), spec.shape.down(), y.size(0));
  int64_t down_size = spec.shape.template down_size<A>(), up_size = spec.shape.template up_size<A>();
  if constexpr (kOnTiles<A>)
    if (spec.tiles) down_size = spec.tiles.down_size(), up_size = spec.tiles.up_size();
  A *down = arena.take<A>(down_size), *up = arena.take<A>(up_size);
  if (down) {
    int64_t strides[4];
    for (int d = 0; d < 4; ++d) strides[d] = weight.strides()[d];
    with_data<A>(weight, [&](auto* data) {
      if constexpr (kOnTiles<A>)
        if (spec.tiles) return spec.tiles.pack(data, strides, down, up);
      pack_skew(spec.shape, data, strides, down, up);
    });
  }
  spec.down = down, spec.up = up;
  spec.weight_at =
      accumulate(gradient_size<A>(spec.shape.down(), spec.shape.template winograd_gradient<A>()), asked.weight);
}

template <class A>
std::vector<Tensor> PackedPair<A>::gradients(const Tensor& accumulators, int64_t workers) const {
  const A* base = static_cast<const A*>(accumulators.data_ptr());
  const std::vector<Tensor>& parameters = arguments_.parameters;
  std::vector<Tensor> result;
  const auto next = [&](int64_t length) -> const Tensor& {
    const Tensor& parameter = parameters[result.size()];
    return result.emplace_back(new_vector(length, parameter.scalar_type()));
  };
  if (spec.weight_at >= 0) {
    result.push_back(new_weight(parameters[0]));
    with_data<A>(result[0], [&](auto* data) {
      unpack_either(spec.shape.down(), spec.shape.template winograd_gradient<A>(), base + spec.weight_at,
                    spec.gradients, workers, data, result[0].strides().data());
    });
  } else {
    next(0);
  }
  const auto row = [&](int64_t at, int64_t channels) {
    if (at < 0) return void(next(0));
    with_data<A>(next(channels), [&](auto* sums) {
      using T = std::remove_pointer_t<decltype(sums)>;
      for (int64_t c = 0; c < channels; ++c) {
        A sum = base[at + c];
        for (int64_t w = 1; w < workers; ++w) sum += base[w * spec.gradients + at + c];
        sums[c] = to_storage<T>(sum);
      }
    });
  };
  for (int which = 0; which < kPairNorms; ++which) {
    const PairNorm<A>& norm = spec.norms[which];
    const int64_t present = arguments_.integers[4 + 3 * which];
    if (present & kWeight) row(norm.weight_at, norm.channels);
    if (present & kBias) row(norm.bias_at, norm.channels);
    for (int k = 0; k < 2 && (present & kRunning); ++k) row(-1, 0);
  }
  return result;
}

}  // namespace fastode::resident

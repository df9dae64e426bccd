// Included by one .cpp per arithmetic type.
#pragma once

#include <cmath>

#include "engine.h"

namespace fastode::resident {

template <class A>
Packed<A>::Packed(const BranchArguments& arguments, int64_t samples, int64_t channels, const Plane<A>& plane,
                  bool narrow, const Wanted& wanted)
    : arguments_(arguments), samples_(samples), channels_(channels), plane_(plane), narrow_(kOnTiles<A> && narrow) {
  Arena count(nullptr);
  read(count, wanted);
  Arena arena(memory_.take(count.used()));
  read(arena, wanted);
  arena.check();
}

// Takes every row and weight from the arena; fills them where it has memory.
template <class A>
void Packed<A>::read(Arena& arena, const Wanted& wanted) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t units = static_cast<int64_t>(arguments_.units.size()) / kUnitIntegers;
  spec = {};
  spec.narrow = narrow_;
  statistics = 0;
  int64_t channels = channels_;
  Plane<A> plane = plane_;
  spec.blocks = blocks_of<A>(channels);
  for (int64_t j = 0; j < units; ++j)
    spec.blocks = std::max(spec.blocks, blocks_of<A>(arguments_.units[j * kUnitIntegers + 3]));
  const int64_t width = spec.blocks * lanes;
  const auto constant = [&](A value, int64_t length) {
    A* row = arena.take<A>(width);
    if (row) std::fill(row, row + length, value), std::fill(row + length, row + width, A(0));
    return row;
  };
  spec.zeros = constant(0, 0), spec.ones = constant(1, width);
  size_t next = 0;
  const auto row_of = [&](int64_t length) {
    const Tensor& tensor = arguments_.parameters[next++];
    A* row = constant(0, 0);
    const int64_t stride = tensor.strides()[0];
    if (row)
      with_data<A>(tensor, [&](auto* data) {
        for (int64_t c = 0; c < length; ++c) row[c] = to_accumulator<A>(data[c * stride]);
      });
    return row;
  };
  const auto accumulate = [&](int64_t length) {
    const int64_t at = spec.gradients;
    if (!wanted.gradients) return int64_t{-1};
    spec.gradients += divide_up(length, 16) * 16;
    return at;
  };

  for (int64_t j = 0; j < units; ++j) {
    const int64_t* integers = arguments_.units.data() + j * kUnitIntegers;
    const double* numbers = arguments_.numbers.data() + j * kUnitNumbers;
    const int64_t present = integers[6];
    const int64_t given = arguments_.strides ? (*arguments_.strides)[j] : 1, stride = std::abs(given);
    UnitSpec<A> unit;
    unit.norm = integers[0], unit.groups = integers[1], unit.eps = numbers[0];
    unit.act = {integers[2], {static_cast<A>(numbers[1]), static_cast<A>(numbers[2])}};
    unit.in_channels = channels;
    unit.weight = present & kWeight ? row_of(channels) : constant(1, channels);
    unit.weight_at = present & kWeight ? accumulate(width) : -1;
    unit.bias = present & kBias ? row_of(channels) : constant(0, 0);
    unit.bias_at = present & kBias ? accumulate(width) : -1;
    if (unit.norm == kBatchNorm) statistics += 2 * channels, spec.couples_samples = true;
    if (present & kRunning) {
      unit.mean = row_of(channels);
      A* variance = row_of(channels);
      for (int64_t c = 0; variance && c < channels; ++c)
        variance[c] = static_cast<A>(1 / std::sqrt(static_cast<double>(variance[c]) + unit.eps));
      unit.rstd = variance;
    } else {
      unit.mean = constant(0, 0);
      unit.rstd = constant(1, channels);
    }
    if (present & kConvWeight) {
      const Tensor& weight = arguments_.parameters[next++];
      unit.has_conv = true;
      unit.shape = {channels, integers[3], integers[4], integers[5], stride};
      spec.halo = std::max({spec.halo, integers[4] / 2, integers[5] / 2});
      if constexpr (kOnTiles<A>)
        if (narrow_) {
          const bool gradient = suits_narrow_winograd_gradient(unit.plane_after(plane), unit.shape, samples_);
          // Of stride 2 both read the same map, or the pixels of each parity apart.
          unit.winograd = suits_narrow_winograd(plane, unit.shape, samples_) && (stride == 1 || gradient);
          unit.winograd_gradient = unit.winograd && gradient;
        }
      if (!narrow_) {
        unit.winograd = suits_winograd(plane, unit.shape, samples_);
        unit.winograd_gradient = unit.winograd && suits_winograd_gradient<A>(unit.shape);
      }
      const auto size = [&](const ConvShape& shape, bool back) {
        const bool strided = shape.stride > 1;
        if constexpr (kOnTiles<A>) {
          const ConvShape seen = back ? shape.transposed() : shape;
          if constexpr (kNarrowWinograd)
            if (narrow_ && unit.winograd) return narrow_winograd_size(seen);
          if (narrow_ && strided) return strided_tile_weights_size(shape, back);
          if (narrow_) return tile_weights_size(seen);
        }
        if (back && strided) return strided_back_size<A>(shape);
        return weights_size<A>(back ? shape.transposed() : shape, unit.winograd);
      };
      const bool straight = wanted.straight && (wanted.last || j + 1 < units);
      A* forward = straight ? arena.take<A>(size(unit.shape, false)) : nullptr;
      A* flipped = wanted.transposed ? arena.take<A>(size(unit.shape, true)) : nullptr;
      if (forward || flipped) {
        int64_t strides[4];
        for (int d = 0; d < 4; ++d) strides[d] = weight.strides()[d];
        with_data<A>(weight, [&](auto* data) {
          using T = std::remove_pointer_t<decltype(data)>;
          if constexpr (kOnTiles<A>)
            unit.kernels = {data, std::is_same_v<T, bfloat16>, strides[0], strides[1], strides[2], strides[3]};
          const auto pack = [&](bool back, A* to) {
            const ConvShape shape = back ? unit.shape.transposed() : unit.shape;
            if constexpr (kOnTiles<A>) {
              if constexpr (kNarrowWinograd)
                if (narrow_ && unit.winograd)
                  return pack_narrow_winograd<T>(shape, unit.filtering(back), back, data, strides, to);
              if (narrow_ && stride > 1) return pack_strided_tile_weights<T>(unit.shape, back, data, strides, to);
              if (narrow_) return pack_tile_weights<T>(shape, back, data, strides, to);
            }
            if (back && stride > 1) return pack_strided_back<A, T>(unit.shape, data, strides, to);
            pack_either<A, T>(shape, unit.winograd, back, data, strides, to);
          };
          if (forward) pack(false, forward);
          if (flipped) pack(true, flipped);
        });
      }
      unit.forward = forward, unit.backward = flipped;
      unit.conv_at = accumulate(gradient_size<A>(unit.shape, unit.winograd_gradient));
      channels = integers[3];
      if (present & kConvBias) unit.conv_bias = row_of(channels), unit.conv_bias_at = accumulate(width);
    }
    if (given < 0) {
      unit.mean_of = true;
      unit.shape = {channels, integers[3], integers[4], integers[5], stride};
      channels = integers[3];
    }
    unit.out_channels = channels;
    plane = unit.plane_after(plane);
    spec.units.push_back(unit);
  }
}

template <class A>
std::vector<Tensor> Packed<A>::gradients(const A* base, int64_t parts) const {
  const int64_t stride = spec.gradients;
  std::vector<Tensor> result;
  const auto next = [&]() -> Tensor& {
    const Tensor& parameter = arguments_.parameters[result.size()];
    result.push_back(new_contiguous(parameter.scalar_type(), parameter.sizes()));
    return result.back();
  };
  const auto row = [&](int64_t at) {
    Tensor& gradient = next();
    with_data<A>(gradient, [&](auto* data) {
      using T = std::remove_pointer_t<decltype(data)>;
      for (int64_t c = 0; c < gradient.size(0); ++c) {
        A sum = base[at + c];
        for (int64_t part = 1; part < parts; ++part) sum += base[part * stride + at + c];
        data[c] = to_storage<T>(sum);
      }
    });
  };
  for (size_t j = 0; j < spec.units.size(); ++j) {
    const UnitSpec<A>& unit = spec.units[j];
    const int64_t present = arguments_.units[j * kUnitIntegers + 6];
    if (present & kWeight) row(unit.weight_at);
    if (present & kBias) row(unit.bias_at);
    for (int k = 0; k < 2 && present & kRunning; ++k) result.push_back(new_vector(0, scalar_type<A>()));
    if (unit.has_conv) {
      const Tensor& gradient = result.emplace_back(new_weight(arguments_.parameters[result.size()]));
      with_data<A>(gradient, [&](auto* data) {
        const A* from = base + unit.conv_at;
        unpack_either(unit.shape, unit.winograd_gradient, from, stride, parts, data, gradient.strides().data());
      });
    }
    if (present & kConvBias) row(unit.conv_bias_at);
  }
  return result;
}

// The user's tensor as a program's map, if it has the program's type and its channels lie as vectors.
template <class S, class T>
Map<S> map_of(const Feature<T>& feature) {
  constexpr int64_t lanes = kLanes<Number<S>>;
  if constexpr (std::is_same_v<std::remove_const_t<T>, S>) {
    if (feature.channel == 1 && feature.channels % lanes == 0)
      return {
          {const_cast<S*>(feature.data), feature.row, feature.pixel, lanes}, feature.sample, feature.channels / lanes};
  }
  return {};
}

template <class S, class T, class A>
void run_recorded(const Call<A>& call, const Recording<S>& recording) {
  const BranchSpec<A>& spec = call.packed.spec;
  const int64_t samples = call.x.size(0), workers = workers_for(samples);
  const bool forward = call.cotangent == nullptr;
  const Plane<A> plane(call.x.size(2), call.x.size(3), spec.halo);
  Schedule schedule(samples, workers, group_for(samples, workers, plane.pixels(), sizeof(S), spec.channels()),
                    call.parts);
  Memory<S> memory(plane, schedule, spec.couples_samples, call.kept);
  Branch<S> branch(spec, schedule, memory, spec.gradients ? call.gradients : nullptr, recording.need, plane);

  Wishes<S> wishes;
  wishes.parameters = spec.gradients > 0;
  if (forward && call.packed.statistics) {
    wishes.statistics = call.statistics;
    wishes.statistics_stride = call.packed.statistics;
  }
  wishes.products_stride = call.products_stride;
  if (call.products_stride) wishes.products = call.products;

  const auto read = [&](const Tensor& tensor) {
    const Feature<const T> feature = feature_of<const T>(tensor);
    Map<S> map = map_of<S>(feature);
    if (!map) {
      map = memory.take(blocks_of<A>(feature.channels));
      schedule.each([=, &plane](const Range& range) {
        for (int64_t i = 0; i < range.count; ++i) load_sample(plane, feature, range.first + i, map.at(range, i));
      });
    }
    map.pinned = true;
    return map;
  };
  Ends<S> ends;
  ends.input = read(call.x);
  if (!forward) ends.cotangent = read(*call.cotangent);
  const Feature<T> result = feature_of<T>(call.result);
  ends.result = map_of<S>(result);
  const bool apart = !ends.result;
  if (apart) ends.result = memory.take(ends.input.blocks);
  memory.give(ends.result);
  recording.record(branch, ends, wishes);
  if (apart)
    schedule.each([=, &plane](const Range& range) {
      for (int64_t i = 0; i < range.count; ++i) store_sample(plane, ends.result.at(range, i), result, range.first + i);
    });
  schedule.flush();
  branch.close_sums();
  memory.check();
  if (call.kept) call.kept->check();
}

}  // namespace fastode::resident

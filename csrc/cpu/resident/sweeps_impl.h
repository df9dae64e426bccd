// The sweeps of branch.h. Included by one .cpp per arithmetic type.
#pragma once

#include "branch_impl.h"

namespace fastode::resident {

template <class A>
void Branch<A>::convolve_input(const Evaluation<A>& e, size_t j, const Range& range, const Map<A>& out,
                               const Mix<A>& mix) const {
  const UnitSpec<A>& unit = spec_.units[j];
  const int64_t blocks = blocks_of<A>(unit.in_channels);
  const auto input = [&](int64_t i) { return e.inputs[j].at(range, i); };
  if (!unit.has_conv) {
    for (int64_t i = 0; i < range.count; ++i)
      apply(plane_, blocks, rows_of(e, j, range, i), unit.act, input(i), out.at(range, i), mix.at(range, i));
    return;
  }
  if constexpr (std::is_same_v<A, float>) {
    if (spec_.narrow) {
      TileJob jobs[kGroup];
      for (int64_t i = 0; i < range.count; ++i) {
        bfloat16* narrow = narrow_ + (range.worker * schedule_.group + i) * narrow_stride_;
        apply(plane_, unit.in_channels, rows_of(e, j, range, i), unit.act, input(i), narrow);
        jobs[i] = {narrow, out.at(range, i), mix.at(range, i)};
      }
      return convolve(plane_, unit.shape, unit.forward, unit.conv_bias, jobs, range.count);
    }
  }
  ConvJob<A> jobs[kGroup];
  for (int64_t i = 0; i < range.count; ++i) {
    const bool direct = e.inputs[j].halo && goes_straight(j);
    jobs[i] = {direct ? input(i) : active_.at(range, i), out.at(range, i), mix.at(range, i)};
    if (!direct) apply(plane_, blocks, rows_of(e, j, range, i), unit.act, input(i), jobs[i].in, Combine<A>{});
  }
  convolve<A>(plane_, unit.shape, unit.forward, unit.conv_bias, jobs, range.count, range.ahead);
}

template <class A>
void Branch<A>::convolve_tangent(const Evaluation<A>& e, size_t j, const Range& range, const Map<A>& t,
                                 const Map<A>& out, const Mix<A>& mix) const {
  const UnitSpec<A>& unit = spec_.units[j];
  const int64_t blocks = blocks_of<A>(unit.in_channels);
  const auto input = [&](int64_t i) { return e.inputs[j].at(range, i); };
  if (!unit.has_conv) {
    for (int64_t i = 0; i < range.count; ++i)
      tangent_apply(plane_, blocks, rows_of(e, j, range, i), unit.act, input(i), t.at(range, i), out.at(range, i),
                    mix.at(range, i));
    return;
  }
  if constexpr (std::is_same_v<A, float>) {
    if (spec_.narrow) {
      TileJob jobs[kGroup];
      for (int64_t i = 0; i < range.count; ++i) {
        bfloat16* narrow = narrow_ + (range.worker * schedule_.group + i) * narrow_stride_;
        tangent_apply(plane_, unit.in_channels, rows_of(e, j, range, i), unit.act, input(i), t.at(range, i), narrow);
        jobs[i] = {narrow, out.at(range, i), mix.at(range, i)};
      }
      return convolve(plane_, unit.shape, unit.forward, nullptr, jobs, range.count);
    }
  }
  ConvJob<A> jobs[kGroup];
  for (int64_t i = 0; i < range.count; ++i) {
    jobs[i] = {active_.at(range, i), out.at(range, i), mix.at(range, i)};
    tangent_apply(plane_, blocks, rows_of(e, j, range, i), unit.act, input(i), t.at(range, i), jobs[i].in,
                  Combine<A>{});
  }
  convolve<A>(plane_, unit.shape, unit.forward, nullptr, jobs, range.count, range.ahead);
}

template <class A>
void Branch<A>::convolve_back(const UnitSpec<A>& unit, const Range& range, const Map<A>& g, const Map<A>& n) const {
  if constexpr (std::is_same_v<A, float>) {
    if (spec_.narrow) {
      TileJob jobs[kGroup];
      for (int64_t i = 0; i < range.count; ++i) {
        bfloat16* narrow = narrow_ + (range.worker * schedule_.group + i) * narrow_stride_;
        narrow_map(plane_, unit.out_channels, g.at(range, i), narrow);
        jobs[i] = {narrow, n.at(range, i)};
      }
      return convolve(plane_, unit.shape.transposed(), unit.backward, nullptr, jobs, range.count);
    }
  }
  ConvJob<A> jobs[kGroup];
  for (int64_t i = 0; i < range.count; ++i) jobs[i] = {g.at(range, i), n.at(range, i)};
  convolve<A>(plane_, unit.shape.transposed(), unit.backward, nullptr, jobs, range.count, range.ahead);
}

template <class A>
void Branch<A>::add_gradients(const Evaluation<A>& e, size_t j, const Range& range, const Map<A>* t) const {
  const UnitSpec<A>& unit = spec_.units[j];
  if (!unit.has_conv) return;
  const int64_t blocks = blocks_of<A>(unit.in_channels);
  A* gradients = gradients_of(range);
  GradientPair<A> pairs[2 * kGroup];
  int64_t count = 0;
  for (int64_t i = 0; i < range.count; ++i) {
    const NormRows<A> rows = rows_of(e, j, range, i);
    const View<A> input = e.inputs[j].at(range, i);
    pairs[count++] = {active_.at(range, i), g_.at(range, i)};
    apply(plane_, blocks, rows, unit.act, input, active_.at(range, i), Combine<A>{});
    if (unit.conv_bias_at >= 0)  // the tangent stream has no bias
      add_channel_sums(plane_, blocks_of<A>(unit.out_channels), g_.at(range, i), gradients + unit.conv_bias_at);
    if (!t) continue;
    pairs[count++] = {tangent_active_.at(range, i), tangent_g_.at(range, i)};
    tangent_apply(plane_, blocks, rows, unit.act, input, t->at(range, i), tangent_active_.at(range, i), Combine<A>{});
  }
  if constexpr (std::is_same_v<A, float>) {
    if (spec_.narrow)
      return weight_gradient(plane_, unit.shape, pairs, count, gradients + unit.conv_at,
                             tile_scratch_ + range.worker * tile_scratch_stride_);
  }
  weight_gradient<A>(plane_, unit.shape, pairs, count, gradients + unit.conv_at);
}

template <class A>
void Branch<A>::add_norm_gradients(const UnitSpec<A>& unit, const Range& range, const A* sums) const {
  const int64_t lanes = spec_.lanes_of(unit);
  const auto add_row = [&](const A* from, int64_t at) {
    A* to = gradients_of(range) + at;
    for (int64_t c = 0; c < lanes; ++c) to[c] += from[c];
  };
  if (unit.bias_at >= 0) add_row(sums, unit.bias_at);
  if (unit.weight_at >= 0) add_row(sums + lanes, unit.weight_at);
}

template <class A>
Map<A> Branch<A>::input_map(size_t j, bool hold) {
  const int64_t blocks = blocks_of<A>(spec_.units[j].in_channels);
  if (hold || !goes_straight(j)) return memory_.take(blocks);
  Map<A>& map = bare_[j % 2];  // the other one is read meanwhile
  if (!map) map = memory_.padded(spec_.blocks), map.pinned = true;
  Map<A> part = map;
  part.blocks = blocks;
  return part;
}

template <class A>
bool Branch<A>::finds_image() const {
  const UnitSpec<A>& last = spec_.units.back();
  return last.has_conv && (last.act.kind == kIdentity || last.act.kind == kRelu || last.act.kind == kLeakyRelu);
}

template <class A>
void Branch<A>::add_bias_product(const UnitSpec<A>& unit, const Range& range, int64_t i, const Along<A>& along) const {
  if (!unit.conv_bias) return;
  const int64_t blocks = blocks_of<A>(unit.out_channels);
  A* sums = sums_.at(range, i);
  std::fill_n(sums, blocks * kLanes<A>, A(0));
  add_channel_sums(plane_, blocks, g_.at(range, i), sums);
  double total = 0;
  for (int64_t c = 0; c < unit.out_channels; ++c) total += static_cast<double>(sums[c]) * unit.conv_bias[c];
  along.sum[range.worker * along.stride] += along.scale * total;
}

template <class A>
void Branch<A>::add_product(const UnitSpec<A>& unit, const Range& range, const A* sums, const Along<A>& along) const {
  const A* normalised = sums + spec_.lanes_of(unit);
  double total = 0;
  for (int64_t c = 0; c < unit.in_channels; ++c)
    total += static_cast<double>(sums[c]) * unit.bias[c] + static_cast<double>(normalised[c]) * unit.weight[c];
  along.sum[range.worker * along.stride] += along.scale * total;
}

template <class A>
void Branch<A>::value(Evaluation<A>& e, const Map<A>& in, const Map<A>* out, const Mix<A>& mix, bool hold) {
  const size_t units = spec_.units.size();
  std::vector<Map<A>> made;
  const Mix<A> last_mix = few(mix, made);
  e.inputs[0] = in;
  // The last input may lie where the result goes: it is read before, and that memory is then in the cache.
  const auto is_out = [&](const auto& map) { return map.view.at == out->view.at; };
  const bool shares =
      out && units > 1 && !hold && !goes_straight(units - 1) && !e.inputs.back() && !is_out(in) &&
      out->blocks == blocks_of<A>(spec_.units.back().in_channels) &&
      std::none_of(last_mix.terms.begin(), last_mix.terms.end(), [&](const auto& term) { return is_out(term.second); });
  if (shares) e.inputs.back() = *out;
  prepare(e, 0);
  for (size_t j = 0; j + (out ? 0 : 1) < units; ++j) {
    const bool last = j + 1 == units;
    if (!last && !e.inputs[j + 1]) e.inputs[j + 1] = input_map(j + 1, hold);
    const Map<A> to = last ? *out : e.inputs[j + 1];
    const Mix<A> here = last ? last_mix : Mix<A>{};
    each(here.with({e.inputs[j], to}), [=, this](const Range& range) { convolve_input(e, j, range, to, here); });
    if (!last) prepare(e, j + 1);
    if (!hold && j > 0) {
      if (!last || !shares) memory_.give(e.inputs[j]);
      e.inputs[j] = {};
    }
  }
  e.measured = true;
  give(made);
}

template <class A>
void Branch<A>::sum_tangent(const Evaluation<A>& e, size_t j, const Range& range, const Map<A>& t) const {
  const UnitSpec<A>& unit = spec_.units[j];
  for (int64_t i = 0; i < range.count && unit.measured(); ++i) {
    tangent_sums(plane_, blocks_of<A>(unit.in_channels), rows_of(e, j, range, i), e.inputs[j].at(range, i),
                 t.at(range, i), sums_.at(range, i));
    settle(j, range, i, false, {mean_t_[j], mean_xt_[j]});
  }
}

template <class A>
void Branch<A>::tangent(const Evaluation<A>& e, const Map<A>& t, const Map<A>& out, const Mix<A>& mix) {
  const size_t units = spec_.units.size();
  tangents_ = {t};
  for (size_t j = 0; j < units; ++j) {
    const bool last = j + 1 == units;
    const Map<A> from = tangents_[j];
    if (!last) tangents_.push_back(memory_.take(blocks_of<A>(spec_.units[j + 1].in_channels)));
    each({e.inputs[j], from}, [=, this](const Range& range) { sum_tangent(e, j, range, from); });
    settle_batch(j, false, {mean_t_[j], mean_xt_[j]});
    const Map<A> to = last ? out : tangents_[j + 1];
    const Mix<A> here = last ? mix : Mix<A>{};
    each(here.with({e.inputs[j], from, to}),
         [=, this](const Range& range) { convolve_tangent(e, j, range, from, to, here); });
  }
}

template <class A>
Map<A> Branch<A>::cotangent(const Evaluation<A>& e, const Mix<A>& image, const Map<A>* out, const Mix<A>& mix,
                            bool parameters, const Along<A>& along) {
  const size_t units = spec_.units.size();
  std::vector<Map<A>> made, made_of_image;
  const Mix<A> last_mix = few(mix, made), few_image = few(image, made_of_image);
  give(made_of_image);
  const Map<A> n = map();
  schedule_.rewind();
  for (size_t j = units; j-- > 0;) {
    const UnitSpec<A>& unit = spec_.units[j];
    const int64_t blocks = blocks_of<A>(unit.in_channels), out_blocks = blocks_of<A>(unit.out_channels);
    const std::vector<Map<A>> maps =
        j + 1 == units ? few_image.with({e.inputs[j], n}) : std::vector{e.inputs[j + 1], n, e.inputs[j]};
    each(maps, [=, this, &unit](const Range& range) {
      for (int64_t i = 0; i < range.count; ++i) {
        const View<A> g = g_.at(range, i);
        if (j + 1 == units)
          combine_maps(plane_, out_blocks, g, few_image.at(range, i));
        else
          cotangent_last(plane_, out_blocks, rows_of(e, j + 1, range, i), e.inputs[j + 1].at(range, i), n.at(range, i),
                         g, Combine<A>{});
      }
      if (parameters) add_gradients(e, j, range, nullptr);
      if (unit.has_conv) convolve_back(unit, range, g_, n);
      for (int64_t i = 0; i < range.count; ++i) {
        A* sums = sums_.at(range, i);
        const bool tells = along.sum && j + 1 == units;
        if (tells) add_bias_product(unit, range, i, along);
        cotangent_first(plane_, blocks, rows_of(e, j, range, i), unit.act, e.inputs[j].at(range, i),
                        (unit.has_conv ? n : g_).at(range, i), n.at(range, i), sums);
        if (tells) add_product(unit, range, sums, along);
        if (parameters) add_norm_gradients(unit, range, sums);
        settle(j, range, i, true, {mean_n_, mean_xn_});
      }
    });
    settle_batch(j, true, {mean_n_, mean_xn_});
  }
  Map<A> result = out ? *out : n;
  result.blocks = blocks_of<A>(spec_.units[0].in_channels);
  each(last_mix.with({e.inputs[0], n, result}), [=, this](const Range& range) {
    for (int64_t i = 0; i < range.count; ++i)
      cotangent_last(plane_, blocks_of<A>(spec_.units[0].in_channels), rows_of(e, 0, range, i),
                     e.inputs[0].at(range, i), n.at(range, i), result.at(range, i), last_mix.at(range, i));
  });
  if (out) memory_.give(n);
  give(made);
  return result;
}

template <class A>
Map<A> Branch<A>::second(const Evaluation<A>& e, const Map<A>& v, const Map<A>& q, const Mix<A>& mix, bool parameters) {
  const size_t units = spec_.units.size();
  const Map<A> n = map(), m = takes_over(q) ? q : map();
  schedule_.rewind();
  for (size_t j = units; j-- > 0;) {
    const UnitSpec<A>& unit = spec_.units[j];
    const int64_t blocks = blocks_of<A>(unit.in_channels), out_blocks = blocks_of<A>(unit.out_channels);
    const int64_t lanes = blocks * kLanes<A>;
    const bool top = j + 1 == units;
    const Map<A> t = tangents_[j], above = tangents_[std::min(j + 1, units - 1)];
    const std::vector<Map<A>> maps = top ? std::vector{v, q} : std::vector{e.inputs[j + 1], above, n, m};
    each(Mix<A>{1, {{1, e.inputs[j]}, {1, t}, {1, n}, {1, m}}}.with(maps), [=, this, &unit](const Range& range) {
      for (int64_t i = 0; i < range.count; ++i) {
        const View<A> g = g_.at(range, i), tangent_g = tangent_g_.at(range, i);
        if (top) {
          combine_maps(plane_, out_blocks, g, Combine<A>{}.add(1, v.at(range, i)));
          combine_maps(plane_, out_blocks, tangent_g, Combine<A>{}.add(1, q.at(range, i)));
        } else {
          second_last(plane_, out_blocks, rows_of(e, j + 1, range, i), e.inputs[j + 1].at(range, i), above.at(range, i),
                      n.at(range, i), m.at(range, i), g, &tangent_g, Combine<A>{});
        }
      }
      if (parameters) add_gradients(e, j, range, &t);
      if (unit.has_conv) {
        convolve_back(unit, range, g_, n);
        convolve_back(unit, range, tangent_g_, m);
      }
      for (int64_t i = 0; i < range.count; ++i) {
        A* sums = sums_.at(range, i);
        if (!unit.has_conv) {
          combine_maps(plane_, blocks, n.at(range, i), Combine<A>{}.add(1, g_.at(range, i)));
          combine_maps(plane_, blocks, m.at(range, i), Combine<A>{}.add(1, tangent_g_.at(range, i)));
        }
        second_first(plane_, blocks, rows_of(e, j, range, i), unit.act, e.inputs[j].at(range, i), t.at(range, i),
                     n.at(range, i), m.at(range, i), sums);
        // <m, P(t)> joins <n, x>: both are the weight's gradient and both pull the cotangent along x.
        for (int64_t c = 0; c < lanes; ++c) sums[lanes + c] += sums[4 * lanes + c];
        if (parameters) add_norm_gradients(unit, range, sums);
        settle(j, range, i, true, {mean_n_, mean_xn_, mean_c_, mean_xc_});
      }
    });
    settle_batch(j, true, {mean_n_, mean_xn_, mean_c_, mean_xc_});
  }
  each(mix.with({e.inputs[0], tangents_[0], n, m}), [=, this, t = tangents_[0]](const Range& range) {
    for (int64_t i = 0; i < range.count; ++i)
      second_last(plane_, blocks_of<A>(spec_.units[0].in_channels), rows_of(e, 0, range, i), e.inputs[0].at(range, i),
                  t.at(range, i), n.at(range, i), m.at(range, i), n.at(range, i), static_cast<const View<A>*>(nullptr),
                  mix.at(range, i));
  });
  if (!takes_over(q)) memory_.give(m);
  for (size_t j = 1; j < units; ++j) memory_.give(tangents_[j]);
  Map<A> result = n;
  result.blocks = blocks_of<A>(spec_.units[0].in_channels);
  return result;
}

}  // namespace fastode::resident

// The sweeps of branch.h. Included by one .cpp per arithmetic type.
#pragma once

#include "branch_impl.h"

namespace fastode::resident {

template <class T>
void Branch<T>::convolve_jobs(size_t j, bool back, const ConvJob<T>* jobs, const Range& range, bool with_bias) const {
  const UnitSpec<A>& unit = spec_.units[j];
  const ConvShape shape = back ? unit.shape.transposed() : unit.shape;
  const A *packed = back ? unit.backward : unit.forward, *bias = with_bias ? unit.conv_bias : nullptr;
  if constexpr (std::is_same_v<T, bfloat16>) {
    if constexpr (kNarrowWinograd)
      if (unit.winograd)
        return convolve_winograd(planes_[j + 1], shape, unit.filtering(back), packed,
                                 back ? unit.kernels.back() : unit.kernels, bias, jobs, range.count,
                                 scratch_of<char>(range), range.ahead);
    if (!apart(j))
      convolve(planes_[j], shape, together_[j], packed, bias, jobs, range.count, range.ahead);
    else if (back)
      convolve_strided_back(planes_[j], planes_[j + 1], unit.shape, together_[j + 1], packed, jobs, range.count,
                            range.ahead);
    else
      convolve_strided(planes_[j + 1], shape, together_[j + 1], active_[j].phase, packed, bias, jobs, range.count,
                       range.ahead);
  } else if (unit.winograd) {
    if constexpr (kWinograd<A>)
      convolve_winograd<A>(planes_[j], shape, packed, bias, jobs, range.count, scratch_of<A>(range), range.ahead);
  } else if (unit.shape.stride == 1) {
    convolve<A>(planes_[j], shape, packed, bias, jobs, range.count, range.ahead);
  } else if (back) {
    convolve_strided_back<A>(planes_[j], planes_[j + 1], unit.shape, packed, jobs, range.count, range.ahead);
  } else {
    convolve_strided<A>(planes_[j], planes_[j + 1], shape, packed, bias, jobs, range.count, range.ahead);
  }
}

template <class T>
void Branch<T>::convolve_input(const Passed<T>& at, const Range& range, const Map<T>& out, const Mix<T>& mix) const {
  const UnitSpec<A>& unit = spec_.units[at.unit];
  const Plane<A>& plane = planes_[at.unit];
  const auto input = [&](int64_t i) { return at.input.at(range, i); };
  if (!unit.moves()) {
    const int64_t blocks = blocks_of<A>(unit.in_channels);
    for (int64_t i = 0; i < range.count; ++i)
      apply(plane, blocks, rows_of(at, range, i), unit.act, input(i), out.at(range, i), mix.at(range, i));
    return;
  }
  const Map<T> active = active_map(at.unit, range);
  ConvJob<T> jobs[kGroup];
  for (int64_t i = 0; i < range.count; ++i) {
    const bool direct = at.input.halo && goes_straight(at.unit);
    jobs[i] = {direct ? input(i) : active.at(range, i), out.at(range, i), mix.at(range, i)};
    if (!direct) activate(at, range, i, active);
    if constexpr (std::is_same_v<T, A>)
      if (unit.plane) jobs[i].combine.add(mix.scale * at.time, plane.compact(const_cast<A*>(unit.plane)));
    if (unit.mean_of) average(planes_[at.unit + 1], unit.shape, jobs[i]);
  }
  if (unit.has_conv) convolve_jobs(at.unit, false, jobs, range, true);
}

template <class T>
void Branch<T>::convolve_tangent(const Passed<T>& at, const Range& range, const Map<T>& t, const Map<T>& out,
                                 const Mix<T>& mix) const {
  const UnitSpec<A>& unit = spec_.units[at.unit];
  const int64_t blocks = blocks_of<A>(unit.in_channels);
  const auto input = [&](int64_t i) { return at.input.at(range, i); };
  if (!unit.has_conv) {
    for (int64_t i = 0; i < range.count; ++i)
      tangent_apply(plane_, blocks, rows_of(at, range, i), unit.act, input(i), t.at(range, i), out.at(range, i),
                    mix.at(range, i));
    return;
  }
  const Map<T> active = active_map(at.unit, range);
  ConvJob<T> jobs[kGroup];
  for (int64_t i = 0; i < range.count; ++i) {
    jobs[i] = {active.at(range, i), out.at(range, i), mix.at(range, i)};
    tangent_apply(plane_, blocks, rows_of(at, range, i), unit.act, input(i), t.at(range, i), jobs[i].in, Combine<T>{});
  }
  convolve_jobs(at.unit, false, jobs, range, false);
}

template <class T>
void Branch<T>::convolve_back(size_t j, const Range& range, const Map<T>& g, const Map<T>& n, const Mix<T>& mix) const {
  ConvJob<T> jobs[kGroup];
  for (int64_t i = 0; i < range.count; ++i) {
    jobs[i] = {g.at(range, i), n.at(range, i), mix.at(range, i)};
    if (spec_.units[j].mean_of) average_back(planes_[j], planes_[j + 1], spec_.units[j].shape, jobs[i]);
  }
  if (spec_.units[j].has_conv) convolve_jobs(j, true, jobs, range, false);
}

template <class T>
void Branch<T>::add_gradients(const Passed<T>& at, const Range& range, const Map<T>& g, const Map<T>* t,
                              const Map<T>& tangent_g) const {
  const UnitSpec<A>& unit = spec_.units[at.unit];
  if (!unit.has_conv) return;
  const int64_t blocks = blocks_of<A>(unit.in_channels), out_blocks = blocks_of<A>(unit.out_channels);
  const Plane<A>&plane = planes_[at.unit], &out_plane = planes_[at.unit + 1];
  const int64_t together = together_[at.unit + 1];
  A* gradients = gradients_of(range);
  GradientPair<T> pairs[2 * kGroup];
  int64_t count = 0;
  const auto add = [&](const Map<T>& in, const Map<T>& cotangent, const auto& fill) {
    for (int64_t i = 0; i < range.count; ++i) {
      pairs[count] = {in.at(range, i), cotangent.at(range, i)};
      fill(i, pairs[count++]);
    }
    for (int64_t i = range.count; i % together && !unit.winograd_gradient;
         ++i) {  // what lies together is summed together
      pairs[count] = {in.at(range, i), cotangent.at(range, i)};
      if (!in.phase) combine_maps(plane, blocks, pairs[count].in, Combine<T>{});  // else it is zero already
      combine_maps(out_plane, out_blocks, pairs[count++].cotangent, Combine<T>{});
    }
  };
  const Map<T> active = active_map(at.unit, range);
  add(active, g, [&](int64_t i, const GradientPair<T>& pair) {
    activate(at, range, i, active);
    if (unit.conv_bias_at >= 0)  // the tangent stream has no bias
      add_channel_sums(out_plane, out_blocks, pair.cotangent, gradients + unit.conv_bias_at);
  });
  if (t)
    add(fit(tangent_active_, 0, unit.in_channels, range), tangent_g, [&](int64_t i, const GradientPair<T>& pair) {
      tangent_apply(plane_, blocks, rows_of(at, range, i), unit.act, at.input.at(range, i), t->at(range, i), pair.in,
                    Combine<T>{});
    });
  A* const sums = gradients + unit.conv_at;
  const bool fresh = begins(at.unit, range);
  if (fresh && !unit.winograd_gradient) std::fill_n(sums, gradient_size<A>(unit.shape, false), A(0));
  if constexpr (std::is_same_v<T, bfloat16>) {
    char* scratch = scratch_of<char>(range);
    if constexpr (kNarrowWinograd)
      if (unit.winograd_gradient) return winograd_gradient(out_plane, unit.shape, pairs, count, sums, fresh, scratch);
    if (apart(at.unit))
      strided_weight_gradient(out_plane, unit.shape, together, active.phase, pairs, count, sums, scratch);
    else
      weight_gradient(plane, unit.shape, together, pairs, count, sums, scratch);
  } else if (unit.winograd_gradient) {
    if constexpr (kWinograd<A>)
      winograd_gradient<A>(plane, unit.shape, pairs, count, sums, fresh, scratch_of<A>(range));
  } else if (unit.shape.stride == 1)
    weight_gradient<A>(plane, unit.shape, pairs, count, sums);
  else
    strided_weight_gradient<A>(out_plane, unit.shape, pairs, count, sums);
}

template <class T>
void Branch<T>::add_norm_gradients(const UnitSpec<A>& unit, const Range& range, const A* sums) const {
  const int64_t lanes = spec_.lanes_of(unit);
  const auto add_row = [&](const A* from, int64_t at) {
    A* to = gradients_of(range) + at;
    for (int64_t c = 0; c < lanes; ++c) to[c] += from[c];
  };
  if (unit.bias_at >= 0) add_row(sums, unit.bias_at);
  if (unit.weight_at >= 0) add_row(sums + lanes, unit.weight_at);
}

template <class T>
Map<T> Branch<T>::input_map(size_t j, bool hold) {
  const int64_t blocks = blocks_of<A>(spec_.units[j].in_channels);
  if (hold || !goes_straight(j) || !one_plane_) return memory_.take(blocks, planes_[j]);
  Map<T>& map = bare_[j % 2];  // the other one is read meanwhile
  if (!map) map = memory_.padded(spec_.blocks, together_[0]), map.pinned = true;
  Map<T> part = map;
  part.blocks = blocks;
  return part;
}

template <class T>
bool Branch<T>::finds_image() const {
  const UnitSpec<A>& last = spec_.units.back();
  return last.has_conv && (last.act.kind == kIdentity || last.act.kind == kRelu || last.act.kind == kLeakyRelu);
}

template <class T>
void Branch<T>::add_bias_product(const UnitSpec<A>& unit, const Range& range, const View<T>& g,
                                 const Along<T>& along) const {
  if (!unit.conv_bias) return;
  const int64_t blocks = blocks_of<A>(unit.out_channels);
  std::vector<A> sums(blocks * kLanes<A>, A(0));
  add_channel_sums(plane_, blocks, g, sums.data());
  double total = 0;
  for (int64_t c = 0; c < unit.out_channels; ++c) total += static_cast<double>(sums[c]) * unit.conv_bias[c];
  along.sum[range.part * along.stride] += along.scale * total;
}

template <class T>
void Branch<T>::add_product(const UnitSpec<A>& unit, const Range& range, const A* sums, const Along<T>& along) const {
  const A* normalised = sums + spec_.lanes_of(unit);
  double total = 0;
  for (int64_t c = 0; c < unit.in_channels; ++c)
    total += static_cast<double>(sums[c]) * unit.bias[c] + static_cast<double>(normalised[c]) * unit.weight[c];
  along.sum[range.part * along.stride] += along.scale * total;
}

template <class T>
void Branch<T>::value(Evaluation<T>& e, const Map<T>& in, const Map<T>* out, const Mix<T>& mix, bool hold) {
  const size_t units = spec_.units.size();
  std::vector<Map<T>> made;
  const Mix<T> last_mix = few(mix, made);
  e.inputs[0] = in;
  // The last input may lie where the result goes: it is read before, and that memory is then in the cache.
  const auto is_out = [&](const auto& map) { return map.view.at == out->view.at; };
  const bool shares =
      out && units > 1 && !hold && !goes_straight(units - 1) && !e.inputs.back() && !is_out(in) &&
      out->blocks == blocks_of<A>(spec_.units.back().in_channels) && one_plane_ &&
      std::none_of(last_mix.terms.begin(), last_mix.terms.end(), [&](const auto& term) { return is_out(term.second); });
  if (shares) e.inputs.back() = *out;
  prepare(e, 0);
  for (size_t j = 0; j + (out ? 0 : 1) < units; ++j) {
    const bool last = j + 1 == units;
    if (!last && !e.inputs[j + 1]) e.inputs[j + 1] = input_map(j + 1, hold);
    const Map<T> to = last ? *out : e.inputs[j + 1];
    const Mix<T> here = last ? last_mix : Mix<T>{};
    each(here.with({e.inputs[j], to}),
         [=, this, at = e.at(j)](const Range& range) { convolve_input(at, range, to, here); });
    if (!last) prepare(e, j + 1);
    if (!hold && j > 0) {
      if (!last || !shares) memory_.give(e.inputs[j]);
      e.inputs[j] = {};
    }
  }
  e.measured = true;
  give(made);
}

template <class T>
void Branch<T>::sum_tangent(const Passed<T>& at, const Range& range, const Map<T>& t) const {
  const UnitSpec<A>& unit = spec_.units[at.unit];
  for (int64_t i = 0; i < range.count && unit.measured(); ++i) {
    tangent_sums(plane_, blocks_of<A>(unit.in_channels), rows_of(at, range, i), at.input.at(range, i), t.at(range, i),
                 sums_.at(range, i));
    settle(at.unit, range, i, false, {mean_t_[at.unit], mean_xt_[at.unit]});
  }
}

template <class T>
void Branch<T>::tangent(const Evaluation<T>& e, const Map<T>& t, const Map<T>& out, const Mix<T>& mix) {
  const size_t units = spec_.units.size();
  tangents_ = {t};
  for (size_t j = 0; j < units; ++j) {
    const bool last = j + 1 == units;
    const Map<T> from = tangents_[j];
    if (!last) tangents_.push_back(memory_.take(blocks_of<A>(spec_.units[j + 1].in_channels)));
    each({e.inputs[j], from}, [=, this, at = e.at(j)](const Range& range) { sum_tangent(at, range, from); });
    settle_batch(j, false, {mean_t_[j], mean_xt_[j]});
    const Map<T> to = last ? out : tangents_[j + 1];
    const Mix<T> here = last ? mix : Mix<T>{};
    each(here.with({e.inputs[j], from, to}),
         [=, this, at = e.at(j)](const Range& range) { convolve_tangent(at, range, from, to, here); });
  }
}

// moments [kernel_h, kernel_w, width] += for each tap of a convolution that keeps the size the sum over the pixels from
// which the tap meets the image.
template <class A>
void add_moments(const Plane<A>& plane, int64_t blocks, int64_t kernel_h, int64_t kernel_w, const View<A>& map,
                 int64_t width, A* moments) {
  using V = Vec<A>;
  const int64_t half_h = kernel_h / 2, half_w = kernel_w / 2;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t y = 0; y < plane.height; ++y) {
      V row = {};
      for (int64_t x = 0; x < plane.width; ++x) row += load<V>(map.pixel_at(b, y, x));
      for (int64_t kx = 0; kx < kernel_w; ++kx) {
        const int64_t left = kx - half_w, reach = std::min(plane.width, left < 0 ? -left : left);
        V met = row;  // without the pixels that the tap leaves the image from
        for (int64_t k = 0; k < reach; ++k) met -= load<V>(map.pixel_at(b, y, left < 0 ? k : plane.width - 1 - k));
        for (int64_t ky = 0; ky < kernel_h; ++ky) {
          const int64_t at = y + ky - half_h;
          if (at < 0 || at >= plane.height) continue;
          A* to = moments + (ky * kernel_w + kx) * width + b * kLanes<A>;
          store<V>(to, load<V>(to) + met);
        }
      }
    }
}

template <class T>
Map<T> Branch<T>::cotangent(const Evaluation<T>& e, const Mix<T>& image, const Map<T>* out, const Mix<T>& mix,
                            bool parameters, const Along<T>& along, bool point) {
  const size_t units = spec_.units.size();
  std::vector<Map<T>> made, made_of_image;
  const Mix<T> last_mix = few(mix, made), few_image = few(image, made_of_image);
  give(made_of_image);
  // Behind a convolution the image needs a halo, which its own map has not.
  const bool as_it_is = !spec_.units.back().moves() && few_image.terms.size() == 1 && few_image.terms[0].first == 1;
  // Behind a norm alone the image is what the norm's derivative is applied to: it is not written once more.
  const bool bare = as_it_is && units > 1 && spec_.units.back().act.kind == kIdentity;
  const bool straight = point && begins_straight(last_mix) && !(along.sum && units == 1);
  Map<T> whole;
  const std::vector<Map<T>> places = cotangent_places(e, out && straight, bare, whole);
  Map<T> result = out ? *out : places[0];
  result.blocks = blocks_of<A>(spec_.units[0].in_channels);
  schedule_.rewind();
  for (size_t j = units; j-- > 0;) {
    const UnitSpec<A>& unit = spec_.units[j];
    const int64_t blocks = blocks_of<A>(unit.in_channels), out_blocks = blocks_of<A>(unit.out_channels);
    const Map<T> n = places[j], back = e.backs[j] ? e.backs[j] : n;
    const Map<T> above = bare && j + 2 == units ? few_image.terms[0].second : places[std::min(j + 1, units - 1)];
    const bool ends = j == 0 && !point && unit.weight_at < 0 && unit.bias_at < 0;
    const bool direct = straight && j == 0;
    std::vector<Map<T>> maps = j + 1 == units ? few_image.with({}) : std::vector{e.inputs[j + 1], above};
    if (!direct || parameters) maps.push_back(e.inputs[j]);
    if (direct || j + 1 == units) maps.push_back(direct ? result : n);
    if (back.view.at != n.view.at) maps.push_back(back);
    if (direct) maps = last_mix.with(maps);
    each(maps, [=, this, &unit, at = e.at(j), next = e.at(std::min(j + 1, units - 1))](const Range& range) {
      const bool given = j + 1 == units && as_it_is;
      const Map<T> g = given ? few_image.terms[0].second : fit(g_[j + 1], j + 1, unit.out_channels, range);
      for (int64_t i = 0; i < range.count && !given; ++i) {
        if (j + 1 == units)
          combine_maps(planes_[j + 1], out_blocks, g.at(range, i), few_image.at(range, i));
        else
          cotangent_last(planes_[j + 1], out_blocks, rows_of(next, range, i), next.input.at(range, i),
                         above.at(range, i), g.at(range, i), Combine<T>{});
      }
      if (parameters) add_gradients(at, range, g, nullptr, {});
      if constexpr (std::is_same_v<T, A>)
        for (int64_t i = 0; i < range.count && at.moments && unit.moments_at >= 0; ++i)
          add_moments(planes_[j], out_blocks, unit.shape.kernel_h, unit.shape.kernel_w, g.at(range, i), width(),
                      at.moments + range.part * at.moments_stride + unit.moments_at);
      if (ends) return;
      if (direct) return convolve_back(j, range, g, result, last_mix);
      if (unit.moves()) convolve_back(j, range, g, back);
      for (int64_t i = 0; i < range.count; ++i) {
        A* sums = sums_.at(range, i);
        const bool tells = along.sum && j + 1 == units;
        if (tells) add_bias_product(unit, range, g.at(range, i), along);
        if (bare && j + 1 == units)
          tangent_sums(planes_[j], blocks, rows_of(at, range, i), at.input.at(range, i), g.at(range, i), sums);
        else
          cotangent_first(planes_[j], blocks, rows_of(at, range, i), unit.act, at.input.at(range, i),
                          (unit.moves() ? back : g).at(range, i), n.at(range, i), sums);
        if (tells) add_product(unit, range, sums, along);
        if (parameters) add_norm_gradients(unit, range, sums);
        settle(j, range, i, true, {mean_n_, mean_xn_});
      }
    });
    if (!ends) settle_batch(j, true, {mean_n_, mean_xn_});
  }
  if (point && !straight)
    each(last_mix.with({e.inputs[0], places[0], result}), [=, this, at = e.at(0), n = places[0]](const Range& range) {
      for (int64_t i = 0; i < range.count; ++i)
        cotangent_last(plane_, blocks_of<A>(spec_.units[0].in_channels), rows_of(at, range, i), at.input.at(range, i),
                       n.at(range, i), result.at(range, i), last_mix.at(range, i));
    });
  if (out || !point) memory_.give(whole);
  give(made);
  return result;
}

template <class T>
Map<T> Branch<T>::second(const Evaluation<T>& e, const Map<T>& v, const Map<T>& q, const Mix<T>& mix, bool parameters) {
  const size_t units = spec_.units.size();
  const Map<T> n = map();
  // What the tangent's stream brings through each convolution: found where it was kept, or made in one map.
  std::vector<Map<T>> ms = e.backs;
  Map<T> made;
  for (Map<T>& m : ms) {
    if (m) continue;
    if (!made) made = takes_over(q) ? q : map();
    m = made;
  }
  schedule_.rewind();
  for (size_t j = units; j-- > 0;) {
    const UnitSpec<A>& unit = spec_.units[j];
    const int64_t blocks = blocks_of<A>(unit.in_channels), out_blocks = blocks_of<A>(unit.out_channels);
    const int64_t lanes = blocks * kLanes<A>;
    const bool top = j + 1 == units;
    const Map<T> t = tangents_[j], above = tangents_[std::min(j + 1, units - 1)];
    const Map<T> m = ms[j], m_above = ms[std::min(j + 1, units - 1)];
    const bool found(e.backs[j]), both = parameters || !found;
    const std::vector<Map<T>> maps = top ? std::vector{v, q} : std::vector{e.inputs[j + 1], above, n, m_above};
    each(Mix<T>{1, {{1, e.inputs[j]}, {1, t}, {1, n}, {1, m}}}.with(maps),
         [=, this, &unit, at = e.at(j), next = e.at(std::min(j + 1, units - 1))](const Range& range) {
           const Map<T> g = fit(g_[j + 1], j + 1, unit.out_channels, range),
                        tangent_g = fit(tangent_g_, 0, unit.out_channels, range);
           for (int64_t i = 0; i < range.count; ++i) {
             const View<T> to = g.at(range, i), tangent_to = tangent_g.at(range, i);
             if (top) {
               combine_maps(plane_, out_blocks, to, Combine<T>{}.add(1, v.at(range, i)));
               if (both) combine_maps(plane_, out_blocks, tangent_to, Combine<T>{}.add(1, q.at(range, i)));
             } else {
               second_last(plane_, out_blocks, rows_of(next, range, i), next.input.at(range, i), above.at(range, i),
                           n.at(range, i), m_above.at(range, i), to, both ? &tangent_to : nullptr, Combine<T>{});
             }
           }
           if (parameters) add_gradients(at, range, g, &t, tangent_g);
           if (unit.has_conv) {
             convolve_back(j, range, g, n);
             if (!found) convolve_back(j, range, tangent_g, m);
           }
           for (int64_t i = 0; i < range.count; ++i) {
             A* sums = sums_.at(range, i);
             if (!unit.has_conv) {
               combine_maps(plane_, blocks, n.at(range, i), Combine<T>{}.add(1, g.at(range, i)));
               combine_maps(plane_, blocks, m.at(range, i), Combine<T>{}.add(1, tangent_g.at(range, i)));
             }
             second_first(plane_, blocks, rows_of(at, range, i), unit.act, at.input.at(range, i), t.at(range, i),
                          n.at(range, i), m.at(range, i), sums);
             // <m, P(t)> joins <n, x>: both are the weight's gradient and both pull the cotangent along x.
             for (int64_t c = 0; c < lanes; ++c) sums[lanes + c] += sums[4 * lanes + c];
             if (parameters) add_norm_gradients(unit, range, sums);
             settle(j, range, i, true, {mean_n_, mean_xn_, mean_c_, mean_xc_});
           }
         });
    settle_batch(j, true, {mean_n_, mean_xn_, mean_c_, mean_xc_});
  }
  each(mix.with({e.inputs[0], tangents_[0], n, ms[0]}),
       [=, this, at = e.at(0), t = tangents_[0], m = ms[0]](const Range& range) {
         for (int64_t i = 0; i < range.count; ++i)
           second_last(plane_, blocks_of<A>(spec_.units[0].in_channels), rows_of(at, range, i), at.input.at(range, i),
                       t.at(range, i), n.at(range, i), m.at(range, i), n.at(range, i),
                       static_cast<const View<T>*>(nullptr), mix.at(range, i));
       });
  if (!takes_over(q)) memory_.give(made);
  for (size_t j = 1; j < units; ++j) memory_.give(tangents_[j]);
  Map<T> result = n;
  result.blocks = blocks_of<A>(spec_.units[0].in_channels);
  return result;
}

}  // namespace fastode::resident

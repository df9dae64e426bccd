// Included by one .cpp per arithmetic type.
#pragma once

#include <cmath>

#include "branch.h"

namespace fastode::resident {

template <class A>
std::vector<Plane<A>> planes_from(const BranchSpec<A>& spec, const Plane<A>& input) {
  std::vector<Plane<A>> planes{{input.height, input.width, spec.halo}};
  for (const UnitSpec<A>& unit : spec.units) planes.push_back(unit.plane_after(planes.back()));
  return planes;
}

template <class T>
Branch<T>::Branch(const BranchSpec<A>& spec, Schedule& schedule, Memory<T>& memory, A* gradients, Need need,
                  const Plane<A>& input)
    : spec_(spec),
      schedule_(schedule),
      memory_(memory),
      planes_(planes_from(spec, input)),
      plane_(planes_[0]),
      blocks_(spec.blocks),
      gradients_(gradients) {
  const size_t units = spec.units.size();
  const int64_t kinds = need == Need::kSecond ? kSums : 2;
  sums_ = memory.rows(kinds * width());
  totals_ = memory.template per_worker<double>(kinds * width());
  const bool weights = gradients != nullptr && need != Need::kValue;
  for (const UnitSpec<A>& unit : spec.units)
    for (const int64_t channels : {unit.in_channels, unit.out_channels})
      uniform_ = uniform_ && channels == spec.units[0].in_channels;
  take_scratch(need);
  if (gradients) clear_rows();
  const int64_t pixels = plane_.pixels();
  for (const Plane<A>& plane : planes_) one_plane_ = one_plane_ && plane.pixels() == pixels;
  if (!one_plane_) {
    blocks_ = 1;
    for (size_t j = 0; j < units; ++j)
      blocks_ = std::max(blocks_, divide_up(blocks_of<A>(spec.units[j].in_channels) * planes_[j].pixels(), pixels));
  }
  const auto padded = [&] { return memory.padded(spec.blocks, together_[0], plane_); };
  // One for each plane.
  const auto fill = [&](std::vector<Map<T>>& maps) {
    for (size_t j = 0; j <= units; ++j) {
      const bool same = j > 0 && planes_[j].height == planes_[j - 1].height && planes_[j].width == planes_[j - 1].width;
      maps.push_back(same ? maps.back() : memory.padded(spec.blocks, together_[j], planes_[j]));
    }
  };
  fill(active_);
  for (size_t j = 0; j < units; ++j)
    if (apart(j))
      active_[j] = memory.padded(blocks_of<A>(spec.units[j].in_channels), together_[j + 1], planes_[j + 1], true);
  if (need != Need::kValue) {
    fill(g_);
    mean_n_ = means(), mean_xn_ = means();
  }
  if (need == Need::kSecond) {
    if (weights) tangent_active_ = padded();
    tangent_g_ = padded();
    mean_c_ = means(), mean_xc_ = means();
    for (size_t j = 0; j < units; ++j) mean_t_.push_back(means()), mean_xt_.push_back(means());
  }
}

// Of all sums but those of convolutions' weights, which begin as they are first added to.
template <class T>
void Branch<T>::clear_rows() {
  begun_.assign(schedule_.parts * spec_.units.size(), false);
  for (int64_t part = 0; part < schedule_.parts; ++part)
    for (const UnitSpec<A>& unit : spec_.units)
      for (const int64_t at : {unit.weight_at, unit.bias_at, unit.conv_bias_at})
        if (at >= 0) std::fill_n(gradients_ + part * spec_.gradients + at, width(), A(0));
}

template <class T>
void Branch<T>::close_sums() {
  const size_t units = spec_.units.size();
  for (size_t k = 0; k < begun_.size(); ++k) {
    const UnitSpec<A>& unit = spec_.units[k % units];
    if (!unit.has_conv || begun_[k]) continue;
    const int64_t part = k / units, size = gradient_size<A>(unit.shape, unit.winograd_gradient);
    fill_zeros(gradients_ + part * spec_.gradients + unit.conv_at, size);
  }
}

template <class T>
Means<Number<T>> Branch<T>::means() {
  Means<A> means;
  for (const UnitSpec<A>& unit : spec_.units) {
    if (unit.norm == kGroupNorm && !means.each.base) means.each = memory_.rows(width());
    if (unit.norm == kBatchNorm && !means.all.base) means.all = memory_.one_row(width());
  }
  return means;
}

// What convolutions need: on tiles the number of samples that lie together, and scratch for the weight gradients; else
// scratch for those by Winograd's filtering.
template <class T>
void Branch<T>::take_scratch(Need need) {
  const bool weights = spec_.gradients > 0 && need != Need::kValue;
  const auto wants = [&](int64_t bytes) { scratch_stride_ = std::max(scratch_stride_, bytes); };
  if constexpr (std::is_same_v<T, bfloat16>) {
    for (size_t j = 0; j < planes_.size(); ++j) {
      int64_t fewest = spec_.blocks * kLanes<A>;  // of the maps that convolutions read on this plane
      const auto meet = [&](size_t k, int64_t channels) {
        const bool here = planes_[k].height == planes_[j].height && planes_[k].width == planes_[j].width;
        if (here) fewest = std::min(fewest, channels);
      };
      for (size_t k = 0; k < spec_.units.size(); ++k) {
        meet(apart(k) ? k + 1 : k, spec_.units[k].in_channels);
        meet(k + 1, spec_.units[k].out_channels);
      }
      together_.push_back(Narrow::samples_together(planes_[j], fewest, schedule_.group));
    }
    for (size_t j = 0; j < spec_.units.size(); ++j) {
      const ConvShape& shape = spec_.units[j].shape;
      if constexpr (kNarrowWinograd)
        if (spec_.units[j].winograd) {
          const UnitSpec<A>& unit = spec_.units[j];
          wants(narrow_winograd_scratch_size(shape, unit.filtering(false)));
          if (need != Need::kValue) wants(narrow_winograd_scratch_size(shape.transposed(), unit.filtering(true)));
        }
      if (!weights || !spec_.units[j].has_conv) continue;
      if constexpr (kNarrowWinograd)
        if (spec_.units[j].winograd_gradient) {
          wants(narrow_winograd_gradient_scratch_size(shape));
          continue;
        }
      const int64_t together = together_[j + 1];
      const int64_t pairs = (need == Need::kSecond ? 2 : 1) * divide_up(schedule_.group, together) * together;
      const auto size = apart(j) ? strided_tile_scratch_size : tile_scratch_size;
      wants(size(planes_[j + 1], shape, together, pairs));
    }
  } else {
    together_.assign(planes_.size(), 1);
    if constexpr (kWinograd<T>)
      for (const UnitSpec<A>& unit : spec_.units) {
        if (!unit.winograd) continue;
        int64_t most = winograd_scratch_size<A>(unit.shape);
        if (need != Need::kValue) most = std::max(most, winograd_scratch_size<A>(unit.shape.transposed()));
        if (weights && unit.winograd_gradient) most = std::max(most, winograd_gradient_scratch_size<A>(unit.shape));
        wants(most * static_cast<int64_t>(sizeof(A)));
      }
  }
  scratch_stride_ = divide_up(scratch_stride_, 64) * 64;
  if (scratch_stride_) scratch_ = memory_.template per_worker<char>(scratch_stride_);
}

template <class T>
Map<T> Branch<T>::fit(const Map<T>& padded, size_t j, int64_t channels, const Range& range) const {
  Map<T> map = padded;
  map.blocks = blocks_of<A>(channels);
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (uniform_ && !map.phase) return map;
    const int64_t together = padded.together;
    const Narrow widest(planes_[j], padded.blocks * Narrow::lanes, together), narrow(planes_[j], channels, together);
    map.view = narrow.view(padded.view.at - widest.origin);
    map.turn = narrow.depth;
    // A parity may have a row or a column less than the plane, and a pixel more channels than vectors fill.
    const bool everywhere = map.phase || narrow.depth != map.blocks * Narrow::lanes;
    for (int64_t i = 0; i < range.count; i += together)
      for (int64_t parity = 0; parity < (map.phase ? 4 : 1); ++parity)
        narrow.clear(planes_[j], map.at(range, i).at - narrow.origin + parity * map.phase, everywhere);
  }
  return map;
}

template <class T>
void Branch<T>::activate(const Passed<T>& at, const Range& range, int64_t i, const Map<T>& active) const {
  const UnitSpec<A>& unit = spec_.units[at.unit];
  const Plane<A>& plane = planes_[at.unit];
  const View<T> input = at.input.at(range, i), to = active.at(range, i);
  const auto fill = [&](const Plane<A>& on, const View<T>& from, const View<T>& into) {
    apply(on, active.blocks, rows_of(at, range, i), unit.act, from, into, Combine<T>{});
  };
  if (!active.phase) return fill(plane, input, to);
  each_parity(unit.shape, [&](int64_t py, int64_t px, const ParityTaps&, const ParityTaps&) {
    const Plane<A> part((plane.height - py + 1) / 2, (plane.width - px + 1) / 2, 0);
    View<T> into = to;
    into.at += (2 * py + px) * active.phase;
    if (part.pixels() > 0) fill(part, parity(input, py, px), into);
  });
}

template <class T>
Evaluation<T> Branch<T>::evaluation(bool keep) {
  Evaluation<T> e;
  keep = keep && memory_.kept;
  e.measured = keep && memory_.kept->found;
  e.inputs.resize(spec_.units.size());
  e.backs.resize(spec_.units.size());
  for (const UnitSpec<A>& unit : spec_.units) {
    e.groups.push_back({});
    if (unit.norm == kGroupNorm && keep) e.groups.back() = memory_.keep_rows(2 * unit.groups);
    for (auto* to : {&e.mean, &e.rstd}) {
      if (!unit.measured())
        to->push_back({const_cast<A*>(to == &e.mean ? unit.mean : unit.rstd)});
      else if (unit.norm == kBatchNorm)
        to->push_back(keep ? memory_.keep_one_row(width()) : memory_.one_row(width()));
      else
        to->push_back(memory_.rows(width()));
    }
  }
  for (size_t j = 0; j < spec_.units.size(); ++j)
    if (e.measured && e.groups[j].base) find_groups(e, j);
  return e;
}

template <class T>
void Branch<T>::keep_inputs(Evaluation<T>& e) {
  for (size_t j = 1; j < spec_.units.size(); ++j)
    e.inputs[j] = memory_.keep(blocks_of<A>(spec_.units[j].in_channels), planes_[j]);
}

template <class T>
void Branch<T>::keep_backs(Evaluation<T>& e) {
  for (size_t j = 0; j < spec_.units.size(); ++j)
    if (keeps_back(j)) e.backs[j] = memory_.keep(blocks_of<A>(spec_.units[j].in_channels), planes_[j]);
}

template <class T>
int64_t Branch<T>::room(bool inputs, bool backs) const {
  int64_t bytes = 0;
  for (const UnitSpec<A>& unit : spec_.units) {
    if (unit.norm == kGroupNorm) bytes += memory_.room_of_rows(2 * unit.groups);
    if (unit.norm == kBatchNorm) bytes += 2 * Kept::room<A>(width());
  }
  for (size_t j = 0; j < spec_.units.size(); ++j)
    bytes += ((inputs && j > 0) + (backs && keeps_back(j))) *
             memory_.room(blocks_of<A>(spec_.units[j].in_channels), planes_[j]);
  return bytes;
}

template <class T>
void Branch<T>::release(Evaluation<T>& e) {
  for (size_t j = 1; j < spec_.units.size(); ++j) {
    memory_.give(e.inputs[j]);
    e.inputs[j] = {};
  }
  give(std::exchange(e.backs, std::vector<Map<T>>(spec_.units.size())));
}

template <class T>
Mix<T> Branch<T>::few(Mix<T> mix, std::vector<Map<T>>& made) {
  constexpr size_t most = Combine<T>::capacity;
  while (mix.terms.size() > most) {
    made.push_back(map());
    const Mix<T> part{0, {mix.terms.end() - most, mix.terms.end()}};
    each(part.with({made.back()}), [=, this, to = made.back()](const Range& range) {
      for (int64_t i = 0; i < range.count; ++i) combine_maps(plane_, to.blocks, to.at(range, i), part.at(range, i));
    });
    mix.terms.resize(mix.terms.size() - most);
    mix.terms.insert(mix.terms.begin(), {1, made.back()});
  }
  return mix;
}

template <class T>
void Branch<T>::give(const std::vector<Map<T>>& maps) {
  for (const Map<T>& map : maps) memory_.give(map);
}

template <class T>
void Branch<T>::combine(const Map<T>& out, const Mix<T>& mix) {
  std::vector<Map<T>> made;
  const Mix<T> sum = few(mix, made);
  each(sum.with({out}), [=, this](const Range& range) {
    for (int64_t i = 0; i < range.count; ++i) combine_maps(plane_, out.blocks, out.at(range, i), sum.at(range, i));
  });
  give(made);
}

template <class T>
NormRows<Number<T>> Branch<T>::rows_of(const Passed<T>& at, const Range& range, int64_t i) const {
  const UnitSpec<A>& unit = spec_.units[at.unit];
  NormRows<A> rows;
  rows.mean = at.mean.at(range, i), rows.rstd = at.rstd.at(range, i);
  rows.weight = unit.weight, rows.bias = unit.bias;
  rows.n = rows.xn = rows.t = rows.xt = rows.c = rows.xc = spec_.zeros;
  rows.measured = unit.measured();
  if (!rows.measured) return rows;
  const auto row = [&](const Means<A>& means, const A*& to) {
    if (means.of(unit).base) to = means.of(unit).at(range, i);
  };
  row(mean_n_, rows.n), row(mean_xn_, rows.xn);
  if (mean_t_.empty()) return rows;
  row(mean_c_, rows.c), row(mean_xc_, rows.xc);
  row(mean_t_[at.unit], rows.t), row(mean_xt_[at.unit], rows.xt);
  return rows;
}

template <class T>
std::vector<Map<T>> Branch<T>::cotangent_places(const Evaluation<T>& e, bool ends_straight, bool bare, Map<T>& whole) {
  const size_t units = spec_.units.size();
  std::vector<Map<T>> places(units);
  for (size_t j = ends_straight; j + bare < units; ++j) {
    const int64_t blocks = blocks_of<A>(spec_.units[j].in_channels);
    const bool over = e.spent && memory_.coupled && j > 0 && j + 1 < units && !e.inputs[j + 1].pinned &&
                      e.inputs[j + 1].stride >= blocks * planes_[j].pixels() * kLanes<A>;
    if (!over && !whole) whole = map();
    places[j] = over ? e.inputs[j + 1] : whole;
    if (over || !one_plane_) places[j].view = planes_[j].compact(places[j].view.at);
    places[j].blocks = over ? blocks : whole.blocks;
  }
  return places;
}

template <class T>
void Branch<T>::prepare(const Evaluation<T>& e, size_t j) {
  if (!spec_.units[j].measured() || e.measured) return;
  each({e.inputs[j]}, [this, at = e.at(j)](const Range& range) { measure(at, range); });
  measure_batch(e, j);
}

template <class T>
void Branch<T>::find_groups(const Evaluation<T>& e, size_t j) {
  each({}, [this, at = e.at(j), &unit = spec_.units[j]](const Range& range) {
    const int64_t lanes = spec_.lanes_of(unit), size = unit.in_channels / unit.groups;
    for (int64_t i = 0; i < range.count; ++i) {
      const A* found = at.groups.at(range, i);
      for (const Rows<A>& rows : {at.mean, at.rstd}) {
        A* to = rows.at(range, i);
        for (int64_t g = 0; g < unit.groups; ++g) std::fill_n(to + g * size, size, *found++);
        std::fill(to + unit.in_channels, to + lanes, A(0));
      }
    }
  });
}

template <class T>
void Branch<T>::measure(const Passed<T>& at, const Range& range) const {
  const UnitSpec<A>& unit = spec_.units[at.unit];
  const int64_t lanes = spec_.lanes_of(unit);
  for (int64_t i = 0; i < range.count; ++i) {
    A* sums = sums_.at(range, i);
    moments(planes_[at.unit], lanes / kLanes<A>, at.input.at(range, i), sums, sums + lanes);
    if (unit.norm == kGroupNorm) measure_groups(at, range, i);
  }
}

template <class T>
void Branch<T>::measure_groups(const Passed<T>& at, const Range& range, int64_t i) const {
  const UnitSpec<A>& unit = spec_.units[at.unit];
  const int64_t lanes = spec_.lanes_of(unit), size = unit.in_channels / unit.groups;
  const A *channel_means = sums_.at(range, i), *channel_squares = channel_means + lanes;
  A *mean = at.mean.at(range, i), *rstd = at.rstd.at(range, i);
  A* found = at.groups.base ? at.groups.at(range, i) : nullptr;
  std::fill(mean, mean + lanes, A(0));
  std::fill(rstd, rstd + lanes, A(0));
  const double pixels = static_cast<double>(planes_[at.unit].pixels());
  for (int64_t g = 0; g < unit.groups; ++g) {
    const int64_t first = g * size;
    double sum = 0, squares = 0;
    for (int64_t c = first; c < first + size; ++c) sum += channel_means[c];
    const double average = sum / static_cast<double>(size);
    for (int64_t c = first; c < first + size; ++c) {
      const double delta = channel_means[c] - average;
      squares += channel_squares[c] + pixels * delta * delta;
    }
    const double variance = squares / (pixels * static_cast<double>(size));
    std::fill_n(mean + first, size, static_cast<A>(average));
    std::fill_n(rstd + first, size, static_cast<A>(1 / std::sqrt(variance + unit.eps)));
    if (found) found[g] = mean[first], found[unit.groups + g] = rstd[first];
  }
}

template <class T>
void Branch<T>::measure_batch(const Evaluation<T>& e, size_t j) {
  const UnitSpec<A>& unit = spec_.units[j];
  if (unit.norm != kBatchNorm) return;
  schedule_.flush();
  const int64_t channels = unit.in_channels, lanes = spec_.lanes_of(unit), samples = schedule_.samples;
  const double pixels = static_cast<double>(planes_[j].pixels()), count = static_cast<double>(samples);
  double *average = totals_, *squares = totals_ + lanes;
  std::fill(totals_, totals_ + 2 * lanes, 0.0);
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t c = 0; c < channels; ++c) average[c] += sums_.base[n * sums_.stride + c];
  for (int64_t c = 0; c < channels; ++c) average[c] /= count;
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = sums_.base[n * sums_.stride + c] - average[c];
      squares[c] += sums_.base[n * sums_.stride + lanes + c] + pixels * delta * delta;
    }
  std::fill(e.mean[j].base, e.mean[j].base + lanes, A(0));
  std::fill(e.rstd[j].base, e.rstd[j].base + lanes, A(0));
  A* statistics = e.statistics;
  for (size_t k = 0; k < j && statistics; ++k)
    if (spec_.units[k].norm == kBatchNorm) statistics += 2 * spec_.units[k].in_channels;
  for (int64_t c = 0; c < channels; ++c) {
    const double variance = squares[c] / (count * pixels);
    e.mean[j].base[c] = static_cast<A>(average[c]);
    e.rstd[j].base[c] = static_cast<A>(1 / std::sqrt(variance + unit.eps));
    if (statistics) statistics[c] = static_cast<A>(average[c]), statistics[channels + c] = static_cast<A>(variance);
  }
}

template <class T>
void Branch<T>::settle(size_t j, const Range& range, int64_t i, bool weighted,
                       std::initializer_list<Means<A>> means) const {
  const UnitSpec<A>& unit = spec_.units[j];
  if (unit.norm != kGroupNorm) return;
  const int64_t lanes = spec_.lanes_of(unit), group = unit.in_channels / unit.groups;
  const double members = static_cast<double>(planes_[j].pixels() * group);
  const A* sums = sums_.at(range, i);
  for (const Means<A>& mean : means) {
    A* to = mean.each.at(range, i);
    std::fill(to, to + lanes, A(0));
    for (int64_t first = 0; first < unit.in_channels; first += group) {
      double total = 0;
      for (int64_t c = first; c < first + group; ++c)
        total += static_cast<double>(sums[c]) * (weighted ? static_cast<double>(unit.weight[c]) : 1.0);
      std::fill(to + first, to + first + group, static_cast<A>(total / members));
    }
    sums += lanes;
  }
}

template <class T>
void Branch<T>::settle_batch(size_t j, bool weighted, std::initializer_list<Means<A>> means) {
  const UnitSpec<A>& unit = spec_.units[j];
  if (unit.norm != kBatchNorm) return;
  schedule_.flush();
  const int64_t lanes = spec_.lanes_of(unit), samples = schedule_.samples, count = static_cast<int64_t>(means.size());
  const double members = static_cast<double>(planes_[j].pixels() * samples);
  std::fill(totals_, totals_ + count * lanes, 0.0);
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t c = 0; c < count * lanes; ++c) totals_[c] += sums_.base[n * sums_.stride + c];
  const double* total = totals_;
  for (const Means<A>& mean : means) {
    for (int64_t c = 0; c < lanes; ++c)
      mean.all.base[c] = static_cast<A>(total[c] / members * (weighted ? static_cast<double>(unit.weight[c]) : 1.0));
    total += lanes;
  }
}

}  // namespace fastode::resident

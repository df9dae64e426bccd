// Included by one .cpp per arithmetic type.
#pragma once

#include "chain.h"
#include "engine_impl.h"

namespace fastode::resident {

// The three parts of a chain on one schedule: what is recorded, forwards and backwards.
// Its maps are stored as T.
template <class T>
class ChainProgram {
 public:
  using A = Number<T>;

  ChainProgram(const ChainArguments& chain, const ChainCall& call, const std::vector<Packed<A>*>& packed,
               Schedule& schedule, Memory<T>& memory, A* gradients)
      : chain_(chain), call_(call), memory_(memory) {
    const bool forward = call.cotangent == nullptr;
    const Need need = forward ? Need::kValue : Need::kCotangent;
    Plane<A> plane = memory.plane;
    for (size_t k = 0; k < packed.size(); ++k) {
      if (packed[k] && !packed[k]->spec.units.empty()) {
        const BranchSpec<A>& spec = packed[k]->spec;
        branches_[k].emplace(spec, schedule, memory, spec.gradients ? gradients : nullptr, need, plane);
        gradients += schedule.parts * spec.gradients;
        if (k == 0) plane = branches_[0]->result_plane();
      }
    }
    end_ = branches_[1] ? branches_[1]->result_plane() : plane;
    z_plane_ = plane;
    act_ = {chain.act, {static_cast<A>(chain.p), static_cast<A>(chain.q)}};
  }

  const Plane<A>& result_plane() const { return end_; }
  bool has_block() const { return branches_[1].has_value(); }
  void close_sums() {
    for (auto& branch : branches_)
      if (branch) branch->close_sums();
  }

  // Evaluations of all parts with room for what backward reads, which is all of their units' inputs.
  void prepare(const Map<T>& x, A* statistics, const std::vector<Packed<A>*>& packed) {
    const bool keep = memory_.kept != nullptr;
    hold_ = keep || call_.cotangent;
    if (keep) {
      int64_t bytes = 0;
      for (auto& branch : branches_)
        if (branch) bytes += branch->room(true);
      if (keeps_z()) bytes += memory_.room(z_blocks(), z_plane_);
      if (keeps_sum()) bytes += memory_.room(end_blocks(), end_);
      memory_.kept->reserve(bytes);
    }
    for (size_t k = 0; k < 3; ++k) {
      if (!branches_[k]) continue;
      evaluations_[k] = branches_[k]->evaluation(keep);
      if (keep) branches_[k]->keep_inputs(evaluations_[k]);
      if (statistics) evaluations_[k].statistics = statistics, statistics += packed[k]->statistics;
    }
    if (keeps_z()) z_ = memory_.keep(z_blocks(), z_plane_);
    if (!branches_[0]) z_ = x;
    if (keeps_sum()) sum_ = memory_.keep(end_blocks(), end_);
    x_ = x;
    for (size_t k = 0; k < 3; ++k)
      if (branches_[k]) evaluations_[k].inputs[0] = k == 0 ? x_ : z_;
  }

  // `result`: where y goes; null if nobody reads it.
  void forward(const Map<T>* result) {
    if (!has_block()) {
      branches_[0]->value(evaluations_[0], x_, result, {}, hold_);
      return;
    }
    if (branches_[0]) branches_[0]->value(evaluations_[0], x_, &z_, {}, hold_);
    if (joins() && result) return join_ends(*result);
    const Map<T>* sum = sum_ ? &sum_ : result;
    Map<T> skip = z_;
    if (branches_[2]) {
      skip = sum ? memory_.take(end_blocks(), end_) : Map<T>{};
      branches_[2]->value(evaluations_[2], z_, sum ? &skip : nullptr, {}, hold_);
    }
    Mix<T> mix{static_cast<A>(chain_.step), {}};
    if (sum) mix.terms = {{1, skip}};
    branches_[1]->value(evaluations_[1], z_, sum, mix, hold_);
    if (branches_[2] && sum) memory_.give(skip);
    if (act_.kind == kIdentity || !sum || !result) return;
    branches_[1]->each({*sum, *result}, [=, this, from = *sum, to = *result](const Range& range) {
      for (int64_t i = 0; i < range.count; ++i)
        apply(end_, to.blocks, plain_rows(), act_, from.at(range, i), to.at(range, i), Combine<T>{});
    });
  }

  // From y's cotangent; `y` or the sum tells the activation's slope. The result is x's cotangent, if `call.point`.
  void backward(const Map<T>& bar, const Map<T>& y, const Map<T>* result) {
    const bool weights = call_.gradients;
    for (Evaluation<T>& evaluation : evaluations_) evaluation.spent = true;
    if (!has_block()) {
      branches_[0]->cotangent(evaluations_[0], image(1, bar), result, {}, weights, {}, call_.point);
      return;
    }
    const bool need_z = call_.point || (weights && branches_[0]);
    Map<T> g = bar;
    if (act_.kind != kIdentity) {
      g = memory_.take(end_blocks(), end_);
      const Map<T> at = sum_ ? sum_ : y;
      branches_[1]->each({at, bar, g}, [=, this](const Range& range) {
        for (int64_t i = 0; i < range.count; ++i)
          pull_activation(end_, g.blocks, act_, at.at(range, i), bar.at(range, i), g.at(range, i));
      });
    }
    // The last of these sweeps writes z's cotangent, which is x's without a lead.
    Map<T> skip = g, z_bar = {};
    if (branches_[2]) {
      if (need_z) skip = memory_.take(z_blocks(), z_plane_);
      branches_[2]->cotangent(evaluations_[2], image(1, g), need_z ? &skip : nullptr, {}, weights, {}, need_z);
    }
    if (need_z && branches_[0]) z_bar = memory_.take(z_blocks(), z_plane_);
    const Map<T>* to = !need_z ? nullptr : branches_[0] ? &z_bar : result;
    Mix<T> mix;
    if (need_z) mix.terms = {{1, skip}};
    branches_[1]->cotangent(evaluations_[1], image(chain_.step, g), to, mix, weights, {}, need_z);
    if (branches_[0] && need_z)
      branches_[0]->cotangent(evaluations_[0], image(1, z_bar), result, {}, weights, {}, call_.point);
  }

 private:
  static Mix<T> image(double scale, const Map<T>& map) { return {0, {{static_cast<A>(scale), map}}}; }

  // Whether sum and ReLU, and the norms in front of them, are one pass.
  bool joins() const { return act_.kind == kRelu && branches_[1]->ends_in_norm(); }

  void join_ends(const Map<T>& result) {
    const bool normed = branches_[2] && branches_[2]->ends_in_norm();
    Map<T> skip = z_;
    Passed<T> beside{};
    if (branches_[2]) {
      if (!normed) skip = memory_.take(end_blocks(), end_);
      branches_[2]->value(evaluations_[2], z_, normed ? nullptr : &skip, {}, hold_);
      if (normed) beside = evaluations_[2].at(branches_[2]->last()), skip = beside.input;
    }
    branches_[1]->value(evaluations_[1], z_, nullptr, {}, hold_);
    const Passed<T> at = evaluations_[1].at(branches_[1]->last());
    branches_[1]->each({at.input, skip, result}, [=, this](const Range& range) {
      for (int64_t i = 0; i < range.count; ++i) {
        const NormRows<A> rows = branches_[1]->rows_of(at, range, i);
        const NormRows<A> others = normed ? branches_[2]->rows_of(beside, range, i) : plain_rows();
        join(end_, result.blocks, rows, at.input.at(range, i), static_cast<A>(chain_.step), normed ? &others : nullptr,
             skip.at(range, i), result.at(range, i));
      }
    });
  }

  bool keeps_z() const { return branches_[0] && branches_[1]; }
  bool keeps_sum() const { return branches_[1] && act_.kind != kIdentity && act_.kind != kRelu; }
  int64_t z_blocks() const { return branches_[1]->input_blocks(); }
  int64_t end_blocks() const { return branches_[1]->result_blocks(); }
  NormRows<A> plain_rows() const { return branches_[1]->plain_rows(); }

  const ChainArguments& chain_;
  const ChainCall& call_;
  Memory<T>& memory_;
  Plane<A> end_{0, 0, 0}, z_plane_{0, 0, 0};
  Unary<A> act_;
  bool hold_ = false;
  std::optional<Branch<T>> branches_[3];
  Evaluation<T> evaluations_[3];
  Map<T> x_, z_, sum_;
};

// Calls f with a number of the tensor's own type, for maps stored as T.
template <class T, class F>
void with_own(const Tensor& tensor, const F& f) {
  if constexpr (std::is_same_v<T, float>)
    if (tensor.scalar_type() == ScalarType::BFloat16) return f(bfloat16{});
  f(T{});
}

template <class T>
void run_chain(const ChainArguments& chain, const ChainCall& call, std::vector<Tensor>& kept_pieces, Tensor* statistics,
               std::vector<Tensor>* bars) {
  using A = Number<T>;
  const bool forward = call.cotangent == nullptr, again = !forward && !call.keep;
  const std::vector<ChainPart> parts = parts_of(chain);
  const int64_t samples = call.x.size(0), workers = workers_for(samples);
  const Wanted wanted{.transposed = !forward, .gradients = call.gradients, .straight = forward || again};
  // Each where its arguments are: a Packed is not moved.
  std::optional<Packed<A>> packed_parts[3];
  std::vector<Packed<A>*> packed(3, nullptr);
  int64_t channels = call.x.size(1), widest = channels, count = 0, met = 0, pixels = call.x.size(2) * call.x.size(3);
  bool coupled = false;
  Plane<A> plane(call.x.size(2), call.x.size(3), 0);
  for (size_t k = 0; k < 3; ++k) {
    if (parts[k].strides.empty()) continue;
    packed_parts[k].emplace(parts[k].arguments(), samples, channels, plane, lowers(call.x), wanted);
    packed[k] = &*packed_parts[k];
    const BranchSpec<A>& spec = packed[k]->spec;
    count += spec.gradients, met += packed[k]->statistics, widest = std::max(widest, spec.channels());
    coupled = coupled || spec.couples_samples;
    Plane<A> end = plane;
    for (const UnitSpec<A>& unit : spec.units) end = unit.plane_after(end);
    pixels = std::min(pixels, end.pixels());
    if (k == 0) channels = spec.units.back().out_channels, plane = end;
  }
  const int64_t group = group_for(samples, workers, pixels, sizeof(T), widest);
  const int64_t shares = count > 0 ? parts_for(samples, workers, group, count * sizeof(A)) : 0;
  Schedule schedule(samples, workers, group, shares);
  Kept kept(kept_pieces);
  const Plane<A> first(call.x.size(2), call.x.size(3), 0);
  Memory<T> memory(first, schedule, coupled, call.keep ? &kept : nullptr);
  CallMemory sums;
  A* gradients = static_cast<A*>(sums.take(std::max<int64_t>(1, shares * count) * static_cast<int64_t>(sizeof(A))));
  if (statistics) *statistics = new_vector(met, scalar_type<A>());

  ChainProgram<T> program(chain, call, packed, schedule, memory, gradients);
  const auto read = [&](const Tensor& tensor, const Plane<A>& on) {
    Map<T> map;
    with_own<T>(tensor, [&](auto zero) {
      const auto feature = feature_of<const decltype(zero)>(tensor);
      map = map_of<T>(feature);
      if (map) return;
      map = memory.take(blocks_of<A>(feature.channels), on);
      schedule.each([=](const Range& range) {
        for (int64_t i = 0; i < range.count; ++i) load_sample(on, feature, range.first + i, map.at(range, i));
      });
    });
    map.pinned = true;
    return map;
  };
  const Map<T> x = read(call.x, first);
  program.prepare(x, forward && met ? static_cast<A*>(statistics->data_ptr()) : nullptr, packed);
  const Plane<A> result_plane = forward ? program.result_plane() : first;
  const bool wants_result = forward || call.point;
  Map<T> to;
  if (wants_result)
    with_own<T>(call.result, [&](auto zero) { to = map_of<T>(feature_of<decltype(zero)>(call.result)); });
  const bool apart = wants_result && !to;
  if (apart) to = memory.take(blocks_of<A>(call.result.size(1)), result_plane);
  to.pinned = true;
  if (forward) {
    program.forward(&to);
  } else {
    const Map<T> bar = read(*call.cotangent, program.result_plane());
    const Map<T> y = chain.act == kRelu ? read(*call.y, program.result_plane()) : Map<T>{};
    if (again) program.forward(nullptr);
    program.backward(bar, y, wants_result ? &to : nullptr);
  }
  if (apart)
    with_own<T>(call.result, [&](auto zero) {
      schedule.each([=, result = feature_of<decltype(zero)>(call.result)](const Range& range) {
        for (int64_t i = 0; i < range.count; ++i) store_sample(result_plane, to.at(range, i), result, range.first + i);
      });
    });
  schedule.flush();
  program.close_sums();
  memory.check();
  if (call.keep) kept.check();
  if (forward) kept_pieces = kept.pieces();
  if (!bars || !call.gradients) return;
  for (size_t k = 0; k < 3; ++k) {
    if (!packed[k]) continue;
    for (Tensor& bar : packed[k]->gradients(gradients, shares)) bars->push_back(std::move(bar));
    gradients += shares * packed[k]->spec.gradients;
  }
}

}  // namespace fastode::resident

// Included by one .cpp per arithmetic type.
#pragma once

#include "linear.h"
#include "rows.h"
#include "skew_solve.h"
#include "team.h"
#include "walk.h"

namespace fastode::resident {

template <class A>
void LinearPair<A>::down(A sign, const View<A>& in, const A* base, A damping, const View<A>& state,
                         const View<A>& out) const {
  row_products(spec.weight, spec.classes, spec.row, z_plane.width, in.at, out.at);
  for (int64_t c = 0; c < spec.classes; ++c) {
    A value = sign * out.at[c];
    if (base) value += base[c];
    if (damping != 0) value -= damping * state.at[c];
    out.at[c] = value;
  }
  std::fill(out.at + spec.classes, out.at + y_size(), A(0));
}

template <class A>
void LinearPair<A>::up(A sign, const View<A>& in, const A* base, A damping, const View<A>& state,
                       const View<A>& out) const {
  using V = Vec<A>;
  sum_of_rows(spec.weight, spec.classes, spec.row, z_plane.width, in.at, out.at);
  for (int64_t f = 0; f < z_size(); f += kLanes<A>) {
    V value = sign * load<V>(out.at + f);
    if (base) value += load<V>(base + f);
    if (damping != 0) value -= damping * load<V>(state.at + f);
    store<V>(out.at + f, value);
  }
}

template <class A>
void LinearPair<A>::activate_row(bool y, const View<A>& in, const View<A>& out) const {
  using V = Vec<A>;
  const int64_t width = y ? y_size() : z_size();
  with_activation(spec.act.kind, [&](auto kind) {
    for (int64_t f = 0; f < width; f += kLanes<A>)
      store<V>(out.at + f, activate(kind, load<V>(in.at + f), spec.act.arguments));
  });
  std::fill(out.at + (y ? spec.classes : spec.features), out.at + width, A(0));
}

template <class A>
void LinearPair<A>::pull_activation(bool y, const View<A>& at, const View<A>& map) const {
  using V = Vec<A>;
  const int64_t width = y ? y_size() : z_size();
  with_activation(spec.act.kind, [&](auto kind) {
    if constexpr (!kIsIdentity<decltype(kind)>)
      for (int64_t f = 0; f < width; f += kLanes<A>)
        store<V>(map.at + f, load<V>(map.at + f) * activate_first(kind, load<V>(at.at + f), spec.act.arguments));
  });
}

template <class A>
void LinearPair<A>::evaluate(const Both<A>& point, Trace<A>& trace, Want want) const {
  if (spec.released) {
    if (want.y) activate_row(false, point.z, inner_.z), down(1, inner_.z, spec.bias_y, spec.gamma, point.y, trace.s.y);
    if (want.z) activate_row(true, point.y, inner_.y), up(-1, inner_.y, spec.bias_z, spec.gamma, point.z, trace.s.z);
  } else {
    if (want.y) down(1, point.z, nullptr, spec.gamma, point.y, trace.guide.y);
    if (want.z) up(-1, point.y, nullptr, spec.gamma, point.z, trace.guide.z);
    if (want.y) activate_row(true, trace.guide.y, trace.s.y);
    if (want.z) activate_row(false, trace.guide.z, trace.s.z);
  }
  trace.made = want;
}

template <class A>
void LinearPair<A>::restore(Trace<A>& trace) const {
  if (spec.tells) return;
  if (trace.made.y) activate_row(true, trace.guide.y, trace.s.y);
  if (trace.made.z) activate_row(false, trace.guide.z, trace.s.z);
}

template <class A>
void LinearPair<A>::pull_half(bool y, const Trace<A>& trace, const Combine<A>& bar) const {
  const Plane<A>& plane = y ? y_plane : z_plane;
  const View<A>& out = y ? bar_.y : bar_.z;
  combine_maps<A>(plane, 1, out, bar);
  if (product) *product += inner_product<A>(plane, 1, y ? trace.s.y : trace.s.z, out);
  if (!spec.released) pull_activation(y, y ? trace.guide.y : trace.guide.z, out);
}

// Rows of the weight's gradient that are added to at a time: each is read and written, and so few are enough.
inline constexpr int kRowsOfGradients = 4;

template <class A>
void LinearPair<A>::add_gradients(const Both<A>& inner, bool has_p, bool has_q, A* gradients) const {
  using V = Vec<A>;
  const int64_t width = z_size();
  const auto add = [&](auto by_p, auto by_q) {
    in_stretches<kRowsOfGradients>(spec.classes, [&](int64_t first, auto together) {
      constexpr int count = together();
      A* rows = gradients + spec.weight_at + first * width;
      V p[count], y[count];
      for (int r = 0; r < count; ++r) {
        if constexpr (by_p()) p[r] = splat<V>(bar_.y.at[first + r]);
        if constexpr (by_q()) y[r] = splat<V>(inner.y.at[first + r]);
      }
      for (int64_t f = 0; f < width; f += kLanes<A>) {
        V z = {}, q = {};
        if constexpr (by_p()) z = load<V>(inner.z.at + f);
        if constexpr (by_q()) q = load<V>(bar_.z.at + f);
        FASTODE_UNROLL for (int r = 0; r < count; ++r) {
          V value = load<V>(rows + r * width + f);
          if constexpr (by_p()) value += p[r] * z;
          if constexpr (by_q()) value -= y[r] * q;
          store<V>(rows + r * width + f, value);
        }
      }
    });
  };
  with_flag(has_p, [&](auto by_p) { with_flag(has_q, [&](auto by_q) { add(by_p, by_q); }); });
  if (!spec.released) return;
  for (int64_t c = 0; has_p && c < spec.classes; ++c) gradients[spec.bias_y_at + c] += bar_.y.at[c];
  for (int64_t f = 0; has_q && f < spec.features; ++f) gradients[spec.bias_z_at + f] += bar_.z.at[f];
}

template <class A>
Want LinearPair<A>::pull(const Both<A>& point, const Trace<A>& trace, const Combine<A>& y_bar, const Combine<A>& z_bar,
                         A* gradients, Want need, const Both<A>& to) const {
  const bool has_p = trace.made.y && y_bar.count > 0, has_q = trace.made.z && z_bar.count > 0;
  if (has_p) pull_half(true, trace, y_bar);
  if (has_q) pull_half(false, trace, z_bar);
  const View<A>&p = bar_.y, &q = bar_.z;
  if (gradients && (has_p || has_q)) {
    if (spec.released && has_p) activate_row(false, point.z, inner_.z);
    if (spec.released && has_q) activate_row(true, point.y, inner_.y);
    add_gradients(spec.released ? inner_ : point, has_p, has_q, gradients);
  }
  const Want read = reads({has_p, has_q}), left = {need.y && read.y, need.z && read.z};
  if (left.y) {
    Combine<A> sum;
    if (has_q) down(-1, q, nullptr, 0, p, to.y), sum.add(1, to.y);
    if (has_q && spec.released) pull_activation(true, point.y, to.y);
    if (has_p) sum.add(-spec.gamma, p);
    if (sum.count > has_q) combine_maps<A>(y_plane, 1, to.y, sum);
  }
  if (left.z) {
    Combine<A> sum;
    if (has_p) up(1, p, nullptr, 0, q, to.z), sum.add(1, to.z);
    if (has_p && spec.released) pull_activation(false, point.z, to.z);
    if (has_q) sum.add(-spec.gamma, q);
    if (sum.count > has_p) combine_maps<A>(z_plane, 1, to.z, sum);
  }
  return left;
}

template <class A>
PackedLinear<A>::PackedLinear(const LinearArguments& arguments, bool gradients) : arguments_(arguments) {
  const Tensor& weight = arguments.parameters[0];
  const double* numbers = arguments.numbers.data();
  const int64_t kind = arguments.integers[0];
  spec.classes = weight.size(0), spec.features = weight.size(1), spec.released = arguments.integers[1] != 0;
  spec.act = {kind, {static_cast<A>(numbers[1]), static_cast<A>(numbers[2])}};
  spec.gamma = static_cast<A>(numbers[0]), spec.initial = static_cast<A>(numbers[3]);
  spec.tells = spec.released || kind == kIdentity || kind == kRelu || (kind == kLeakyRelu && numbers[1] > 0);
  spec.bias_y_at = spec.classes * spec.padded(spec.features);
  spec.bias_z_at = spec.bias_y_at + (spec.released ? spec.padded(spec.classes) : 0);
  if (gradients) spec.gradients = spec.bias_z_at + (spec.released ? spec.padded(spec.features) : 0);
  Arena count(nullptr);
  read(count);
  Arena arena(memory_.take(count.used()));
  read(arena);
  arena.check();
}

// Takes every row from the arena; fills them where it has memory.
template <class A>
void PackedLinear<A>::read(Arena& arena) {
  const auto row_of = [&](const A* from, int64_t stride, int64_t count, A* to) {
    for (int64_t i = 0; i < spec.padded(count); ++i) to[i] = i < count ? from[i * stride] : A(0);
  };
  const auto vector_of = [&](A value) {
    A* row = arena.take<A>(kLanes<A>);
    if (row) std::fill(row, row + kLanes<A>, value);
    return row;
  };
  spec.zeros = vector_of(0), spec.ones = vector_of(1);
  const Tensor& weight = arguments_.parameters[0];
  const A* from = static_cast<const A*>(weight.data_ptr());
  const int64_t width = spec.padded(spec.features), row = weight.strides()[0], column = weight.strides()[1];
  if (column == 1 && width == spec.features) {
    spec.weight = from, spec.row = row;
  } else {
    A* packed = arena.take<A>(spec.classes * width);
    for (int64_t c = 0; packed && c < spec.classes; ++c)
      row_of(from + c * row, column, spec.features, packed + c * width);
    spec.weight = packed, spec.row = width;
  }
  const auto bias = [&](size_t which, int64_t count) {
    const Tensor& tensor = arguments_.parameters[which];
    A* to = arena.take<A>(spec.padded(count));
    if (to) row_of(static_cast<const A*>(tensor.data_ptr()), tensor.strides()[0], count, to);
    return to;
  };
  if (spec.released) spec.bias_y = bias(1, spec.classes), spec.bias_z = bias(2, spec.features);
}

template <class A>
std::vector<Tensor> PackedLinear<A>::gradients(const Tensor& accumulators, int64_t parts) const {
  const A* base = static_cast<const A*>(accumulators.data_ptr());
  const auto add_up = [&](int64_t at, int64_t count, A* to) {
    std::fill(to, to + count, A(0));
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = 0; i < count; ++i) to[i] += base[part * spec.gradients + at + i];
  };
  const int64_t sizes[] = {spec.classes, spec.features}, strides[] = {spec.features, 1};
  std::vector<Tensor> result{new_tensor(scalar_type<A>(), sizes, strides, 2)};
  A* rows = static_cast<A*>(result[0].data_ptr());
  for (int64_t c = 0; c < spec.classes; ++c)
    add_up(spec.weight_at + c * spec.padded(spec.features), spec.features, rows + c * spec.features);
  if (!spec.released) return result;
  for (const auto& [at, count] : {std::pair{spec.bias_y_at, spec.classes}, {spec.bias_z_at, spec.features}}) {
    result.push_back(new_vector(count, scalar_type<A>()));
    add_up(at, count, static_cast<A*>(result.back().data_ptr()));
  }
  return result;
}

// The field alone: a sample's slopes, or the cotangents of its point.
template <class A>
class LinearWorker {
 public:
  LinearWorker(const LinearSpec<A>& spec, const LinearCall& call, Arena& arena, A* gradients)
      : pair_(spec, arena, call.backward),
        call_(call),
        y_(call.y, arena),
        z_(call.z, arena),
        y_bar_(call.y_bar ? *call.y_bar : call.y, arena),
        z_bar_(call.z_bar ? *call.z_bar : call.z, arena),
        y_out_(call.need.y ? call.y_out : call.y, arena),
        z_out_(call.need.z ? call.z_out : call.z, arena),
        all_gradients_(gradients) {
    if (call.backward) slopes_ = pair_.maps(arena);
    if (call.backward && !spec.tells) guides_ = pair_.maps(arena);
  }

  void enter(int64_t part) { gradients_ = all_gradients_ ? all_gradients_ + part * pair_.spec.gradients : nullptr; }

  void operator()(int64_t n) {
    const Both<A> point{y_.load(n), z_.load(n)}, out{y_out_.view(n), z_out_.view(n)};
    call_.backward ? pull(n, point, out) : put(point, out);
    if (call_.need.y) y_out_.store(n);
    if (call_.need.z) z_out_.store(n);
  }

 private:
  void put(const Both<A>& point, const Both<A>& out) const {
    Trace<A> trace;
    trace.guide = trace.s = out;
    pair_.evaluate(point, trace, {true, true});
  }

  void pull(int64_t n, const Both<A>& point, const Both<A>& out) const {
    Trace<A> trace;
    trace.s = slopes_, trace.guide = pair_.spec.tells ? slopes_ : guides_;
    trace.made = {call_.y_bar != nullptr, call_.z_bar != nullptr};
    // The released field's derivative asks for no slope.
    if (!pair_.spec.released) pair_.evaluate(point, trace, trace.made);
    Combine<A> y_bar, z_bar;
    if (call_.y_bar) y_bar.add(1, y_bar_.load(n));
    if (call_.z_bar) z_bar.add(1, z_bar_.load(n));
    const Want left = pair_.pull(point, trace, y_bar, z_bar, gradients_, call_.need, out);
    if (call_.need.y && !left.y) combine_maps<A>(pair_.y_plane, 1, out.y, {});
    if (call_.need.z && !left.z) combine_maps<A>(pair_.z_plane, 1, out.z, {});
  }

  LinearPair<A> pair_;
  LinearCall call_;
  MatrixPort<A> y_, z_, y_bar_, z_bar_, y_out_, z_out_;
  Both<A> slopes_, guides_;
  A *all_gradients_, *gradients_ = nullptr;
};

template <class A>
void run_linear(const PackedLinear<A>& packed, const LinearCall& call, const Tensor& gradients) {
  const int64_t samples = call.y.size(0);
  Team<LinearWorker<A>> team(samples, parts_for(samples), [&](Arena& arena) {
    A* to = worker_gradients(packed.spec, gradients, 0);
    return std::make_unique<LinearWorker<A>>(packed.spec, call, arena, to);
  });
  team.each([](LinearWorker<A>& worker, int64_t n, Sums&) { worker(n); });
  team.check();
}

template <class A>
void run_linear_solve(const PackedLinear<A>& packed, const Embedded& scheme, const SolveCall& call,
                      std::vector<double>& log, std::vector<Tensor>& kept, const Tensor& gradients) {
  run_solves_of<LinearPair<A>>(packed.spec, parts_for(call.x.size(0)), scheme, call, log, kept, gradients);
}

}  // namespace fastode::resident

// The field of two matrix products on one resident sample, its features in vectors: an evaluation and its pull-back,
// in the place of the skew pair's (skew.h). Derivation: README.md of fastode/ops/schemes/skew_pair.
#pragma once

#include "skew.h"
#include "skew_engine.h"

namespace fastode::resident {

// The field as it is packed. The rows of `weight` [classes, features] and the biases are padded with zeros.
template <class A>
struct LinearSpec {
  using Real = A;

  int64_t classes = 0, features = 0;
  Unary<A> act;
  bool released = false;     // the activation inside, and biases: the released code's field
  bool tells = false;        // what backward needs of a slope is the slope: act'(h) = act'(act(h)), or there is no h
  A gamma = 0, initial = 0;  // y(0) is `initial` everywhere
  int64_t row = 0;           // elements from a row of the weight to the next
  const A *weight = nullptr, *bias_y = nullptr, *bias_z = nullptr;
  const A *zeros = nullptr, *ones = nullptr;            // of a vector
  int64_t weight_at = 0, bias_y_at = 0, bias_z_at = 0;  // in a part's accumulators
  int64_t gradients = 0;                                // elements of these; 0 if none is asked for
  static constexpr int64_t statistics = 0;

  static int64_t vectors(int64_t count) { return divide_up(count, kLanes<A>); }
  static int64_t padded(int64_t count) { return vectors(count) * kLanes<A>; }
};

// A sample of a matrix [N, columns] as a row of whole vectors: in place where it is one, else by a copy.
template <class A>
class MatrixPort {
 public:
  MatrixPort(const Tensor& tensor, Arena& arena)
      : data_(static_cast<A*>(tensor.data_ptr())),
        columns_(tensor.size(1)),
        row_(tensor.strides()[0]),
        column_(tensor.strides()[1]),
        width_(LinearSpec<A>::padded(columns_)) {
    if (column_ != 1 || columns_ != width_) copy_ = arena.take<A>(width_), direct_ = false;
  }

  View<A> view(int64_t n) const { return {direct_ ? data_ + n * row_ : copy_, width_, kLanes<A>, width_}; }
  View<A> load(int64_t n) const {
    for (int64_t c = 0; !direct_ && c < width_; ++c) copy_[c] = c < columns_ ? data_[n * row_ + c * column_] : A(0);
    return view(n);
  }
  void store(int64_t n) const {
    for (int64_t c = 0; !direct_ && c < columns_; ++c) data_[n * row_ + c * column_] = copy_[c];
  }

 private:
  A* data_;
  int64_t columns_, row_, column_, width_;
  A* copy_ = nullptr;
  bool direct_ = true;
};

template <class A>
class LinearPair {
 public:
  using Real = A;
  using Spec = LinearSpec<A>;

  LinearPair(const Spec& spec, Arena& arena, bool backward)
      : spec(spec), y_plane(1, Spec::vectors(spec.classes), 0), z_plane(1, Spec::vectors(spec.features), 0) {
    point_ = maps(arena);
    if (backward) bar_ = maps(arena);
    if (spec.released) inner_ = maps(arena);
  }

  // A state is a plane of one row whose pixels are its vectors, so the passes of the pair go over it.
  int64_t y_blocks() const { return 1; }
  int64_t z_blocks() const { return 1; }
  int64_t y_size() const { return Spec::padded(spec.classes); }
  int64_t z_size() const { return Spec::padded(spec.features); }
  Both<A> maps(Arena& arena) const { return {y_map(arena), z_plane.compact(arena.take<A>(z_size()))}; }
  View<A> y_map(Arena& arena) const { return y_plane.compact(arena.take<A>(y_size())); }
  std::array<int64_t, 2> entries() const { return {spec.classes, spec.features}; }
  Both<A> workspace() const { return point_; }

  bool same_start() const { return false; }
  void start(const View<A>&, const View<A>& y) const {
    std::fill(y.at, y.at + spec.classes, spec.initial);
    std::fill(y.at + spec.classes, y.at + y_size(), A(0));
  }
  void add_start(const View<A>&, const View<A>&) const {}

  // Which halves of a point an evaluation reads.
  Want reads(Want want) const {
    const bool damped = spec.gamma != 0;
    return {want.z || (want.y && damped), want.y || (want.z && damped)};
  }

  // The wanted slopes at `point`.
  void evaluate(const Both<A>& point, Trace<A>& trace, Want want) const;

  // act(h) again, where the guide is h.
  void restore(Trace<A>& trace) const;

  // For the slopes' cotangents, of which one without terms is zero: adds the parameters' gradients and leaves the
  // cotangents of the point in `to`. Returns which are there; the others are zero.
  Want pull(const Both<A>& point, const Trace<A>& trace, const Combine<A>& y_bar, const Combine<A>& z_bar, A* gradients,
            Want need, const Both<A>& to) const;

  // out = combine(cotangent)
  void finish(bool y, const View<A>&, const Trace<A>&, const View<A>& cotangent, const View<A>& out, Combine<A> combine,
              A*) const {
    combine_maps<A>(y ? y_plane : z_plane, 1, out, combine.add(1, cotangent));
  }

  // Of a slope as it is.
  NormRows<A> rows_of(int, const A*) const {
    NormRows<A> rows{};
    rows.mean = rows.bias = rows.n = rows.xn = spec.zeros;
    rows.rstd = rows.weight = spec.ones;
    return rows;
  }

  const Spec& spec;
  const Plane<A> y_plane, z_plane;
  double* product = nullptr;  // where pull adds the inner products of slopes and their cotangents up, or null

 private:
  // out = W in + base - damping * state, rows of the padded sizes.
  void down(A sign, const View<A>& in, const A* base, A damping, const View<A>& state, const View<A>& out) const;
  // out = sign W^T in + base - damping * state
  void up(A sign, const View<A>& in, const A* base, A damping, const View<A>& state, const View<A>& out) const;
  // out = act(in), and zero in the padding.
  void activate_row(bool y, const View<A>& in, const View<A>& out) const;
  // map *= act'(at)
  void pull_activation(bool y, const View<A>& at, const View<A>& map) const;
  // The cotangent of h, of the released field that of the slope, in bar_.
  void pull_half(bool y, const Trace<A>& trace, const Combine<A>& bar) const;
  void add_gradients(const Both<A>& inner, bool has_p, bool has_q, A* gradients) const;

  Both<A> point_, bar_, inner_;
};

template <class A>
struct PortOf<LinearPair<A>> {
  using Type = MatrixPort<A>;
};

// The field as the operators take it. `parameters`: W and, of the released one, the biases of y and z. `integers`: the
// activation's code and whether it is the released one. `numbers`: gamma, the activation's p and q, and y(0).
struct LinearArguments {
  const std::vector<Tensor>& parameters;
  const std::vector<int64_t>& integers;
  const std::vector<double>& numbers;
};

template <class A>
class PackedLinear {
 public:
  PackedLinear(const LinearArguments& arguments, bool gradients);

  // The gradients of `parameters` from the accumulators of the parts.
  std::vector<Tensor> gradients(const Tensor& accumulators, int64_t parts) const;

  LinearSpec<A> spec;

 private:
  void read(Arena& arena);

  LinearArguments arguments_;
  CallMemory memory_;
};

// Into how many parts a batch is divided whose sums and gradients do not depend on the number of threads.
inline int64_t parts_for(int64_t samples) { return std::min<int64_t>(samples, 16); }

// The slopes at (y, z), or for cotangents of these the gradients of y and z that are needed.
struct LinearCall {
  const Tensor &y, &z;
  const Tensor *y_bar, *z_bar;  // null: forward, or a zero cotangent
  bool backward;
  Tensor y_out, z_out;  // one that is not needed is empty
  Want need;
};

template <class A>
void run_linear(const PackedLinear<A>& packed, const LinearCall& call, const Tensor& gradients);
template <class A>
void run_linear_solve(const PackedLinear<A>& packed, const Embedded& scheme, const SolveCall& call,
                      std::vector<double>& log, std::vector<Tensor>& kept, const Tensor& gradients);

}  // namespace fastode::resident

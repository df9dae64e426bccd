// The skew pair on one resident sample: an evaluation and its pull-back. Derivation and equation numbers: README.md of
// fastode/ops/schemes/skew_pair.
#pragma once

#include <array>

#include "branch.h"
#include "skew_bf16.h"
#include "skew_passes.h"

namespace fastode::resident {

enum { kPreY = 0, kPreZ, kPostY, kPostZ, kPairNorms };

template <class A>
struct PairNorm {
  int64_t mode = kNoNorm, groups = 1, channels = 0;
  double eps = 0;
  const A *weight = nullptr, *bias = nullptr, *mean = nullptr, *rstd = nullptr;  // rows
  const A* unit = nullptr;                                                       // 1 / weight
  int64_t weight_at = -1, bias_at = -1;  // of the gradients in a worker's accumulators, or -1
  int64_t statistics_at = 0;             // of mean and rstd in an evaluation's statistics

  bool measured() const { return mode == kGroupNorm; }
  int64_t blocks() const { return blocks_of<A>(channels); }
};

template <class A>
struct PairSpec {
  using Real = A;

  SkewShape shape = {};
  PairNorm<A> norms[kPairNorms];
  Unary<A> act;
  bool tells = false;    // act'(h) = act'(act(h)): act(h) can be the guide
  SkewTiles tiles = {};  // if set, W and its transpose are packed for these
  A gamma = 0;
  const A *down = nullptr, *up = nullptr, *zeros = nullptr, *ones = nullptr;  // rows
  int64_t weight_at = -1, gradients = 0;                                      // elements of a worker's accumulators
  int64_t statistics = 0;  // elements for each evaluation of a sample
};

// A state or a slope: one map in y's plane and one in z's.
template <class A>
struct Both {
  View<A> y, z;
};

template <class A>
struct Point {
  Stored<A> y, z;

  Point(const Stored<A>& y, const Stored<A>& z) : y(y), z(z) {}
  Point(const Both<A>& point) : y(point.y), z(point.z) {}
};

// The cotangent of a slope: a sum of terms, or a stored map.
template <class A>
struct Cotangent {
  Combine<A> terms = {};
  Stored<A> stored = {};

  Cotangent() = default;
  Cotangent(const Combine<A>& terms) : terms(terms) {}
  Cotangent(const Stored<A>& map) : stored(map) {
    if (!map.rounded.at) terms.add(1, map.view);
  }
  bool present() const { return terms.count > 0 || stored.rounded.at; }
};

struct Want {
  bool y = false, z = false;
  bool any() const { return y || z; }
};

// What an evaluation leaves to its pull-back, for each half: `s` = act(h); the `guide` at which act' is taken, which is
// h or, where act' has the same value there, s; and the norms' statistics. A half with signs has its result norm(s) in
// place of s, and its guide is not read.
template <class A>
struct Trace {
  Both<A> guide, s;
  Signs<A> y_signs = {}, z_signs = {};
  A* statistics = nullptr;
  Want made;
};

template <class A>
class SkewPair {
 public:
  using Real = A;
  using Spec = PairSpec<A>;

  SkewPair(const PairSpec<A>& spec, Arena& arena, bool backward)
      : spec(spec), y_plane(spec.shape.template y_plane<A>()), z_plane(spec.shape.template z_plane<A>()) {
    y_hat_ = padded(arena, true), z_hat_ = padded(arena, false);
    // Tiles read rounded copies, made band by band; only the damping reads these maps whole.
    if (backward && spec.tiles && spec.gamma == 0)
      p_ = y_hat_, q_ = z_hat_;
    else if (backward)
      p_ = spec.shape.template narrow<A>() ? y_map(arena) : padded(arena, true), q_ = padded(arena, false);
    if constexpr (kOnTiles<A>)
      if (spec.tiles) take_tiles(arena, backward);
    width_ = kLanes<A> * std::max(y_blocks(), z_blocks());
    sums_ = arena.take<A>(2 * width_), means_ = arena.take<A>(2 * width_);
    scratch_ = arena.take<A>(spec.shape.template scratch_size<A>());
  }

  int64_t y_blocks() const { return blocks_of<A>(spec.shape.channels); }
  int64_t z_blocks() const { return blocks_of<A>(spec.shape.in_channels); }
  int64_t y_size() const { return y_blocks() * y_plane.pixels() * kLanes<A>; }
  int64_t z_size() const { return z_blocks() * z_plane.pixels() * kLanes<A>; }

  View<A> y_map(Arena& arena) const { return y_plane.compact(arena.take<A>(y_size())); }
  View<A> z_map(Arena& arena) const { return z_plane.compact(arena.take<A>(z_size())); }
  Both<A> maps(Arena& arena) const { return {y_map(arena), z_map(arena)}; }

  // How many numbers of a sample y and z have.
  std::array<int64_t, 2> entries() const {
    return {spec.shape.channels * y_plane.pixels(), spec.shape.in_channels * z_plane.pixels()};
  }

  // Whether y(0) is x; else `start` makes it, and `add_start` adds to x's cotangent that by y(0).
  bool same_start() const { return spec.shape.stride == 1 && spec.shape.channels == spec.shape.in_channels; }
  void start(const View<A>& x, const View<A>& y) const {
    repeat_channels<A>(y_plane, spec.shape.in_channels, spec.shape.channels, spec.shape.stride, x, y);
  }
  void add_start(const View<A>& x_bar, const View<A>& y_bar) const {
    add_repeated<A>(y_plane, spec.shape.in_channels, spec.shape.channels, spec.shape.stride, x_bar, y_bar);
  }

  // Where a point may be made that only the next evaluation reads.
  Both<A> workspace() const { return {y_hat_, z_hat_}; }

  // (1) at `point`: the wanted act(h).
  void evaluate(const Point<A>& point, Trace<A>& trace, Want want) const;

  // (2) to (4) for the slopes' cotangents; one without terms is zero. Adds the parameters' gradients and leaves the
  // cotangents that are needed, those of the norms' results, in `to`. Returns which are there; the others are zero.
  Want pull(const Point<A>& point, const Trace<A>& trace, const Cotangent<A>& y_bar, const Cotangent<A>& z_bar,
            A* gradients, Want need, const Both<A>& to) const;

  // out = combine(the pull-back of the norm of the point's half), for the cotangent of its result; it may lie in `out`.
  void finish(bool y, const Stored<A>& point, const Trace<A>& trace, const View<A>& cotangent, const Stored<A>& out,
              const Combine<A>& combine, A* gradients) const;

  // Whether backward can have s from the slope norm(s) and the signs of s.
  bool results_tell() const {
    for (const int which : {kPostY, kPostZ})
      for (int64_t c = 0; c < spec.norms[which].channels; ++c) {
        // Beside a large bias the slope has lost s to rounding.
        const A weight = std::abs(spec.norms[which].weight[c]), bias = std::abs(spec.norms[which].bias[c]);
        if (!(weight > A(1e-6) && weight < A(1e6) && bias <= 4 * weight)) return false;
      }
    return spec.tells;
  }

  // Where y's guide may lie for a single pull-back with one term, which writes there only after it has read it.
  const View<A>& guide_room() const { return p_; }

  // Calls f(band, its first row, where it goes) for every band of a half.
  template <class F>
  void write(bool y, const Stored<A>& out, const F& f) const {
    const int64_t blocks = y ? y_blocks() : z_blocks();
    each_band(y ? y_plane : z_plane, [&](const Plane<A>& band, int64_t at) {
      if constexpr (kOnTiles<A>)
        if (out.rounded.at) {
          const View<A> to = band.compact(band_);
          f(band, at, to);
          return round_band(band, blocks, to, below(out.rounded, at));
        }
      f(band, at, below(out.view, at));
    });
  }

  // Which halves of a point an evaluation reads.
  Want reads(Want want) const {
    const bool damped = spec.gamma != 0;
    return {want.z || (want.y && damped), want.y || (want.z && damped)};
  }

  // The half y of an evaluation again, from its statistics.
  void remake_y(const Point<A>& point, const Trace<A>& trace) const;

  // act(h) again, where the guide is h.
  void restore(Trace<A>& trace) const;

  // The norm `which`, and for a pull-back the means that the last settle() found.
  NormRows<A> rows_of(int which, const A* statistics, bool settled = false) const;

  const PairSpec<A>& spec;
  const Plane<A> y_plane, z_plane;
  Ahead* ahead = nullptr;     // what the convolutions ask for meanwhile
  double* product = nullptr;  // where pull adds the inner products of slopes and their cotangents up, or null

 private:
  // What tiles read, one map in y's plane and one in z's.
  struct Rounded {
    bfloat16 *y = nullptr, *z = nullptr;
  };

  static bool is_y(int which) { return which == kPreY || which == kPostY; }
  const Plane<A>& plane_of(int which) const { return is_y(which) ? y_plane : z_plane; }

  View<A> padded(Arena& arena, bool y) const {
    const Plane<A>& plane = y ? y_plane : z_plane;
    const int64_t blocks = y ? y_blocks() : z_blocks();
    A* base = arena.take<A>(blocks * plane.size);
    if (!base) return {};
    clear_halo(plane, plane.padded(base), blocks);
    return plane.padded(base);
  }

  void take_tiles(Arena& arena, bool backward);
  // A band of what a pass writes for tiles to read: of the map where that is kept whole, else of a scratch.
  View<A> band_of(const View<A>& map, bool whole, const Plane<A>& band, int64_t at) const {
    return whole ? below(map, at) : band.compact(band_);
  }
  // A band of a map of either half; one that has to be widened lies at `scratch` then.
  View<A> read(int which, const Stored<A>& map, const Plane<A>& band, int64_t at, A* scratch) const {
    if constexpr (kOnTiles<A>)
      if (map.rounded.at) {
        const View<A> to = band.compact(scratch);
        widen_band(band, spec.norms[which].blocks(), below(map.rounded, at), to);
        return to;
      }
    return below(map.view, at);
  }
  void round(bool y, const Plane<A>& band, int64_t at, const View<A>& from, const Rounded& to) const;
  // The norm's result at `point`, for a convolution to read, and as a whole map for the damping.
  void feed(int which, const Stored<A>& point, const A* statistics, bool whole) const;
  // Rows of combine(W z^), or of combine(W q), from `at` on; `out` and the terms are whole maps.
  void down(bool cotangent, const Plane<A>& band, int64_t at, const View<A>& out, const Combine<A>& combine) const;
  // combine(W^T y^), or of p, as z's map.
  void up(bool cotangent, const View<A>& out, const Combine<A>& combine) const;
  void add_weight_gradient(const Point<A>& point, const Trace<A>& trace, bool has_p, bool has_q, A* gradient) const;

  // Adds to the moments at hand those of `rows`, a band that begins at row y; a norm that has no statistics needs none.
  void add_moments(int which, const Plane<A>& band, int64_t y, const View<A>& rows) const;
  void settle_moments(int which, A* statistics) const;
  void measure(int which, const Stored<A>& map, A* statistics) const;
  void normalise(int which, const Stored<A>& point, const A* statistics, const View<A>& out) const;
  void activate(bool y, const Trace<A>& trace, const Plane<A>& band, int64_t at) const;
  // The half y of (1) from the workspace.
  void make_y(const Trace<A>& trace, bool measured) const;
  // The means that the derivative of a norm needs, and the gradients of its parameters; the cotangent is scaled. The
  // norm's standardised input is (x - origin) * unit. Adds to `total`, if given, the inner product of its result and
  // the cotangent.
  void settle(int which, const Stored<A>& x, const A* origin, const A* unit, const Stored<A>& cotangent, A scale,
              A* gradients, double* total = nullptr) const;
  // out = sign times the cotangent of h for the cotangent `bar` of the slope.
  void pull_half(bool y, const Trace<A>& trace, const Cotangent<A>& bar, A sign, A* gradients,
                 const View<A>& out) const;

  View<A> y_hat_, z_hat_, p_, q_;
  int64_t width_ = 0;
  A *sums_ = nullptr, *means_ = nullptr, *scratch_ = nullptr, *band_ = nullptr;
  A *one_ = nullptr, *other_ = nullptr;  // bands that have been widened
  Rounded hat_, bar_;
  bfloat16* tile_scratch_ = nullptr;
};

}  // namespace fastode::resident

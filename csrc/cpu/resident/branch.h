// A branch, run forwards and backwards on resident samples by the primitives of conv.h and norm.h. Every scheme is a
// few calls of the four sweeps here: value, tangent, cotangent, and the second-order cotangent.
//
// A sweep is a series of segments, one convolution each. Between segments a batch norm in training needs every sample;
// nothing else does. So with sample-local norms an executor takes a few samples through the whole program while they
// stay in the cache, and with batch statistics it takes all samples through one segment after the other, in parallel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <utility>
#include <vector>

#include "conv_bf16.h"
#include "norm.h"

namespace fastode::resident {

enum NormMode : int64_t { kNoNorm = 0, kGroupNorm, kBatchNorm, kFixedNorm };

template <class A>
struct UnitSpec {
  int64_t norm = kNoNorm, groups = 1;
  double eps = 0;
  Unary<A> act;
  bool has_conv = false;
  ConvShape shape = {};
  int64_t in_channels = 0, out_channels = 0;
  const A *weight = nullptr, *bias = nullptr;  // rows
  const A *mean = nullptr, *rstd = nullptr;    // rows, where the statistics are fixed or there is no norm
  const A *forward = nullptr, *backward = nullptr, *conv_bias = nullptr;
  // Where the gradients of norm weight, norm bias, convolution weight and bias begin in a worker's accumulators, or -1.
  int64_t weight_at = -1, bias_at = -1, conv_at = -1, conv_bias_at = -1;

  bool measured() const { return norm == kGroupNorm || norm == kBatchNorm; }
};

template <class A>
struct BranchSpec {
  std::vector<UnitSpec<A>> units;
  int64_t halo = 0, blocks = 0;  // blocks: of the widest map
  int64_t gradients = 0;         // elements of one worker's accumulators
  const A* zeros = nullptr;      // a row
  bool couples_samples = false;
  bool narrow = false;  // convolutions multiply in bfloat16, on tiles

  int64_t lanes_of(const UnitSpec<A>& unit) const { return blocks_of<A>(unit.in_channels) * kLanes<A>; }
};

inline constexpr int64_t kGroup = 8;  // samples in a range at most

// Runs a segment on ranges of samples.
template <class A>
struct Executor {
  int64_t samples, workers, group;  // `group` samples at most are in one range
  int64_t tile = 0;                 // the batch's sample that is the first here
  A* gradients = nullptr;
  int64_t gradient_stride = 0;

  A* gradients_of(const Range& range) const { return gradients + range.worker * gradient_stride; }

  template <class F>
  void each(const F& f) const {
    if (workers == 1 && samples <= group) return f(Range{0, tile, 0, samples});
    const auto work = [&](int64_t w) {
      const int64_t end = (w + 1) * samples / workers;
      for (int64_t n = w * samples / workers; n < end; n += group) f(Range{w, tile, n, std::min(group, end - n)});
    };
    if (workers == 1) return work(0);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) work(w);
    });
  }
};

// scale * (what a sweep gives) + sum of coefficient * map
template <class A>
struct Mix {
  A scale = 1;
  std::vector<std::pair<A, Map<A>>> terms = {};

  Combine<A> at(const Range& range, int64_t i) const {
    Combine<A> combine;
    combine.scale = scale;
    for (const auto& [coefficient, map] : terms) combine.add(coefficient, map.at(range, i));
    return combine;
  }
};

template <class A>
struct Rows {
  A* base = nullptr;
  int64_t stride = 0;  // 0: one row for all samples
  Extent extent = Extent::kTile;

  A* at(const Range& range, int64_t i) const {
    return base + (range.first + i + (extent == Extent::kBatch ? range.tile : 0)) * stride;
  }
};

// Memory of the batch, piece by piece in tensors of their own. Written by a forward program and found again, in the
// same order, by the backward one; `rewind` begins anew with the pieces that are there.
class Store {
 public:
  explicit Store(const torch::stable::Tensor& like, std::vector<torch::stable::Tensor> pieces = {})
      : like_(like), pieces_(std::move(pieces)) {}

  template <class A>
  A* take(int64_t length) {
    if (next_ == pieces_.size()) {
      const auto type =
          std::is_same_v<A, double> ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
      pieces_.push_back(torch::stable::new_empty(like_, torch::headeronly::IntHeaderOnlyArrayRef(&length, 1), type));
    }
    return static_cast<A*>(pieces_[next_++].data_ptr());
  }

  void rewind() { next_ = 0; }
  const std::vector<torch::stable::Tensor>& pieces() const { return pieces_; }

 private:
  const torch::stable::Tensor& like_;
  std::vector<torch::stable::Tensor> pieces_;
  size_t next_ = 0;
};

// Where a program's memory comes from.
struct Memory {
  Arena& arena;   // of one tile
  Store* kept;    // of the batch, for what forward leaves to backward; null: nothing is left
  Store* own;     // of the batch, where a tile is the batch; else null
  int64_t batch;  // samples of the batch

  // `length` elements for each sample of the tile or, if they are kept, of the batch; `blocks` and more as for a map.
  template <class A>
  std::pair<A*, Extent> take(int64_t length, int64_t samples, bool keep) const {
    if (keep && kept) return {kept->take<A>(length * batch), Extent::kBatch};
    if (own) return {own->take<A>(length * samples), Extent::kTile};
    return {arena.take<A>(length * samples), Extent::kTile};
  }
};

// What one evaluation of the branch keeps for its derivatives: every unit's input and statistics.
template <class A>
struct Evaluation {
  std::vector<Map<A>> inputs;
  std::vector<Rows<A>> mean, rstd;
  A* statistics = nullptr;  // if set: mean and biased variance [2, C] of every batch norm, one after the other
};

enum class Need { kValue, kCotangent, kSecond };

template <class A>
class Branch {
 public:
  Branch(const BranchSpec<A>& spec, const Plane<A>& plane, const Executor<A>& executor, const Memory& memory, Need need)
      : spec_(spec), plane_(plane), executor_(executor) {
    Arena& arena = memory.arena;
    const size_t units = spec.units.size();
    active_ = temporary(arena);
    sums_ = rows(arena, kSums * width());
    totals_ = arena.take<double>(kSums * width());
    if (spec.narrow) take_tiles(arena, need);
    if (need != Need::kValue) {
      n_ = map(memory);
      g_ = temporary(arena);
      mean_n_ = rows(arena, width()), mean_xn_ = rows(arena, width());
    }
    if (need == Need::kSecond) {
      m_ = map(memory);
      tangent_active_ = temporary(arena), tangent_g_ = temporary(arena);
      tangents_.resize(units), mean_t_.resize(units), mean_xt_.resize(units);
      for (size_t j = 0; j < units; ++j) {
        if (j > 0) tangents_[j] = map(memory, false, blocks_of<A>(spec.units[j].in_channels));
        mean_t_[j] = rows(arena, width()), mean_xt_[j] = rows(arena, width());
      }
      mean_c_ = rows(arena, width()), mean_xc_ = rows(arena, width());
    }
  }

  // A map of the tile's samples; with `keep` one that backward finds again, if the memory has a place for such.
  Map<A> map(const Memory& memory, bool keep = false, int64_t blocks = 0) {
    if (blocks == 0) blocks = spec_.blocks;
    const int64_t stride = blocks * plane_.size;
    const auto [base, extent] = memory.take<A>(stride, executor_.samples, keep);
    made_.push_back({base, stride, blocks, extent, 0, plane_.padded(base)});
    return made_.back();
  }

  Evaluation<A> evaluation(const Memory& memory, bool keep = false) {
    Evaluation<A> e;
    for (const UnitSpec<A>& unit : spec_.units) {
      e.inputs.push_back(e.inputs.empty() ? Map<A>{} : map(memory, keep, blocks_of<A>(unit.in_channels)));
      for (auto* to : {&e.mean, &e.rstd}) {
        if (!unit.measured()) {
          to->push_back({const_cast<A*>(to == &e.mean ? unit.mean : unit.rstd), 0});
        } else if (unit.norm == kBatchNorm) {
          to->push_back({keep && memory.kept ? memory.kept->take<A>(width()) : memory.arena.take<A>(width()), 0});
        } else {
          const auto [base, extent] = memory.take<A>(width(), executor_.samples, keep);
          to->push_back({base, width(), extent});
        }
      }
    }
    return e;
  }

  // Says which samples of the batch the next sweeps are about.
  void set_tile(int64_t first, int64_t samples) { executor_.tile = first, executor_.samples = samples; }

  // Zeroes the halos of the maps: of a tile's once, before the first sweep, and of kept ones tile by tile.
  void clear_halos(bool kept) const {
    executor_.each([&](const Range& range) {
      for (const Map<A>& map : made_) {
        if ((map.extent == Extent::kBatch) != kept) continue;
        for (int64_t i = 0; i < (map.extent == Extent::kRange ? map.per_worker : range.count); ++i)
          clear_halo(plane_, map.at(range, i), map.blocks);
      }
    });
  }

  template <class F>
  void each(const F& f) const {
    executor_.each(f);
  }

  void combine(const Map<A>& out, const Mix<A>& mix) const {
    executor_.each([&](const Range& range) {
      for (int64_t i = 0; i < range.count; ++i) combine_maps(plane_, out.blocks, out.at(range, i), mix.at(range, i));
    });
  }

  // out = mix(f(in)); without `out`, everything but the last convolution.
  void value(Evaluation<A>& e, const Map<A>& in, const Map<A>* out, const Mix<A>& mix) const;
  // out = mix(J t), at the inputs of `e`.
  void tangent(const Evaluation<A>& e, const Map<A>& t, const Map<A>& out, const Mix<A>& mix);
  // out = mix(J^T cotangent); with `parameters` their gradients are added to the worker's accumulators.
  void cotangent(const Evaluation<A>& e, const Map<A>& cotangent, const Map<A>& out, const Mix<A>& mix,
                 bool parameters) const;
  // out = mix(gradient of <v, f> + <q, J t>), t being the last tangent sweep's.
  void second(const Evaluation<A>& e, const Map<A>& v, const Map<A>& q, const Map<A>& out, const Mix<A>& mix,
              bool parameters) const;

 private:
  static constexpr int64_t kSums = 5;

  int64_t width() const { return spec_.blocks * kLanes<A>; }

  Map<A> temporary(Arena& arena) {
    const int64_t stride = spec_.blocks * plane_.size;
    A* base = arena.take<A>(stride * executor_.workers * executor_.group);
    made_.push_back({base, stride, spec_.blocks, Extent::kRange, executor_.group, plane_.padded(base)});
    return made_.back();
  }
  Rows<A> rows(Arena& arena, int64_t length) { return {arena.take<A>(length * executor_.samples), length}; }

  // Per worker, for convolutions on tiles: a bfloat16 map, and where there are weight gradients their scratch.
  void take_tiles(Arena& arena, Need need) {
    if constexpr (std::is_same_v<A, float>) {
      const int64_t pairs = (need == Need::kSecond ? 2 : 1) * executor_.group;
      for (const UnitSpec<A>& unit : spec_.units) {
        if (!unit.has_conv) continue;
        const int64_t in = unit.in_channels, out = unit.out_channels;
        narrow_stride_ = std::max(narrow_stride_, Narrow(plane_, std::max(in, out)).elements());
        if (spec_.gradients > 0 && need != Need::kValue)
          tile_scratch_stride_ = std::max(tile_scratch_stride_, tile_scratch_size(plane_, in, out, pairs));
      }
      narrow_stride_ = divide_up(narrow_stride_, 32) * 32;
      narrow_ = arena.take<bfloat16>(narrow_stride_ * executor_.workers);
      tile_scratch_ = arena.take<char>(tile_scratch_stride_ * executor_.workers);
    }
  }

  // out = combine(conv(act(norm(input j))) + bias), and of the tangent; out = combine(transposed conv(in)).
  void convolve_input(const Evaluation<A>& e, size_t j, const Range& range, int64_t i, const View<A>& out,
                      const Combine<A>& combine) const;
  void convolve_tangent(const Evaluation<A>& e, size_t j, const Range& range, int64_t i, const View<A>& out,
                        const Combine<A>& combine) const;
  void convolve_back(const UnitSpec<A>& unit, const Range& range, const View<A>& in, const View<A>& out) const;
  void add_weight_gradient(const UnitSpec<A>& unit, const Range& range, const GradientPair<A>* pairs,
                           int64_t count) const;

  NormRows<A> rows_of(const Evaluation<A>& e, size_t j, const Range& range, int64_t i) const;
  void activate_input(const Evaluation<A>& e, size_t j, const Range& range, int64_t i, const View<A>& out,
                      const Combine<A>& mix) const;
  void activate_tangent(const Evaluation<A>& e, size_t j, const Range& range, int64_t i, const View<A>& out,
                        const Combine<A>& mix) const;

  // The statistics of unit j's input, from its channels' moments in `sums_`: of one sample, or of all at the barrier.
  void measure(const Evaluation<A>& e, size_t j, const Range& range, int64_t i) const;
  void measure_batch(const Evaluation<A>& e, size_t j) const;
  // The means that the derivative of unit j's norm needs, from the channel sums in `sums_`; likewise.
  void settle(size_t j, const Range& range, int64_t i, bool weighted, std::initializer_list<Rows<A>> means) const;
  void settle_batch(size_t j, bool weighted, std::initializer_list<Rows<A>> means) const;
  void sum_tangent(const Evaluation<A>& e, size_t j, const Range& range, int64_t i) const;

  BranchSpec<A> const& spec_;
  Plane<A> plane_;
  Executor<A> executor_;
  std::vector<Map<A>> made_;
  Map<A> active_, tangent_active_, g_, tangent_g_, n_, m_;
  bfloat16* narrow_ = nullptr;
  char* tile_scratch_ = nullptr;
  int64_t narrow_stride_ = 0, tile_scratch_stride_ = 0;
  double* totals_;
  Rows<A> sums_, mean_n_, mean_xn_, mean_c_, mean_xc_;
  std::vector<Map<A>> tangents_;
  std::vector<Rows<A>> mean_t_, mean_xt_;
};

}  // namespace fastode::resident

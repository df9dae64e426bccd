// A branch, run forwards and backwards on resident samples by the primitives of conv.h and norm.h. Every scheme is a
// few calls of the four sweeps here: value, tangent, cotangent, and the second-order cotangent. A sweep records a
// series of segments, one convolution each; memory.h says when they run.
#pragma once

#include <initializer_list>
#include <utility>
#include <vector>

#include "memory.h"
#include "norm.h"
#include "strided.h"
#include "winograd.h"

namespace fastode::resident {

template <class A>
struct UnitSpec {
  int64_t norm = kNoNorm, groups = 1;
  double eps = 0;
  Unary<A> act;
  bool has_conv = false;
  ConvShape shape = {};  // without a convolution its stride and kernel are those of a mean over windows
  bool mean_of = false;
  bool winograd = false, winograd_gradient = false;  // how its convolution is done, and its weight gradient
  KernelView kernels;                                // where its weights are, if that is in bfloat16
  int64_t in_channels = 0, out_channels = 0;
  const A *weight = nullptr, *bias = nullptr;  // rows
  const A *mean = nullptr, *rstd = nullptr;    // rows, where the statistics are fixed or there is no norm
  const A *forward = nullptr, *backward = nullptr, *conv_bias = nullptr;
  const A* plane = nullptr;  // what its convolution adds, times the time: a compact map
  int64_t moments_at = -1;   // where `add_moments` of its image's cotangent begins in an evaluation's
  // Where the gradients of norm weight, norm bias, convolution weight and bias begin in a part's accumulators, or -1.
  int64_t weight_at = -1, bias_at = -1, conv_at = -1, conv_bias_at = -1;

  bool measured() const { return norm == kGroupNorm || norm == kBatchNorm; }
  // How its convolution of bfloat16 maps, or the pull-back, is filtered.
  Filtering filtering(bool back) const {
    if (shape.stride == 1) return Filtering::kStraight;
    return back ? Filtering::kDoubling : Filtering::kHalving;
  }
  // Whether a convolution, or a mean, follows norm and activation.
  bool moves() const { return has_conv || mean_of; }
  template <class P>
  P plane_after(const P& in) const {
    if (!moves() || (has_conv && shape.stride == 1)) return in;
    const auto side = [&](int64_t before, int64_t kernel) {
      return (before - (has_conv ? 1 : kernel)) / shape.stride + 1;
    };
    return {side(in.height, shape.kernel_h), side(in.width, shape.kernel_w), in.halo};
  }
};

template <class A>
struct BranchSpec {
  std::vector<UnitSpec<A>> units;
  int64_t halo = 0, blocks = 0;               // blocks: of the widest map
  int64_t gradients = 0;                      // elements of one part's accumulators
  const A *zeros = nullptr, *ones = nullptr;  // rows
  bool couples_samples = false;
  bool narrow = false;  // maps are stored in bfloat16, and convolutions multiply on tiles

  int64_t channels() const { return blocks * kLanes<A>; }  // of the widest map, in whole vectors
  int64_t lanes_of(const UnitSpec<A>& unit) const { return blocks_of<A>(unit.in_channels) * kLanes<A>; }
};

// scale * (what a sweep gives) + sum of coefficient * map
template <class T>
struct Mix {
  using A = Number<T>;
  A scale = 1;
  std::vector<std::pair<A, Map<T>>> terms = {};

  // Its maps and these.
  std::vector<Map<T>> with(std::vector<Map<T>> maps) const {
    for (const auto& [coefficient, map] : terms) maps.push_back(map);
    return maps;
  }

  Combine<T> at(const Range& range, int64_t i) const {
    Combine<T> combine;
    combine.scale = scale;
    for (const auto& [coefficient, map] : terms) combine.add(coefficient, map.at(range, i));
    return combine;
  }
};

// One unit of an evaluation: its number, input and statistics. Segments capture it rather than the evaluation, whose
// vectors would be copied for each.
template <class T>
struct Passed {
  size_t unit;
  Map<T> input;
  Rows<Number<T>> mean, rstd, groups;
  Number<T> time = 0;
  Number<T>* moments = nullptr;
  int64_t moments_stride = 0;
};

// What one evaluation of the branch leaves for its derivatives: every unit's input and statistics.
template <class T>
struct Evaluation {
  using A = Number<T>;
  std::vector<Map<T>> inputs;  // empty ones are not held
  std::vector<Map<T>> backs;   // if kept: what its pull-back brings through each unit's convolution; empty ones are not
  std::vector<Rows<A>> mean, rstd;
  std::vector<Rows<A>> groups;  // if kept: mean and rstd of each group of a group norm, [2, groups]
  A* statistics = nullptr;      // if set: mean and biased variance [2, C] of every batch norm, one after the other
  bool measured = false;        // its statistics are known
  bool spent = false;           // the next sweep back is its last and may write over its inputs behind the first
  A time = 0;                   // at which it is
  A* moments = nullptr;         // if set: where a cotangent sweep adds those of the units that see the time
  int64_t moments_stride = 0;   // from a part's to the next one's

  Passed<T> at(size_t unit) const {
    return {unit, inputs[unit], mean[unit], rstd[unit], groups[unit], time, moments, moments_stride};
  }
};

// Means that a norm's derivative needs: of each sample for a group norm, one row for a batch norm.
template <class A>
struct Means {
  Rows<A> each, all;

  const Rows<A>& of(const UnitSpec<A>& unit) const { return unit.norm == kBatchNorm ? all : each; }
};

// Where a cotangent sweep adds scale * <image, f>, for each part of the batch.
template <class T>
struct Along {
  double scale = 0;
  double* sum = nullptr;  // null: it does not
  int64_t stride = 0;
};

enum class Need { kValue, kCotangent, kSecond };

// Its maps are stored as T.
template <class T>
class Branch {
 public:
  using A = Number<T>;

  // `gradients` [the schedule's parts, spec.gradients], which hold anything at first, or null; `input`: the plane of
  // its input, that of the memory where a branch keeps the shape.
  Branch(const BranchSpec<A>& spec, Schedule& schedule, Memory<T>& memory, A* gradients, Need need,
         const Plane<A>& input);

  // With `keep` its statistics are left to backward, or found there.
  Evaluation<T> evaluation(bool keep);
  // Gives each input but the first a place where backward finds it again.
  void keep_inputs(Evaluation<T>& e);
  // Where every unit has a convolution: gives what the pull-back brings through each of them such a place. One that the
  // branch begins with goes straight into the result.
  void keep_backs(Evaluation<T>& e);
  // Bytes that an evaluation leaves to backward, with its inputs behind the first or without, and so its `backs`.
  int64_t room(bool inputs, bool backs = false) const;
  // Gives all inputs but the first, and its `backs`, back, and forgets them.
  void release(Evaluation<T>& e);
  Map<T> map() { return memory_.take(blocks_, planes_[0]); }
  int64_t input_blocks() const { return blocks_of<A>(spec_.units.front().in_channels); }
  int64_t result_blocks() const { return blocks_of<A>(spec_.units.back().out_channels); }
  // Those of no norm.
  NormRows<A> plain_rows() const {
    const A *zeros = spec_.zeros, *ones = spec_.ones;
    return {zeros, ones, ones, zeros, zeros, zeros, zeros, zeros, zeros, zeros, false};
  }
  // Whether a norm alone, or nothing, follows its last convolution.
  bool ends_in_norm() const {
    const UnitSpec<A>& last = spec_.units.back();
    return !last.moves() && last.act.kind == kIdentity;
  }
  size_t last() const { return spec_.units.size() - 1; }
  NormRows<A> rows_of(const Passed<T>& at, const Range& range, int64_t i) const;
  // The plane of its output.
  const Plane<A>& result_plane() const { return planes_.back(); }

  // After all its sweeps: sums that none of them began are zero.
  void close_sums();

  void combine(const Map<T>& out, const Mix<T>& mix);
  // out = mix(f(in)); without `out`, everything but the last convolution. Units' inputs are held if `hold` says so.
  void value(Evaluation<T>& e, const Map<T>& in, const Map<T>* out, const Mix<T>& mix, bool hold);
  // out = mix(J t), at the inputs of `e`.
  void tangent(const Evaluation<T>& e, const Map<T>& t, const Map<T>& out, const Mix<T>& mix);
  // mix(J^T image), in `out` or, if that is null, in a map from the memory. With `parameters` their gradients are added
  // to the part's accumulators. The image is read before anything is written; the mix's terms are read, pixel by
  // pixel, as the result is written. Without `point` only the parameters' gradients are wanted.
  Map<T> cotangent(const Evaluation<T>& e, const Mix<T>& image, const Map<T>* out, const Mix<T>& mix, bool parameters,
                   const Along<T>& along = {}, bool point = true);
  // Whether a cotangent sweep can find <image, f> `along` its way. It can where the last unit's activation has
  // a(z) = a'(z) z: then <image, f>, less the bias' part, is <z's cotangent, z>, and the norm's sums hold that.
  bool finds_image() const;
  // mix(gradient of <v, f> + <q, J t>) for the t of the last tangent sweep, whose maps it gives back. It writes over q
  // where the samples are coupled, or, where the pull-back of q has left them, over the evaluation's `backs`.
  Map<T> second(const Evaluation<T>& e, const Map<T>& v, const Map<T>& q, const Mix<T>& mix, bool parameters);

  // Queues f, which goes over these maps.
  template <class F>
  void each(const std::vector<Map<T>>& maps, F&& f) {
    std::vector<Touched> touched;
    for (const Map<T>& map : maps)
      if (schedule_.looks_ahead() && map && map.extent == Extent::kBatch)
        touched.push_back({reinterpret_cast<const char*>(map.view.at), map.stride * static_cast<int64_t>(sizeof(T))});
    schedule_.each(std::forward<F>(f), touched);
  }
  // Queues f(range, n, image) for every sample n of a range; the image is that of an evaluation whose inputs are held.
  template <class F>
  void each_image(const Evaluation<T>& e, const F& f) {
    each({e.inputs.back()}, [=, this, at = e.at(spec_.units.size() - 1)](const Range& range) {
      const Map<T> image = fit(g_.back(), spec_.units.size(), spec_.units.back().out_channels, range);
      convolve_input(at, range, image, {});
      for (int64_t n = 0; n < range.count; ++n) f(range, n, image.at(range, n));
    });
  }
  const Plane<A>& plane() const { return memory_.plane; }
  Memory<T>& memory() { return memory_; }

 private:
  static constexpr int64_t kSums = 5;

  int64_t width() const { return spec_.channels(); }
  template <class U>
  U* scratch_of(const Range& range) const {
    return reinterpret_cast<U*>(scratch_ + range.worker * scratch_stride_);
  }
  A* gradients_of(const Range& range) const { return gradients_ + range.part * spec_.gradients; }
  // Whether the range's part has no sum of the gradient of unit j's weights yet, which it has from now on.
  bool begins(size_t j, const Range& range) const {
    return !std::exchange(begun_[range.part * spec_.units.size() + j], true);
  }
  void clear_rows();
  Means<A> means();
  // Whether a sweep writes over a map that it has read: one of the whole batch, to save as much memory.
  bool takes_over(const Map<T>& map) const { return memory_.coupled && !map.pinned && map.blocks == spec_.blocks; }
  // Whether `keep_backs` gives unit j a place.
  bool keeps_back(size_t j) const {
    return (j > 0 || !starts_straight()) &&
           std::all_of(spec_.units.begin(), spec_.units.end(), [](const UnitSpec<A>& unit) { return unit.has_conv; });
  }
  // The mix with no more terms than a combination takes. `made` gets the maps that partial sums lie in.
  Mix<T> few(Mix<T> mix, std::vector<Map<T>>& made);
  void give(const std::vector<Map<T>>& maps);
  void take_scratch(Need need);
  // Whether unit j's convolution reads its input as it is.
  bool goes_straight(size_t j) const {
    const UnitSpec<A>& unit = spec_.units[j];
    return unit.has_conv && unit.norm == kNoNorm && unit.act.kind == kIdentity && !spec_.narrow;
  }
  // Whether the branch begins with a convolution.
  bool starts_straight() const {
    const UnitSpec<A>& unit = spec_.units[0];
    return unit.has_conv && unit.norm == kNoNorm && unit.act.kind == kIdentity;
  }
  // Whether a cotangent sweep ends in the first unit's convolution alone, which writes every pixel of the mix.
  bool begins_straight(const Mix<T>& mix) const {
    const ConvShape& shape = spec_.units[0].shape;
    return starts_straight() &&
           (mix.terms.empty() || shape.stride == 1 || std::min(shape.kernel_h, shape.kernel_w) > 1);
  }
  // For the input of unit j, with a halo where that goes straight into a convolution and is not held.
  Map<T> input_map(size_t j, bool hold);
  // A padded map as one of so many channels, its halo zero; on the plane of unit j's input.
  Map<T> fit(const Map<T>& padded, size_t j, int64_t channels, const Range& range) const;
  // Whether the pixels of each parity lie apart where unit j's convolution reads them.
  bool apart(size_t j) const {
    const UnitSpec<A>& unit = spec_.units[j];
    return spec_.narrow && unit.has_conv && unit.shape.stride == 2 && !unit.winograd;
  }
  // What the convolution of a unit, or its mean, reads: a map for its input, and that filled for sample i.
  Map<T> active_map(size_t j, const Range& range) const {
    return fit(active_[j], apart(j) ? j + 1 : j, spec_.units[j].in_channels, range);
  }
  void activate(const Passed<T>& at, const Range& range, int64_t i, const Map<T>& active) const;
  // Where a cotangent sweep puts every unit's norm's cotangent: in `whole`, or over the next unit's input if that is
  // not needed any more. The first is left out where the sweep ends straight, the last one where it is bare.
  std::vector<Map<T>> cotangent_places(const Evaluation<T>& e, bool ends_straight, bool bare, Map<T>& whole);
  // Unit j's convolution, or what pulls it back.
  void convolve_jobs(size_t j, bool back, const ConvJob<T>* jobs, const Range& range, bool bias) const;

  // On all samples of a range. out = combine(conv(act(norm(input j))) + bias), and of the tangent; n = transposed
  // mix(transposed conv(g)). Without a convolution there is the rest.
  void convolve_input(const Passed<T>& at, const Range& range, const Map<T>& out, const Mix<T>& mix) const;
  void convolve_tangent(const Passed<T>& at, const Range& range, const Map<T>& t, const Map<T>& out,
                        const Mix<T>& mix) const;
  void convolve_back(size_t j, const Range& range, const Map<T>& g, const Map<T>& n, const Mix<T>& mix = {}) const;
  // Accumulates the weight's and bias' gradients from g and unit j's input, and, with `t`, from those of the tangent.
  void add_gradients(const Passed<T>& at, const Range& range, const Map<T>& g, const Map<T>* t,
                     const Map<T>& tangent_g) const;
  // Adds <g, bias> of the convolution behind a unit, and <n, z> from the sums of n, z's cotangent, and of n x.
  void add_bias_product(const UnitSpec<A>& unit, const Range& range, const View<T>& g, const Along<T>& along) const;
  void add_product(const UnitSpec<A>& unit, const Range& range, const A* sums, const Along<T>& along) const;
  void add_norm_gradients(const UnitSpec<A>& unit, const Range& range, const A* sums) const;

  // The statistics of unit j's input, unless they are known.
  void prepare(const Evaluation<T>& e, size_t j);
  // Those of a group norm where forward has kept them.
  void find_groups(const Evaluation<T>& e, size_t j);
  // They come from its channels' moments in `sums_`: of one sample, or of all at the barrier.
  void measure(const Passed<T>& at, const Range& range) const;
  void measure_groups(const Passed<T>& at, const Range& range, int64_t i) const;
  void measure_batch(const Evaluation<T>& e, size_t j);
  // The means that the derivative of unit j's norm needs, from the channel sums in `sums_`; likewise.
  void settle(size_t j, const Range& range, int64_t i, bool weighted, std::initializer_list<Means<A>> means) const;
  void settle_batch(size_t j, bool weighted, std::initializer_list<Means<A>> means);
  void sum_tangent(const Passed<T>& at, const Range& range, const Map<T>& t) const;

  BranchSpec<A> const& spec_;
  Schedule& schedule_;
  Memory<T>& memory_;
  std::vector<Plane<A>> planes_;  // of every unit's input, and of the output
  bool one_plane_ = true;
  const Plane<A>& plane_;  // the first
  int64_t blocks_;         // of the first plane, for any unit's input
  A* gradients_;
  mutable std::vector<uint8_t> begun_;  // whose conv_at holds sums: [part][unit]
  // Padded, as wide as the widest. Those of each plane are one map.
  std::vector<Map<T>> active_, g_;
  Map<T> tangent_active_, tangent_g_, bare_[2];
  char* scratch_ = nullptr;  // each worker's, for its convolutions
  int64_t scratch_stride_ = 0;
  std::vector<int64_t> together_;  // on each plane: how many samples' pixels take turns in what convolutions read
  bool uniform_ = true;            // all maps have as many channels
  double* totals_;
  Rows<A> sums_;
  Means<A> mean_n_, mean_xn_, mean_c_, mean_xc_;
  std::vector<Map<T>> tangents_;
  std::vector<Means<A>> mean_t_, mean_xt_;
};

}  // namespace fastode::resident

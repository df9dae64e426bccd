// One call of the skew pair on the resident engine: parameters packed, scratch allocated, samples shared out, gradients
// summed in the workers' order.
#pragma once

#include "control.h"
#include "engine.h"
#include "skew_programs.h"

namespace fastode::resident {

// The pair as the operators take it. `parameters`: W, then of each norm what is present of weight, bias, running mean
// and variance. `integers`: W's stride, the activation's code, then norm code, groups and the bits of what is present
// (as in BranchArguments) of each norm. `numbers`: gamma, the activation's p and q, then eps of each norm.
struct PairArguments {
  const std::vector<Tensor>& parameters;
  const std::vector<int64_t>& integers;
  const std::vector<double>& numbers;
};

// Which parameters' gradients are asked for.
struct Asked {
  bool weight = false, norms = false;
};

template <class A>
class PackedPair {
 public:
  // For states of y's size and dtype.
  PackedPair(const PairArguments& arguments, const Tensor& y, Asked asked);

  // The gradients of `parameters`, empty where none is asked for.
  std::vector<Tensor> gradients(const Tensor& accumulators, int64_t workers) const;

  PairSpec<A> spec;

 private:
  void read(Arena& arena, const Tensor& y, Asked asked);

  PairArguments arguments_;
  CallMemory memory_;
};

// Bytes of the next sample's maps that are prefetched; those of the sample at hand fill the rest of a core's cache.
inline constexpr int64_t kAhead = 1 << 20;

// A tensor's samples as views: in place where it has the program's type and its channels lie next to each other in
// whole vectors, else by a copy.
template <class A>
class Port {
 public:
  // With `banded` a program reads and writes bfloat16 in place, band by band.
  Port(const Tensor& tensor, Arena& arena, bool banded = false)
      : feature_(feature_of<A>(tensor)),
        rounded_(feature_of<bfloat16>(tensor)),
        plane_(feature_.height, feature_.width, 0),
        samples_(tensor.size(0)),
        element_(static_cast<int64_t>(tensor.element_size())),
        is_rounded_(tensor.scalar_type() == ScalarType::BFloat16),
        direct_(!is_rounded_ && has_vectors()),
        banded_(banded && is_rounded_ && has_vectors()) {
    if (!direct_ && !banded_)
      copy_ = plane_.compact(arena.take<A>(blocks_of<A>(feature_.channels) * plane_.pixels() * kLanes<A>));
  }

  View<A> view(int64_t n) const {
    if (!direct_) return copy_;
    return {feature_.data + n * feature_.sample, feature_.row, feature_.pixel, kLanes<A>};
  }
  View<A> load(int64_t n) const {
    if (!direct_) is_rounded_ ? load_from(rounded_, n) : load_from(feature_, n);
    return view(n);
  }
  Stored<A> stored(int64_t n) const {
    if (!banded_) return view(n);
    return Stored<A>({rounded_.data + n * rounded_.sample, rounded_.row, rounded_.pixel, kLanes<A>});
  }
  Stored<A> read(int64_t n) const { return banded_ ? stored(n) : load(n); }
  // Asks for sample n, if there is one.
  void expect(Ahead& ahead, int64_t n) const {
    if (n < samples_)
      ahead.add(reinterpret_cast<const char*>(feature_.data) + n * feature_.sample * element_,
                feature_.channels * plane_.pixels() * element_);
  }
  void store(int64_t n) const {
    if (!direct_ && !banded_)
      is_rounded_ ? store_sample(plane_, copy_, rounded_, n) : store_sample(plane_, copy_, feature_, n);
  }

 private:
  bool has_vectors() const { return feature_.channel == 1 && feature_.channels % kLanes<A> == 0; }
  template <class T>
  void load_from(const Feature<T>& from, int64_t n) const {
    load_sample<A, T>(
        plane_, {from.data, from.channels, from.height, from.width, from.sample, from.channel, from.row, from.pixel}, n,
        copy_);
  }

  Feature<A> feature_;
  Feature<bfloat16> rounded_;
  Plane<A> plane_;
  int64_t samples_, element_;
  bool is_rounded_, direct_, banded_;
  View<A> copy_;
};

// A worker's accumulators, or null where no gradient is asked for.
template <class Spec>
auto worker_gradients(const Spec& spec, const Tensor& gradients, int64_t worker) {
  using A = typename Spec::Real;
  return spec.gradients ? static_cast<A*>(gradients.data_ptr()) + worker * spec.gradients : nullptr;
}

// How a program of samples alone reads and writes their tensors.
template <class Pair>
struct PortOf;
template <class A>
struct PortOf<SkewPair<A>> {
  using Type = Port<A>;
};

struct PairCall {
  const Tensor &y, &z;
  const Tensor *y_bar, *z_bar;  // of the slopes; null: forward, or a zero cotangent
  bool backward;
  Tensor y_out, z_out;  // the slopes, or the gradients of y and z; one that is not needed is empty
  Want need;
  // Forward: signs may be kept where they say enough beside the slopes, which backward then gets as `y_end` and
  // `z_end`.
  bool results = false;
  const Tensor *y_end = nullptr, *z_end = nullptr;
};

// What forward leaves to backward, in the order in which either takes it: guides and statistics, or statistics and
// signs.
struct PairKept {
  std::vector<Tensor> traces, signs;
};

struct MarchCall {
  const Tensor& x;
  const Tensor* cotangent;  // null: forward
  Tensor out;
};

struct SolveCall {
  const Tensor& x;
  const Tensor* cotangent;  // null: forward
  Tensor out;
  bool per_sample;  // every sample takes steps of its own
  bool keep;        // what backward needs
  Through through;  // the sizes that its derivative goes through
};

// `kept` is made by a forward call and found by the backward one, in the same order; null: nothing is kept.
template <class A>
void run_pair(const PackedPair<A>& packed, const PairCall& call, PairKept* kept, const Tensor& gradients);
template <class A>
void run_march(const PackedPair<A>& packed, const March& march, const MarchCall& call, std::vector<Tensor>* kept,
               const Tensor& gradients);
// `log`: what the solves did, one behind the other; made by forward, as `kept` is.
template <class A>
void run_solve(const PackedPair<A>& packed, const Embedded& scheme, const SolveCall& call, std::vector<double>& log,
               std::vector<Tensor>& kept, const Tensor& gradients);

}  // namespace fastode::resident

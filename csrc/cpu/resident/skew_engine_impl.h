// What forward keeps for backward, and the runs over all samples. Included by one .cpp per arithmetic type.
#pragma once

#include "skew_engine.h"

namespace fastode::resident {

// The kept tensors as traces: a guide for each slope that is made, y's only if asked for, then the statistics; `make`
// creates them.
template <class A>
Traces<A> kept_traces(const SkewPair<A>& pair, const March& march, std::vector<Tensor>& kept, const Tensor& like,
                      bool make, bool y = true) {
  const int64_t samples = like.size(0);
  size_t next = 0;
  const auto take = [&](int64_t size) {
    if (make) kept.push_back(new_vector(size * samples, scalar_type<A>()));
    return static_cast<A*>(kept[next++].data_ptr());
  };
  Traces<A> traces;
  traces.samples = samples;
  for (int64_t e = 0; e < march.evaluations(); ++e) {
    const Want made = march.want(e / march.stages, e % march.stages);
    traces.y.push_back(y && made.y ? take(pair.y_size()) : nullptr);
    traces.z.push_back(made.z ? take(pair.z_size()) : nullptr);
  }
  traces.statistics = take(march.evaluations() * pair.spec.statistics);
  return traces;
}

// What the pair alone leaves to its pull-back: statistics, and either guides or the signs of the results.
template <class A>
struct KeptPair {
  Traces<A> traces;
  A *y_signs = nullptr, *z_signs = nullptr;  // of the batch; no y where it is made again
  int64_t y_size = 0, z_size = 0;            // of a sample's
};

// As kept_traces; with `by_results` there are signs.
template <class A>
KeptPair<A> kept_pair(const SkewPair<A>& pair, bool by_results, PairKept& kept, const Tensor& like, bool make) {
  static constexpr int64_t both[2] = {1, 1}, neither[2] = {0, 0};
  const bool y = !pair.spec.shape.template narrow<A>();
  KeptPair<A> found;
  const March march{1, 1, nullptr, nullptr, by_results ? neither : both};
  found.traces = kept_traces(pair, march, kept.traces, like, make, y);
  if (!by_results) return found;
  size_t next = 0;
  const auto take = [&](const Plane<A>& plane, int64_t blocks, int64_t& size) {
    size = blocks * Signs<A>(plane, nullptr).block;
    if (make) kept.signs.push_back(new_vector(size * like.size(0), scalar_type<A>()));
    return static_cast<A*>(kept.signs[next++].data_ptr());
  };
  if (y) found.y_signs = take(pair.y_plane, pair.y_blocks(), found.y_size);
  found.z_signs = take(pair.z_plane, pair.z_blocks(), found.z_size);
  return found;
}

// Runs Worker(arena) on every sample: first to count its scratch, then once in each worker.
template <class A, class Make>
void each_worker(const Tensor& like, const Make& make) {
  const int64_t samples = like.size(0), workers = workers_for(samples);
  Arena count(nullptr);
  make(count, 0);
  const int64_t bytes = count.used();
  CallMemory memory;
  char* scratch = static_cast<char*>(memory.take(workers * bytes));
  std::vector<Arena> arenas;
  for (int64_t w = 0; w < workers; ++w) arenas.emplace_back(scratch + w * bytes);
  in_parallel(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      auto worker = make(arenas[w], w);
      for (int64_t n = w * samples / workers; n < (w + 1) * samples / workers; ++n) worker(n);
    }
  });
  for (const Arena& arena : arenas) arena.check();
}

template <class A>
struct MarchWorker {
  SkewMarch<A> march;
  Port<A> x, cotangent, out;
  A* gradients;
  bool backward;

  void operator()(int64_t n) {
    Ahead ahead(kAhead);
    out.expect(ahead, n);
    x.expect(ahead, n + 1);
    if (backward) cotangent.expect(ahead, n + 1);
    march.expect(ahead, n);
    const View<A> from = x.load(n);
    if (backward)
      march.backward(from, n, cotangent.load(n), out.view(n), gradients);
    else
      march.forward(from, n, out.view(n));
    march.expect_nothing();
    out.store(n);
  }
};

template <class A>
void run_march(const PackedPair<A>& packed, const March& march, const MarchCall& call, std::vector<Tensor>* kept,
               const Tensor& gradients) {
  const bool backward = call.cotangent != nullptr;
  Traces<A> traces;
  // One evaluation of a narrow W z is computed again faster than its guide is written and read.
  if (packed.spec.shape.template narrow<A>() && march.evaluations() == 1 && !march.want(0, 0).z) kept = nullptr;
  if (kept) {
    Arena none(nullptr);
    traces = kept_traces(SkewPair<A>(packed.spec, none, false), march, *kept, call.x, !backward);
  }
  each_worker<A>(call.x, [&](Arena& arena, int64_t w) {
    return MarchWorker<A>{SkewMarch<A>(packed.spec, march, arena, kept ? &traces : nullptr, backward),
                          Port<A>(call.x, arena),
                          Port<A>(backward ? *call.cotangent : call.out, arena),
                          Port<A>(call.out, arena),
                          worker_gradients(packed.spec, gradients, w),
                          backward};
  });
}

// The pair alone, as a solution of one evaluation whose slopes are the result.
template <class A>
class PairWorker {
 public:
  PairWorker(const PairSpec<A>& spec, const PairCall& call, const KeptPair<A>* kept, Arena& arena, A* gradients)
      : pair_(spec, arena, call.backward),
        need_(call.need),
        y_(call.y, arena, bool(spec.tiles)),
        z_(call.z, arena, bool(spec.tiles)),
        y_bar_(call.y_bar ? *call.y_bar : call.y, arena, bool(spec.tiles)),
        z_bar_(call.z_bar ? *call.z_bar : call.z, arena, bool(spec.tiles)),
        y_out_(call.need.y ? call.y_out : call.y, arena, bool(spec.tiles)),
        z_out_(call.need.z ? call.z_out : call.z, arena, bool(spec.tiles)),
        y_end_(call.y_end ? *call.y_end : call.y, arena, bool(spec.tiles)),
        z_end_(call.z_end ? *call.z_end : call.z, arena, bool(spec.tiles)),
        has_{call.y_bar != nullptr, call.z_bar != nullptr},
        backward_(call.backward),
        found_(kept && call.backward),
        gradients_(gradients) {
    // Forward makes s where the result goes, unless that is rounded.
    apart_ = backward_ || spec.tiles;
    const bool guides = apart_ || !spec.tells;
    if (apart_ && !spec.tells) s_ = pair_.maps(arena);
    if (kept)
      traces_ = kept->traces, kept_ = *kept;
    else
      traces_ = {{nullptr}, {guides ? arena.take<A>(pair_.z_size()) : nullptr}, arena.take<A>(spec.statistics), 0};
    if (guides && !traces_.y[0]) y_guide_ = backward_ ? pair_.guide_room() : pair_.y_map(arena);
  }

  void operator()(int64_t n) {
    Ahead ahead(kAhead);
    expect(ahead, n);
    const Point<A> point{y_.read(n), z_.read(n)};
    Trace<A> trace;
    const Both<A> end{y_out_.view(n), z_out_.view(n)}, &made = apart_ ? s_ : end;
    const auto guide = [&](bool y, const View<A>& none) {
      A* base = y ? traces_.y[0] : traces_.z[0];
      if (!base) return none.at ? none : y ? made.y : made.z;
      return y ? pair_.y_plane.compact(traces_.of(base, pair_.y_size(), n))
               : pair_.z_plane.compact(traces_.of(base, pair_.z_size(), n));
    };
    trace.guide = {guide(true, y_guide_), guide(false, {})};
    trace.s = pair_.spec.tells ? trace.guide : made;
    if (kept_.y_signs) trace.y_signs = {pair_.y_plane, kept_.y_signs + n * kept_.y_size};
    if (kept_.z_signs) trace.z_signs = {pair_.z_plane, kept_.z_signs + n * kept_.z_size};
    if (backward_ && kept_.y_signs) trace.s.y = y_end_.load(n);
    if (backward_ && kept_.z_signs) trace.s.z = z_end_.load(n);
    trace.statistics = traces_.of(traces_.statistics, pair_.spec.statistics, n);
    if (found_) {
      const bool remakes_y = !traces_.y[0] && !kept_.y_signs;
      if (remakes_y) pair_.remake_y(point, trace);
      trace.made = {!remakes_y, true};
      pair_.restore(trace);
      trace.made = {true, true};
    } else {
      pair_.evaluate(point, trace, {true, true});
    }
    backward_ ? pull(point, trace, n) : put(trace, n);
    if (need_.y) y_out_.store(n);
    if (need_.z) z_out_.store(n);
  }

 private:
  // Has the convolutions prefetch the maps of sample n and of the next one, in the order in which they are needed.
  void expect(Ahead& ahead, int64_t n) {
    const bool late = backward_ && !gradients_;  // y is read at the end
    if (!backward_) traces_.expect(true, pair_, ahead, n);
    if (need_.y) y_out_.expect(ahead, n);
    if (need_.z) z_out_.expect(ahead, n);
    if (late) y_.expect(ahead, n);
    if (backward_) traces_.expect(true, pair_, ahead, n + 1);
    if (backward_ && kept_.y_signs) y_end_.expect(ahead, n + 1);
    if (backward_ && kept_.z_signs) z_end_.expect(ahead, n + 1);
    if (backward_ && has_.y) y_bar_.expect(ahead, n + 1);
    if (backward_ && has_.z) z_bar_.expect(ahead, n + 1);
    if (!late) y_.expect(ahead, n + 1);
    z_.expect(ahead, n + 1);
    traces_.expect(false, pair_, ahead, n + 1);
    pair_.ahead = &ahead;
  }

  void put(const Trace<A>& trace, int64_t n) const {
    const auto half = [&](bool y, const View<A>& s, const Signs<A>& signs, const Stored<A>& out) {
      const NormRows<A> rows = pair_.rows_of(y ? kPostY : kPostZ, trace.statistics);
      pair_.write(y, out, [&](const Plane<A>& band, int64_t at, const View<A>& to) {
        const int64_t blocks = y ? pair_.y_blocks() : pair_.z_blocks();
        if (signs.at) note_signs<A>(band, blocks, below(s, at), below(signs, at));
        apply<A>(band, blocks, rows, {}, below(s, at), to, {});
      });
    };
    half(true, trace.s.y, trace.y_signs, y_out_.stored(n));
    half(false, trace.s.z, trace.z_signs, z_out_.stored(n));
  }

  void pull(const Point<A>& point, const Trace<A>& trace, int64_t n) const {
    Cotangent<A> y_bar, z_bar;
    if (has_.y) y_bar = y_bar_.read(n);
    if (has_.z) z_bar = z_bar_.read(n);
    // The norms before W have gradients of their own, which are found on the way.
    const auto parameters = [&](int which) {
      const PairNorm<A>& norm = pair_.spec.norms[which];
      return norm.weight_at >= 0 || norm.bias_at >= 0;
    };
    Both<A> to = pair_.workspace();
    if (need_.y && !pair_.spec.tiles) to.y = y_out_.view(n);
    if (need_.z && !pair_.spec.tiles) to.z = z_out_.view(n);
    const Want left = pair_.pull(point, trace, y_bar, z_bar, gradients_,
                                 {need_.y || parameters(kPreY), need_.z || parameters(kPreZ)}, to);
    const auto finish = [&](bool y, bool here, bool needed, const Stored<A>& at, const View<A>& found,
                            const Port<A>& out) {
      if (here)
        pair_.finish(y, at, trace, found, needed ? out.stored(n) : found, {}, gradients_);
      else if (needed)
        pair_.write(y, out.stored(n), [&](const Plane<A>& band, int64_t, const View<A>& zero) {
          combine_maps<A>(band, y ? pair_.y_blocks() : pair_.z_blocks(), zero, {});
        });
    };
    finish(true, left.y, need_.y, point.y, to.y, y_out_);
    finish(false, left.z, need_.z, point.z, to.z, z_out_);
  }

  SkewPair<A> pair_;
  Traces<A> traces_;
  KeptPair<A> kept_;
  Want need_;
  Port<A> y_, z_, y_bar_, z_bar_, y_out_, z_out_, y_end_, z_end_;
  Want has_;
  bool backward_, found_, apart_ = false;
  A* gradients_;
  Both<A> s_;
  View<A> y_guide_;
};

template <class A>
void run_pair(const PackedPair<A>& packed, const PairCall& call, PairKept* kept, const Tensor& gradients) {
  KeptPair<A> found;
  if (kept) {
    Arena none(nullptr);
    const SkewPair<A> pair(packed.spec, none, false);
    const bool by_results = call.backward
                                ? !kept->signs.empty()
                                : call.results && call.y.scalar_type() == scalar_type<A>() && pair.results_tell();
    found = kept_pair(pair, by_results, *kept, call.y, !call.backward);
  }
  each_worker<A>(call.y, [&](Arena& arena, int64_t w) {
    return PairWorker<A>(packed.spec, call, kept ? &found : nullptr, arena,
                         worker_gradients(packed.spec, gradients, w));
  });
}

}  // namespace fastode::resident

// The staged engine's operators on the CPU: allocate, pick the storage type, call the kernels of norm_act.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "norm_act.h"
#include "storage.h"

namespace fastode {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

ScalarType accumulator_of(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Geometry geometry_of(const Tensor& x) { return {x.size(0), x.size(2) * x.size(3), x.size(1)}; }

// A new channels-last tensor like x with another batch.
Tensor feature_map(const Tensor& x, int64_t samples) {
  const int64_t sizes[] = {samples, x.size(1), x.size(2), x.size(3)};
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes, 4), x.scalar_type(), std::nullopt,
                              x.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor feature_map(const Tensor& x) { return feature_map(x, x.size(0)); }

Tensor vector_of(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                                  accumulator_of(x.scalar_type()));
}

Tensor statistics(const Tensor& x, int64_t norm, int64_t groups) {
  if (norm == kGroupNorm) return vector_of(x, {2, x.size(0), groups});
  return vector_of(x, {2, norm == kNoNorm ? 0 : x.size(1)});
}

template <class A>
const A* pointer_or_null(const MaybeTensor& t) {
  return t ? static_cast<const A*>(t->data_ptr()) : nullptr;
}

// Parameter gradients, with zeros where no pass over data will write them.
Tensor parameter_gradient(const Tensor& x, bool wanted, int64_t norm) {
  Tensor bar = vector_of(x, {wanted ? x.size(1) : 0});
  if (norm == kNoNorm || x.size(0) == 0) torch::stable::zero_(bar);
  return bar;
}

// The scratch of one call, in torch's memory so that its profiler sees it.
template <class T, class A = typename AccumulatorOf<T>::type>
struct Workspace {
  Tensor rows, partial;
  Scratch<A> scratch;

  Workspace(const Tensor& x, const Geometry& g)
      : rows(vector_of(x, {Workers(g.samples).count * Scratch<A>::template elements<T>(g)})),
        partial(vector_of(x, {g.samples * kMaxSums * g.channels})),
        scratch{pointer<A>(rows), Scratch<A>::template elements<T>(g), period_of<A>(g.channels), g.length(),
                pointer<A>(partial)} {}
};

template <class T>
Terms<T> terms_of(const Tensors& tensors, const double* coefs) {
  Terms<T> terms;
  terms.count = static_cast<int>(tensors.size());
  for (int k = 0; k < terms.count; ++k) {
    terms.data[k] = pointer<const T>(tensors[k]);
    terms.coefficient[k] = coefs ? static_cast<typename Terms<T>::A>(coefs[k]) : 1;
  }
  return terms;
}

template <class A>
NormAct<A> norm_act_of(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, int64_t norm,
                       int64_t groups, double eps, int64_t act, double p, double q) {
  return {static_cast<NormMode>(norm),
          norm == kGroupNorm ? groups : x.size(1),
          static_cast<A>(eps),
          act,
          {static_cast<A>(p), static_cast<A>(q)},
          pointer_or_null<A>(weight),
          pointer_or_null<A>(bias)};
}

Tensor combine(Tensors terms, Tensor coefs, int64_t act, double p, double q) {
  const Tensor& x = terms[0];
  Tensor out = feature_map(x);
  const Geometry g = geometry_of(x);
  with_storage(x.scalar_type(), [&]<class T>(T) {
    using A = typename AccumulatorOf<T>::type;
    const Workspace<T> space(x, g);
    const auto op = norm_act_of<A>(x, {}, {}, kNoNorm, 1, 0, act, p, q);
    Kernels<T>::combine(g, terms_of<T>(terms, pointer<double>(coefs)), op, space.scratch, pointer<T>(out));
  });
  return out;
}

// Two combinations, one after the other along the batch: what the stacked sweeps start from, without a copy.
Tensor combine_pair(Tensors first, Tensors second, Tensor coefs) {
  const Tensor& x = first[0];
  Tensor out = feature_map(x, 2 * x.size(0));
  const Geometry g = geometry_of(x);
  with_storage(x.scalar_type(), [&]<class T>(T) {
    using A = typename AccumulatorOf<T>::type;
    const Workspace<T> space(x, g);
    const auto op = norm_act_of<A>(x, {}, {}, kNoNorm, 1, 0, kIdentity, 0, 0);
    const double* c = pointer<double>(coefs);
    T* half = pointer<T>(out);
    Kernels<T>::combine(g, terms_of<T>(first, c), op, space.scratch, half);
    Kernels<T>::combine(g, terms_of<T>(second, c + first.size()), op, space.scratch, half + g.samples * g.length());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> norm_act(Tensors terms, Tensor coefs, MaybeTensor weight, MaybeTensor bias,
                                            MaybeTensor given, int64_t norm, int64_t groups, double eps, int64_t act,
                                            double p, double q) {
  const Tensor& x = terms[0];
  const Geometry g = geometry_of(x);
  const bool combines = coefs.numel() > 0;
  Tensor u = feature_map(x, combines ? x.size(0) : 0), a = feature_map(x);
  Tensor stats = statistics(x, given ? int64_t{kNoNorm} : norm, groups);
  const Tensor& used = given ? *given : stats;
  with_storage(x.scalar_type(), [&]<class T>(T) {
    using A = typename AccumulatorOf<T>::type;
    const Workspace<T> space(x, g);
    const auto op = norm_act_of<A>(x, weight, bias, norm, groups, eps, act, p, q);
    Kernels<T>::forward(g, terms_of<T>(terms, combines ? pointer<double>(coefs) : nullptr), op, space.scratch,
                        given.has_value(), pointer<A>(used), combines ? pointer<T>(u) : nullptr, pointer<T>(a));
  });
  return {u, a, stats};
}

std::tuple<Tensor, Tensor, Tensor> norm_act_vjp(Tensor h, Tensor cot, Tensor stats, MaybeTensor weight,
                                                MaybeTensor bias, Tensors addends, Tensor coefs, bool param_grads,
                                                int64_t norm, int64_t groups, double eps, int64_t act, double p,
                                                double q) {
  const Geometry g = geometry_of(h);
  Tensor out = feature_map(h);
  Tensor wbar = parameter_gradient(h, param_grads, norm), bbar = parameter_gradient(h, param_grads, norm);
  const bool sums = param_grads && norm != kNoNorm && g.samples > 0;
  with_storage(h.scalar_type(), [&]<class T>(T) {
    using A = typename AccumulatorOf<T>::type;
    const Workspace<T> space(h, g);
    const auto op = norm_act_of<A>(h, weight, bias, norm, groups, eps, act, p, q);
    const double* c = pointer<double>(coefs);
    Kernels<T>::vjp(g, pointer<T>(h), pointer<T>(cot), pointer<A>(stats), terms_of<T>(addends, c + 1),
                    static_cast<A>(c[0]), op, space.scratch, pointer<T>(out), sums ? pointer<A>(wbar) : nullptr,
                    sums ? pointer<A>(bbar) : nullptr);
  });
  return {out, wbar, bbar};
}

std::tuple<Tensor, Tensor, Tensor> norm_act_dual(Tensor h, Tensor t, MaybeTensor weight, MaybeTensor bias,
                                                 MaybeTensor given, int64_t norm, int64_t groups, double eps,
                                                 int64_t act, double p, double q) {
  const Geometry g = geometry_of(h);
  const int64_t coupled = norm == kFixedNorm ? int64_t{kNoNorm} : norm;
  Tensor stacked = feature_map(h, 2 * h.size(0));
  Tensor stats = statistics(h, given ? int64_t{kNoNorm} : norm, groups), tstats = statistics(h, coupled, groups);
  const Tensor& used = given ? *given : stats;
  with_storage(h.scalar_type(), [&]<class T>(T) {
    using A = typename AccumulatorOf<T>::type;
    const Workspace<T> space(h, g);
    const auto op = norm_act_of<A>(h, weight, bias, norm, groups, eps, act, p, q);
    Kernels<T>::dual(g, pointer<T>(h), pointer<T>(t), op, space.scratch, given.has_value(), pointer<A>(used),
                     pointer<A>(tstats), pointer<T>(stacked));
  });
  return {stacked, stats, tstats};
}

std::tuple<Tensor, Tensor, Tensor> norm_act_second(Tensor h, Tensor t, Tensor cot, Tensor stats, Tensor tstats,
                                                   MaybeTensor weight, MaybeTensor bias, Tensors addends, Tensor coefs,
                                                   bool param_grads, bool tangent, int64_t norm, int64_t groups,
                                                   double eps, int64_t act, double p, double q) {
  const Geometry g = geometry_of(h);
  Tensor out = feature_map(h, (tangent ? 2 : 1) * h.size(0));
  Tensor wbar = parameter_gradient(h, param_grads, norm), bbar = parameter_gradient(h, param_grads, norm);
  const bool sums = param_grads && norm != kNoNorm && g.samples > 0;
  with_storage(h.scalar_type(), [&]<class T>(T) {
    using A = typename AccumulatorOf<T>::type;
    const Workspace<T> space(h, g);
    const auto op = norm_act_of<A>(h, weight, bias, norm, groups, eps, act, p, q);
    const double* c = pointer<double>(coefs);
    Kernels<T>::second(g, pointer<T>(h), pointer<T>(t), pointer<T>(cot), pointer<A>(stats), pointer<A>(tstats),
                       terms_of<T>(addends, c + 1), static_cast<A>(c[0]), tangent, op, space.scratch, pointer<T>(out),
                       sums ? pointer<A>(wbar) : nullptr, sums ? pointer<A>(bbar) : nullptr);
  });
  return {out, wbar, bbar};
}

Tensor dots(Tensor v, Tensors terms) {
  Tensor out = vector_of(v, {static_cast<int64_t>(terms.size())});
  const Geometry g = geometry_of(v);
  with_storage(v.scalar_type(), [&]<class T>(T) {
    using A = typename AccumulatorOf<T>::type;
    const Workspace<T> space(v, g);
    Kernels<T>::dots(g, pointer<T>(v), terms_of<T>(terms, nullptr), space.scratch, pointer<A>(out));
  });
  return out;
}

}  // namespace
}  // namespace fastode

STABLE_TORCH_LIBRARY_IMPL(fastode, CPU, m) {
  m.impl("combine", TORCH_BOX(&fastode::combine));
  m.impl("combine_pair", TORCH_BOX(&fastode::combine_pair));
  m.impl("norm_act", TORCH_BOX(&fastode::norm_act));
  m.impl("norm_act_vjp", TORCH_BOX(&fastode::norm_act_vjp));
  m.impl("norm_act_dual", TORCH_BOX(&fastode::norm_act_dual));
  m.impl("norm_act_second", TORCH_BOX(&fastode::norm_act_second));
  m.impl("dots", TORCH_BOX(&fastode::dots));
}

// The resident engine's operators: a whole block, or the skew pair, in one call. Feature maps are [N, C, H, W] with any
// strides.
#include <torch/csrc/stable/library.h>

#include "resident/arguments.h"
#include "resident/chain.h"
#include "resident/skew_engine.h"

namespace fastode::resident {

template <template <class> class Program, class A, class Rule>
void run(const Call<A>& call, const Rule& rule);

int64_t group_for(int64_t samples, int64_t workers, int64_t pixels, int64_t stored, int64_t channels) {
  constexpr int64_t few = 128, many = 512;  // pixels that should share one reading of the weights
  int64_t wanted = few;
  if (stored == sizeof(bfloat16)) wanted = many;
  if (stored == sizeof(float) && kVectorBytes < 64) wanted = std::clamp(2 * channels, few, many);
  const int64_t share = std::max<int64_t>(1, divide_up(samples, workers));
  const int64_t most = std::max<int64_t>(1, std::min({kGroup, wanted / pixels, share}));
  return stored == sizeof(bfloat16) ? divide_up(share, divide_up(share, most)) : most;  // of like size
}

int64_t parts_for(int64_t samples, int64_t workers, int64_t group, int64_t bytes) {
  constexpr int64_t most = 4, room = 640 << 10;  // of one worker; bytes in all
  const int64_t each = std::min({most, samples / workers / (2 * group), room / std::max<int64_t>(1, workers * bytes)});
  return workers == 1 ? 1 : workers * std::max<int64_t>(1, each);
}

// The bit of each of a unit's tensors, in their order; running mean and variance come together.
constexpr int64_t kTensorsOfUnit[] = {kWeight, kBias, kRunning, kRunning, kConvWeight, kConvBias};

std::vector<ChainPart> parts_of(const ChainArguments& chain) {
  std::vector<ChainPart> parts(3);
  size_t unit = 0, tensor = 0;
  for (size_t k = 0; k < 3; ++k)
    for (int64_t j = 0; j < chain.lengths[k]; ++j, ++unit) {
      const int64_t* units = chain.units.data() + unit * kUnitIntegers;
      const double* numbers = chain.numbers.data() + unit * kUnitNumbers;
      parts[k].units.insert(parts[k].units.end(), units, units + kUnitIntegers);
      parts[k].numbers.insert(parts[k].numbers.end(), numbers, numbers + kUnitNumbers);
      parts[k].strides.push_back(chain.strides[unit]);
      for (const int64_t bit : kTensorsOfUnit)
        if (units[kUnitIntegers - 1] & bit) parts[k].parameters.push_back(chain.parameters[tensor++]);
    }
  return parts;
}

namespace {

Tensor new_map(const Tensor& like, int64_t channels, int64_t height, int64_t width, bool last) {
  return resident::new_map(like.scalar_type(), like.size(0), channels, height, width, last);
}

Tensor new_map(const Tensor& like, bool last) { return new_map(like, like.size(1), like.size(2), like.size(3), last); }

bool is_last(const Tensor& x) { return x.strides()[1] == 1 && x.size(1) > 1; }

Tensor new_map_like(const Tensor& x) { return new_map(x, is_last(x)); }

// Result, statistics and what is kept for backward.
using Forward = std::tuple<Tensor, Tensor, Tensors>;
// Gradients of x, of the parameters and of the scheme's coefficients.
using Backward = std::tuple<Tensor, Tensors, Tensor>;

template <template <class> class Program, class Rule>
Forward forward(const Tensor& x, const BranchArguments& branch, const Rule& rule, int64_t evaluations,
                bool backward_weights, int64_t keep) {
  return with_arithmetic(x, [&](auto zero) {
    using A = decltype(zero);
    const Packed<A> packed(branch, x, {.transposed = backward_weights});
    Kept kept({});
    const Tensor statistics = new_vector(packed.statistics * evaluations, scalar_type<A>());
    Call<A> call{packed, x, nullptr, new_map_like(x), keep ? &kept : nullptr, static_cast<A*>(statistics.data_ptr())};
    run<Program>(call, rule);
    return Forward(call.result, statistics, left_behind(kept.pieces(), keep));
  });
}

template <template <class> class Program, class Rule>
Backward backward(const Tensor& x, const Tensor& cotangent, const BranchArguments& branch, const Rule& rule,
                  const Tensors& kept_pieces, const Wanted& wanted, int64_t products) {
  return with_arithmetic(x, [&](auto zero) {
    using A = decltype(zero);
    const Packed<A> packed(branch, x, wanted);
    const int64_t samples = x.size(0), workers = workers_for(samples), each = packed.spec.gradients;
    const int64_t stored = x.scalar_type() == ScalarType::BFloat16 ? sizeof(bfloat16) : sizeof(A);
    const int64_t group = group_for(samples, workers, x.size(2) * x.size(3), stored, packed.spec.channels());
    Kept kept(kept_pieces);
    Call<A> call{packed, x, &cotangent, new_map_like(x), kept_pieces.empty() ? nullptr : &kept};
    if (each > 0 || products > 0) call.parts = parts_for(samples, workers, group, each * sizeof(A));
    CallMemory sums;
    const int64_t size = call.parts * each;
    call.gradients = static_cast<A*>(sums.take(size * static_cast<int64_t>(sizeof(A))));
    std::vector<double> partial(call.parts * products, 0.0);
    call.products = partial.data(), call.products_stride = products;
    run<Program>(call, rule);
    const Tensor total = new_vector(products, ScalarType::Double, true);
    for (int64_t i = 0; i < call.parts * products; ++i)
      static_cast<double*>(total.data_ptr())[i % products] += partial[i];
    return Backward(call.result, wanted.gradients ? packed.gradients(call.gradients, call.parts) : Tensors{}, total);
  });
}

// Of each of a branch's tensors whether it is a parameter, and no running statistics.
std::vector<bool> are_parameters(const Integers& units) {
  std::vector<bool> found;
  for (size_t unit = 0; unit < units.size(); unit += kUnitIntegers)
    for (const int64_t bit : kTensorsOfUnit)
      if (units[unit + kUnitIntegers - 1] & bit) found.push_back(bit != kRunning);
  return found;
}

Forward ie_forward(const Tensor& x, const Tensors& parameters, const Integers& units, const Numbers& numbers,
                   int64_t steps, double gamma, double theta, int64_t keep, bool keep_all) {
  return forward<DescentForward>(x, {parameters, units, numbers}, Descent{steps, gamma, theta, !keep, keep_all},
                                 steps + 1, steps > 0, keep);
}

std::tuple<Tensor, Tensors> ie_backward(const Tensor& x, const Tensor& cotangent, const Tensors& kept,
                                        const Tensors& parameters, const Integers& units, const Numbers& numbers,
                                        int64_t steps, double gamma, double theta, bool detach, bool gradients,
                                        bool kept_all) {
  const Descent descent{steps, gamma, theta, detach, kept_all};
  const bool unused = gradients && goes_unused(kept);
  auto [bar, bars, none] = backward<DescentBackward>(x, cotangent, {parameters, units, numbers}, descent,
                                                     found_again(kept), {.gradients = gradients && !unused}, 0);
  return {bar, unused ? unused_gradients(parameters, are_parameters(units)) : bars};
}

// `table` [2, stages, stages], float64, contiguous: alpha and beta.
Scheme scheme_of(const Tensor& x, const Tensor& table, bool keeps_all) {
  return {table.size(1), static_cast<const double*>(table.data_ptr()), keeps_all,
          x.scalar_type() != ScalarType::Double};
}

Forward rk_forward(const Tensor& x, const Tensors& parameters, const Integers& units, const Numbers& numbers,
                   const Tensor& table, int64_t keep, bool keep_all) {
  const Scheme scheme = scheme_of(x, table, keep_all);
  return forward<SchemeForward>(x, {parameters, units, numbers}, scheme, scheme.stages, false, keep);
}

Backward rk_backward(const Tensor& x, const Tensor& cotangent, const Tensors& kept_or_ticket, const Tensors& parameters,
                     const Integers& units, const Numbers& numbers, const Tensor& table, bool gradients,
                     bool table_gradient, bool kept_all) {
  const Tensors kept = found_again(kept_or_ticket);
  const bool unused = gradients && !table_gradient && goes_unused(kept_or_ticket);
  // Where the stages are kept, no evaluation is computed again to its end but for the coefficients' gradients.
  const Wanted wanted{.gradients = gradients && !unused, .last = kept.empty() || table_gradient};
  const Scheme scheme = scheme_of(x, table, kept_all);
  Backward result = backward<SchemeBackward>(x, cotangent, {parameters, units, numbers}, scheme, kept, wanted,
                                             table_gradient ? table.numel() : 0);
  if (table_gradient) scheme.complete(static_cast<double*>(std::get<2>(result).data_ptr()));
  if (unused) std::get<1>(result) = unused_gradients(parameters, are_parameters(units));
  return result;
}

// ---- chains

// Calls f with a number as maps like x are stored.
template <class F>
void with_maps(const Tensor& x, const F& f) {
  if constexpr (kTiles)
    if (lowers(x)) return f(bfloat16{});
  with_arithmetic(x, f);
}

std::tuple<Tensor, Tensor, Tensors> chain_forward(const Tensor& x, const Tensors& parameters, const Integers& units,
                                                  const Numbers& numbers, const Integers& strides,
                                                  const Integers& lengths, double step, int64_t act, double p, double q,
                                                  const Integers& shape, int64_t keep, bool last) {
  const ChainArguments chain{parameters, units, strides, lengths, numbers, step, act, p, q};
  const ChainCall call{x,     nullptr, nullptr, new_map(x, shape[0], shape[1], shape[2], last), keep != kKeepNothing,
                       false, false};
  Tensors kept;
  Tensor statistics;
  with_maps(x, [&](auto zero) { run_chain<decltype(zero)>(chain, call, kept, &statistics, nullptr); });
  return {call.result, statistics, left_behind(std::move(kept), keep)};
}

std::tuple<Tensor, Tensors> chain_backward(const Tensor& x, const Tensor& y, const Tensor& cotangent, Tensors kept,
                                           const Tensors& parameters, const Integers& units, const Numbers& numbers,
                                           const Integers& strides, const Integers& lengths, double step, int64_t act,
                                           double p, double q, bool point, bool gradients) {
  const bool unused = gradients && goes_unused(kept);
  kept = found_again(kept);
  const ChainArguments chain{parameters, units, strides, lengths, numbers, step, act, p, q};
  const ChainCall call{
      x,     &cotangent,          &y, point ? new_map_like(x) : new_vector(0, x.scalar_type()), !kept.empty(),
      point, gradients && !unused};
  Tensors bars;
  if (point || call.gradients)
    with_maps(x, [&](auto zero) { run_chain<decltype(zero)>(chain, call, kept, nullptr, &bars); });
  return {call.result, unused ? unused_gradients(parameters, are_parameters(units)) : bars};
}

// ---- the skew pair

// Calls f(packed, the workers' accumulators) and returns the parameters' gradients, if any is asked for.
template <class A, class F>
Tensors with_gradients(const PairArguments& pair, const Tensor& y, Asked asked, const F& f) {
  const PackedPair<A> packed(pair, y, asked);
  const int64_t workers = workers_for(y.size(0));
  const Tensor accumulators = new_vector(workers * packed.spec.gradients, scalar_type<A>(), true);
  f(packed, accumulators);
  return asked.weight || asked.norms ? packed.gradients(accumulators, workers) : Tensors{};
}

// As `are_parameters`, of those that a pair's weight and norms are asked for.
std::vector<bool> are_asked(const Integers& integers, Asked asked) {
  std::vector<bool> found{asked.weight};
  for (size_t norm = 4; norm < integers.size(); norm += 3)
    for (const int64_t bit : {kWeight, kBias, kRunning, kRunning})
      if (integers[norm] & bit) found.push_back(asked.norms && bit != kRunning);
  return found;
}

std::tuple<Tensor, Tensor, Tensors, Tensors> pair_forward(const Tensor& y, const Tensor& z, const Tensors& parameters,
                                                          const Integers& integers, const Numbers& numbers,
                                                          int64_t keep, bool results, bool y_last, bool z_last) {
  PairCall call{y,
                z,
                nullptr,
                nullptr,
                false,
                new_map(y, y_last),
                new_map(z, z_last),
                {true, true},
                results && keep == kKeepPieces};
  PairKept kept;
  with_arithmetic(y, [&](auto zero) {
    with_gradients<decltype(zero)>({parameters, integers, numbers}, y, {},
                                   [&](const auto& packed, const Tensor& accumulators) {
                                     run_pair(packed, call, keep ? &kept : nullptr, accumulators);
                                   });
  });
  return {call.y_out, call.z_out, left_behind(std::move(kept.traces), keep), kept.signs};
}

std::tuple<Tensor, Tensor, Tensors> pair_backward(const Tensor& y, const Tensor& z, const MaybeTensor& y_bar,
                                                  const MaybeTensor& z_bar, Tensors traces, Tensors signs,
                                                  const Tensors& ends, const Tensors& parameters,
                                                  const Integers& integers, const Numbers& numbers, bool need_y,
                                                  bool need_z, bool weight, bool norms) {
  const Tensor none = new_vector(0, y.scalar_type());
  PairCall call{y,
                z,
                y_bar ? &*y_bar : nullptr,
                z_bar ? &*z_bar : nullptr,
                true,
                need_y ? new_map_like(y) : none,
                need_z ? new_map_like(z) : none,
                {need_y, need_z}};
  const Asked asked{weight, norms};
  const bool unused = (weight || norms) && goes_unused(traces);
  traces = found_again(traces);
  PairKept kept{traces, signs};
  if (!ends.empty()) call.y_end = &ends[0], call.z_end = &ends[1];
  const Tensors bars = with_arithmetic(y, [&](auto zero) {
    return with_gradients<decltype(zero)>({parameters, integers, numbers}, y, unused ? Asked{} : asked,
                                          [&](const auto& packed, const Tensor& accumulators) {
                                            run_pair(packed, call, traces.empty() ? nullptr : &kept, accumulators);
                                          });
  });
  return {call.y_out, call.z_out, unused ? unused_gradients(parameters, are_asked(integers, asked)) : bars};
}

// `table` [stages + 1, stages]: the rows of a, then b, all times the step.
March march_of(const Numbers& table, int64_t steps, const Integers& used) {
  const int64_t stages = static_cast<int64_t>(used.size()) / (2 * steps);
  return {steps, stages, table.data(), table.data() + stages * stages, used.data()};
}

std::tuple<Tensor, Tensors> march_forward(const Tensor& x, const Tensors& parameters, const Integers& integers,
                                          const Numbers& numbers, const Numbers& table, int64_t steps,
                                          const Integers& used, int64_t keep, bool last) {
  const int64_t stride = integers[0];
  MarchCall call{x, nullptr, new_map(x, parameters[0].size(0), x.size(2) / stride, x.size(3) / stride, last)};
  Tensors kept;
  with_arithmetic(x, [&](auto zero) {
    with_gradients<decltype(zero)>(
        {parameters, integers, numbers}, call.out, {}, [&](const auto& packed, const Tensor& accumulators) {
          run_march(packed, march_of(table, steps, used), call, keep ? &kept : nullptr, accumulators);
        });
  });
  return {call.out, left_behind(std::move(kept), keep)};
}

std::tuple<Tensor, Tensors> march_backward(const Tensor& x, const Tensor& cotangent, Tensors kept,
                                           const Tensors& parameters, const Integers& integers, const Numbers& numbers,
                                           const Numbers& table, int64_t steps, const Integers& used, bool weight,
                                           bool norms) {
  const Asked asked{weight, norms};
  const bool unused = (weight || norms) && goes_unused(kept);
  kept = found_again(kept);
  MarchCall call{x, &cotangent, new_map_like(x)};
  const Tensors bars = with_arithmetic(x, [&](auto zero) {
    return with_gradients<decltype(zero)>({parameters, integers, numbers}, cotangent, unused ? Asked{} : asked,
                                          [&](const auto& packed, const Tensor& accumulators) {
                                            run_march(packed, march_of(table, steps, used), call,
                                                      kept.empty() ? nullptr : &kept, accumulators);
                                          });
  });
  return {call.out, unused ? unused_gradients(parameters, are_asked(integers, asked)) : bars};
}

std::tuple<Tensor, Tensor, Tensors> solve_forward(const Tensor& x, const Tensors& parameters, const Integers& integers,
                                                  const Numbers& numbers, const Numbers& table, const Numbers& solver,
                                                  const Integers& limits, bool per_sample, int64_t keep,
                                                  int64_t through, bool raises) {
  const int64_t stride = integers[0];
  const Embedded scheme = embedded_of(table, solver, limits);
  const SolveCall call{x,
                       nullptr,
                       new_map(x, parameters[0].size(0), x.size(2) / stride, x.size(3) / stride, false),
                       per_sample,
                       keep != kKeepNothing,
                       static_cast<Through>(through)};
  Tensors kept;
  Numbers log;
  with_arithmetic(x, [&](auto zero) {
    with_gradients<decltype(zero)>({parameters, integers, numbers}, call.out, {},
                                   [&](const auto& packed, const Tensor& accumulators) {
                                     run_solve(packed, scheme, call, log, kept, accumulators);
                                   });
  });
  return {call.out, written(log, raises), left_of_solve(std::move(kept), log, keep)};
}

std::tuple<Tensor, Tensors> solve_backward(const Tensor& x, const Tensor& cotangent, const Tensor& log_of, Tensors kept,
                                           const Tensors& parameters, const Integers& integers, const Numbers& numbers,
                                           const Numbers& table, const Numbers& solver, const Integers& limits,
                                           bool per_sample, int64_t through, bool weight, bool norms) {
  const Embedded scheme = embedded_of(table, solver, limits);
  const SolveCall call{x, &cotangent, new_map_like(x), per_sample, true, static_cast<Through>(through)};
  Numbers log = numbers_of(log_of);
  kept = found_of_solve(kept, log);
  const Tensors bars = with_arithmetic(x, [&](auto zero) {
    return with_gradients<decltype(zero)>({parameters, integers, numbers}, cotangent, {weight, norms},
                                          [&](const auto& packed, const Tensor& accumulators) {
                                            run_solve(packed, scheme, call, log, kept, accumulators);
                                          });
  });
  return {call.out, bars};
}

}  // namespace
}  // namespace fastode::resident

STABLE_TORCH_LIBRARY_IMPL(fastode, CPU, m) {
  m.impl("resident_ie_forward", TORCH_BOX(&fastode::resident::ie_forward));
  m.impl("resident_ie_backward", TORCH_BOX(&fastode::resident::ie_backward));
  m.impl("resident_rk_forward", TORCH_BOX(&fastode::resident::rk_forward));
  m.impl("resident_rk_backward", TORCH_BOX(&fastode::resident::rk_backward));
  m.impl("resident_chain_forward", TORCH_BOX(&fastode::resident::chain_forward));
  m.impl("resident_chain_backward", TORCH_BOX(&fastode::resident::chain_backward));
  m.impl("resident_skew_forward", TORCH_BOX(&fastode::resident::pair_forward));
  m.impl("resident_skew_backward", TORCH_BOX(&fastode::resident::pair_backward));
  m.impl("resident_march_forward", TORCH_BOX(&fastode::resident::march_forward));
  m.impl("resident_march_backward", TORCH_BOX(&fastode::resident::march_backward));
  m.impl("resident_solve_forward", TORCH_BOX(&fastode::resident::solve_forward));
  m.impl("resident_solve_backward", TORCH_BOX(&fastode::resident::solve_backward));
}

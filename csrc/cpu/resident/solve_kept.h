// What a solve's steps leave to backward: made by forward, and found again.
#pragma once

#include <numeric>

#include "skew_solve.h"

namespace fastode::resident {

// Bytes up to which what is kept of several maps lies in one tensor: a tensor for each takes longer than little maps'
// arithmetic, and of large ones the allocator can give the next call the same pages.
inline constexpr int64_t kTogetherBytes = 1 << 17;

// Pieces of these lengths, of which those of length 0 are null: made and added to `pieces`, or found among them from
// `next` on, which moves.
template <class A>
std::vector<A*> take_pieces(const std::vector<int64_t>& lengths, bool make, std::vector<Tensor>& pieces, size_t& next) {
  const auto take = [&](int64_t length) {
    if (make) pieces.push_back(new_vector(length, scalar_type<A>()));
    return static_cast<A*>(pieces[next++].data_ptr());
  };
  const int64_t total = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  const bool together = total * static_cast<int64_t>(sizeof(A)) <= kTogetherBytes;
  A* at = together && total > 0 ? take(total) : nullptr;
  std::vector<A*> found;
  for (const int64_t length : lengths) {
    found.push_back(length == 0 ? nullptr : together ? at : take(length));
    if (together) at += length;
  }
  return found;
}

// What a step's evaluations leave: all of them or, for the next step alone, the last.
template <class A>
StepMaps<A> take_step(const FieldSizes& sizes, int64_t evaluations, int64_t samples, bool all, bool make,
                      std::vector<Tensor>& pieces, size_t& next) {
  std::vector<int64_t> lengths;
  for (int64_t e = 0; e < evaluations; ++e)
    for (const int64_t size : {sizes.y, sizes.z}) lengths.push_back(all || e + 1 == evaluations ? size * samples : 0);
  lengths.push_back(evaluations * sizes.statistics * samples);
  const std::vector<A*> found = take_pieces<A>(lengths, make, pieces, next);
  StepMaps<A> step;
  step.samples = samples;
  for (int64_t e = 0; e < evaluations; ++e) step.y.push_back(found[2 * e]), step.z.push_back(found[2 * e + 1]);
  step.statistics = found.back();
  return step;
}

template <class A>
void take_ends(const FieldSizes& sizes, StepMaps<A>& step, bool make, std::vector<Tensor>& pieces, size_t& next) {
  const std::vector<A*> found = take_pieces<A>({sizes.y * step.samples, sizes.z * step.samples}, make, pieces, next);
  step.end_y = found[0], step.end_z = found[1];
}

template <class A>
StepMaps<A> new_step(const FieldSizes& sizes, int64_t evaluations, int64_t samples, bool all) {
  std::vector<Tensor> pieces;
  size_t next = 0;
  StepMaps<A> step = take_step<A>(sizes, evaluations, samples, all, true, pieces, next);
  step.pieces = std::move(pieces);
  return step;
}

template <class A>
void give_ends(const FieldSizes& sizes, StepMaps<A>& step) {
  size_t next = 0;
  if (!step.end_y) take_ends(sizes, step, true, step.ends, next);
}

// What new_step and give_ends made, found again; `next` moves on.
template <class A>
StepMaps<A> find_step(const FieldSizes& sizes, int64_t evaluations, int64_t samples, bool ends,
                      std::vector<Tensor>& kept, size_t& next) {
  StepMaps<A> step = take_step<A>(sizes, evaluations, samples, true, false, kept, next);
  if (ends) take_ends(sizes, step, false, kept, next);
  return step;
}

}  // namespace fastode::resident

// The way back through a solution with steps by error. Equations: README.md of fastode/ops/schemes/skew_pair, (5) to
// (9).
//
// A block takes a sample from the last step to the first: it makes a step's stages again from where the step began, or
// from the beginning before it that was kept, and pulls back through them. Where the gradient goes through the first
// step's size, what this size is made of are sums over the samples that share it: for these all blocks meet.
#pragma once

#include "skew_pull.cuh"
#include "solve_choice.cuh"
#include "weights.cuh"

namespace fastode::device {

template <class Tile>
struct SolveBackward : Solving<Tile> {
  using Base = Solving<Tile>;
  using Base::threads, Base::C, Base::W;
  using T = typename Tile::Type;
  using State = typename Tile::State;
  using Sum = typename Tile::Sum;
  using Pair = SkewPair<Tile>;

  // Behind the pair's: the statistics of norms that do not measure them, how the solve stands, each thread's shares of
  // two sums, the cotangent of a product, and the products' sums.
  static constexpr size_t bytes(int) {
    return Memory<Tile>::bytes(cuda::kPairNorms, 1) + kFixedBytes + sizeof(BackStand) + kShareBytes + Tile::kKeptBytes +
           ProductSums<Tile>::kBytes;
  }

  static FASTODE_DEVICE void run(const cuda::SolveBackCall& back) {
    const cuda::SolveCall& call = back.solve;
    char* const more = Memory<Tile>(cuda::kPairNorms, 1).end;
    Pair pair(call.pair, true, back.sums != nullptr, reinterpret_cast<float*>(more));
    if (thread() == 0) stand_of(pair).failed = 0;
    if (back.weight) products_of(back, pair).begin();
    SolveBackward(back, pair).solve();
    if (stand_of(pair).failed) fail_parameters(back, pair);
    if (back.weight && !stand_of(pair).failed) products_of(back, pair).finish();
    if (back.sums) pair.store_sums(back.sums, cuda::kPairNorms);
  }

 private:
  using Maps = StepMaps<Tile>;
  using Pull = PairPull<Tile>;
  using Choice = ChoiceBack<Tile>;
  using Base::call_, Base::pair_;

  // Two that are none of the steps: the trial's second stage, and the first stage of all.
  enum { kOfTrial = -2, kOfStart = -1 };
  // What a thread counts.
  enum { kSample, kStep, kWalk, kCounts };

  static constexpr size_t kFixedBytes = cuda::kPairNorms * 2 * C * sizeof(float);
  static constexpr size_t kShareBytes = (2 + kCounts) * threads * sizeof(float);

  FASTODE_DEVICE SolveBackward(const cuda::SolveBackCall& back, Pair& pair)
      : Base(back.solve, pair, 0, stand_of(pair).sums),
        back_(back),
        stand_(stand_of(pair)),
        maps_{back.room, back.solve.stages, block(), 0} {}

  static FASTODE_DEVICE BackStand& stand_of(const Pair& pair) {
    return *reinterpret_cast<BackStand*>(pair.memory().end + kFixedBytes);
  }
  // What a thread sums up and counts is in shared memory: in registers it would take the place of a convolution's.
  static FASTODE_DEVICE float& share_of(const Pair& pair, int kind) {
    float* const shares = reinterpret_cast<float*>(pair.memory().end + kFixedBytes + sizeof(BackStand));
    return shares[kind * threads + anew(thread())];
  }
  static FASTODE_DEVICE int& count_of(const Pair& pair, int which) {
    return reinterpret_cast<int*>(&share_of(pair, 2))[which * threads];
  }
  FASTODE_DEVICE int& count(int which) const { return count_of(pair_, which); }
  static FASTODE_DEVICE char* bare_of(const Pair& pair) {
    return pair.memory().end + kFixedBytes + sizeof(BackStand) + kShareBytes;
  }
  static FASTODE_DEVICE ProductSums<Tile> products_of(const cuda::SolveBackCall& back, const Pair& pair) {
    float* const to = back.partial + block() * static_cast<int64_t>(Products<Tile>::kEntries + C);
    return {to, reinterpret_cast<float*>(bare_of(pair) + Tile::kKeptBytes)};
  }

  FASTODE_DEVICE int number() const { return call_.alone ? sample() : 0; }
  FASTODE_DEVICE const cuda::SolveTaken& taken() const { return call_.taken[number()]; }

  // The cotangents of a sample's state and of the slope with which its step begins.
  FASTODE_DEVICE char* total(int half) const { return own_of_sample(half); }
  FASTODE_DEVICE char* carried(int half) const { return own_of_sample(2 + half); }
  FASTODE_DEVICE char* own_of_sample(int slot) const {
    return Pair::place(call_.room, call_.room.split + slot, sample());
  }

  // All of the block's samples: one after the other where each is solved alone, else all in one phase after the other.
  FASTODE_DEVICE void solve() {
    count(kSample) = block();
    aim();
    FASTODE_ROLLED
    while (sample() < call_.samples) {
      pass();
      if (!call_.alone && sample() + blocks() < call_.samples) {
        count(kSample) += blocks();
      } else if (kinds() == 0) {
        count(kSample) = call_.alone ? sample() + blocks() : call_.samples;
        block_barrier();  // all have read how the solve ended
        if (sample() < call_.samples) aim();
      } else {
        this->take_sums(kinds(), stand_.phase);
        if (anew(thread()) == 0)
          decide_by(stand_, taken(), call_.order, sizes()[0], this->entries(kY), this->entries(kZ));
        block_barrier();
        if (!call_.alone) count(kSample) = block();
      }
    }
  }

  // The sample at hand in a phase.
  FASTODE_DEVICE void pass() {
    for (const int kind : {kProduct, kPlace}) share_of(pair_, kind) = 0;
    if (stand_.phase == kSteps) begin();
    FASTODE_ROLLED
    for (count(kStep) = top(); step() >= low(); --count(kStep)) pull();
    if (kinds() == 0) return Pull::end(pair_, call_.result, sample(), total(kY), total(kZ));
    FASTODE_ROLLED
    for (int kind = 0; kind < kinds(); ++kind) this->leave_part(kind, share_of(pair_, kind));
    this->leave_sums(sample(), kinds(), stand_.phase);
  }

  FASTODE_DEVICE int sample() const { return count(kSample); }
  FASTODE_DEVICE int step() const { return count(kStep); }

  // What a phase goes through, and how many kinds of sums it has for the next one. Nothing of this waits in a register.
  FASTODE_DEVICE int top() const {
    return stand_.phase == kSteps ? stand_.steps - 1 : stand_.phase == kTrial ? kOfTrial : kOfStart;
  }
  FASTODE_DEVICE int low() const {
    return stand_.phase == kTrial ? kOfTrial : stand_.phase == kSteps && stand_.through ? 0 : kOfStart;
  }
  FASTODE_DEVICE int kinds() const {
    return !stand_.through || stand_.phase == kStart ? 0 : stand_.phase == kSteps ? 2 : 1;
  }
  FASTODE_DEVICE int from(int step) const { return step == kOfStart ? 0 : 1; }
  FASTODE_DEVICE int to(int step) const { return step == kOfStart ? 1 : step == kOfTrial ? 2 : call_.stages; }

  // What is known of a solve from the beginning, for all threads.
  FASTODE_DEVICE void aim() {
    if (anew(thread()) == 0) aim_steps();
    block_barrier();
  }

  FASTODE_DEVICE void aim_steps() {
    stand_.phase = kSteps;
    const bool reached = taken().end == resident::kReached;
    stand_.failed |= !reached;
    stand_.through = back_.through && taken().stays && reached;
    stand_.steps = reached ? static_cast<int>(taken().steps) : kOfStart, stand_.every = 1;
    while (stand_.every * cuda::kSolveSlots < stand_.steps) stand_.every *= 2;
    const resident::Quartic quartic(taken().at), rates(taken().at, true);
    const double size = stand_.steps > 0 ? sizes()[stand_.steps - 1] : 0;
    FASTODE_ROLLED
    for (int i = 0; i < call_.stages; ++i) {
      const double b = call_.b[i], middle = call_.middle[i];
      stand_.weights[i] = static_cast<float>(quartic.weight(i, call_.stages, b, middle) * size);
      stand_.rates[i] = static_cast<float>(rates.weight(i, call_.stages, b, middle));
    }
    stand_.trial = static_cast<float>(taken().first.trial());
  }

  FASTODE_DEVICE const float* sizes() const { return call_.sizes + number() * call_.most_taken; }
  FASTODE_DEVICE float size(int step) const {
    return step == kOfTrial ? stand_.trial : step == kOfStart ? 0 : sizes()[step];
  }

  // Of a solve that did not reach t₁ they are no numbers.
  FASTODE_DEVICE void begin() const {
    pair_.bring(total(kY), back_.cotangent, sample(), As::kY);
    const bool reached = taken().end == resident::kReached;
    State state;
    Tile::fill(state, reached ? 0 : kNotNumbers);
    FASTODE_ROLLED
    for (int slot = 1; slot < 4; ++slot) Tile::keep(state, own_of_sample(slot));
    if (!reached) Tile::keep(state, total(kY));
  }

  // Through the step at hand: its stages again, then back through them.
  FASTODE_DEVICE void pull() {
    recall_beginning(step() < 0 ? 0 : step() / stand_.every);
    FASTODE_ROLLED
    for (count(kWalk) = step() < 0 ? step() : step() / stand_.every * stand_.every;; ++count(kWalk)) {
      FASTODE_ROLLED
      for (int i = from(step()); i < to(step()); ++i) evaluate(i);
      if (count(kWalk) == step()) break;
      advance();
    }
    block_barrier();  // what norms found lies there for all
    if (step() == kOfTrial) pull_change();
    if (step() == kOfStart && stand_.through) pull_start();
    if (step() + 1 == stand_.steps && stand_.through) sum_place();
    FASTODE_ROLLED
    for (int i = to(step()) - 1; i >= from(step()); --i) Pull::stage(pair_, BackStage{{*this, i}});
    FASTODE_ROLLED
    for (int half = kY; half <= kZ; ++half) end_step(half);
    if (back_.weight) multiply();
  }

  FASTODE_DEVICE void recall_beginning(int slot) const {
    FASTODE_ROLLED
    for (int which = 0; which < 4; ++which) {
      State state;
      Tile::recall(state, Pair::place(call_.room, 4 * slot + which, sample()));
      Tile::keep(state, maps_.beginning(which));
    }
  }

  // A stage of the sample at hand, in a step or in none of them.
  struct Stage {
    SolveBackward& solve;
    int i;

    FASTODE_DEVICE char* hat(int half) const { return solve.maps_.hat(half); }
    FASTODE_DEVICE char* slope(int half) const { return solve.maps_.slope(i, half); }
    FASTODE_DEVICE Trace trace(int half) const {
      return {solve.own(2 * i + half), rows(kPreY + half), rows(kPostY + half)};
    }
    FASTODE_DEVICE int at() const { return solve.count(kWalk); }
    FASTODE_DEVICE float* rows(int which) const {
      const int64_t evaluation = block() * solve.call_.stages + i;
      return solve.back_.statistics + (evaluation * cuda::kPairNorms + which) * 2 * C;
    }
    FASTODE_DEVICE void point(State& state, int half) const {
      const auto row = [&](int j) { return at() == kOfTrial ? 1.0f : solve.call_.table[i][j]; };
      solve.maps_.combine(state, half, i, row, solve.size(at()));
    }
  };

  struct BackStage : Stage {
    FASTODE_DEVICE bool uses(int) const { return true; }
    FASTODE_DEVICE bool products() const { return this->solve.back_.weight; }
    FASTODE_DEVICE char* factor(int half, bool cotangent) const { return this->solve.factor(this->i, half, cotangent); }
    FASTODE_DEVICE void note(int) const {}
    FASTODE_DEVICE void slope_bar(Sum& bar, int half) const { this->solve.slope_bar(bar, this->i, half); }
  };

  // A block's places behind those of its step: what each slope leaves, then the factors of products.
  FASTODE_DEVICE char* own(int slot) const { return maps_.behind(slot); }
  FASTODE_DEVICE char* factor(int i, int half, bool cotangent) const {
    return own(2 * call_.stages + 4 * i + 2 * half + cotangent);
  }

  FASTODE_DEVICE void evaluate(int i) {
    const Stage at{*this, i};
    const bool ends = count(kWalk) < step() && call_.ends_in_solution && i + 1 == call_.stages;
    pair_.evaluate(at, true, true, [&](State& state, int half) {
      at.point(state, half);
      if (ends) Tile::keep(state, maps_.end(half));
    });
  }

  // To the next step's beginning.
  FASTODE_DEVICE void advance() const {
    FASTODE_ROLLED
    for (int half = kY; half <= kZ; ++half) {
      State state;
      if (call_.ends_in_solution)
        Tile::recall(state, maps_.end(half));
      else
        maps_.combine(
            state, half, call_.stages, [&](int j) { return static_cast<float>(call_.b[j]); }, size(count(kWalk)));
      Tile::keep(state, maps_.start(half));
      Tile::recall(state, maps_.slope(call_.stages - 1, half));
      Tile::keep(state, maps_.slope(0, half));
    }
  }

  // (7): the cotangent of a slope. Before what the next step has carried back is added, (8) sums its product with it.
  FASTODE_DEVICE void slope_bar(Sum& bar, int i, int half) {
    const int step = this->step();
    Tile::clear(bar);
    if (step == kOfTrial) return Tile::add_kept(bar, 1, maps_.end(half));
    if (step >= 0) {
      const bool last = step + 1 == stand_.steps;
      const float size = this->size(step), weight = last ? stand_.weights[i] : static_cast<float>(call_.b[i]) * size;
      if (weight != 0) Tile::add_kept(bar, weight, total(half));
      FASTODE_ROLLED
      for (int l = i + 1; l < call_.stages; ++l)
        if (call_.table[l][i] != 0) Tile::add_kept(bar, call_.table[l][i] * size, maps_.slope(l, half));
      if (stand_.through && step == 0) share_of(pair_, kProduct) += Choice::dot(bar, maps_.slope(i, half));
    }
    if (step == kOfStart || i + 1 == call_.stages) Tile::add_kept(bar, 1, carried(half));
  }

  // The cotangents of the state and of the slope with which a step begins, from those of the points between.
  FASTODE_DEVICE void end_step(int half) {
    const int step = this->step();
    State state;
    Sum sum;
    if (step != kOfStart) {
      if (step == kOfTrial) {
        Tile::clear(sum);
        Tile::add_kept(sum, 1, maps_.slope(1, half));
        share_of(pair_, kProduct) += Choice::dot(sum, maps_.slope(0, half));
        Tile::scale(sum, stand_.trial);
        Tile::add_kept(sum, 1, carried(half));
      } else {
        slope_bar(sum, 0, half);
      }
      Tile::round(state, sum);
      Tile::keep(state, carried(half));
    }
    Tile::clear(sum);
    Tile::add_kept(sum, 1, total(half));
    FASTODE_ROLLED
    for (int i = from(step); i < to(step); ++i) Tile::add_kept(sum, 1, maps_.slope(i, half));
    Tile::round(state, sum);
    Tile::keep(state, total(half));
  }

  // ---- through the first step's size

  // (8): by what y(t₁) moves with its place in the last step.
  FASTODE_DEVICE void sum_place() {
    Sum sum;
    Tile::clear(sum);
    maps_.add_slopes(sum, kY, call_.stages, [&](int j) { return stand_.rates[j]; }, 1);
    share_of(pair_, kPlace) += Choice::dot(sum, total(kY));
  }

  // (9) for the change of the slopes.
  FASTODE_DEVICE void pull_change() const {
    State state;
    Tile::clear(state);
    for (const int half : {kY, kZ}) Tile::keep(state, maps_.end(half));
    const int half = stand_.change_half == kY ? kY : kZ;
    Choice::pull_squares(call_, pair_.channels(half), maps_.start(half), stand_.change, maps_.slope(1, half),
                         maps_.slope(0, half), maps_.end(half), total(half));
    Sum sum;
    Tile::clear(sum);
    Tile::add_kept(sum, 1, carried(half));
    Tile::add_kept(sum, -1, maps_.end(half));
    Tile::round(state, sum);
    Tile::keep(state, carried(half));
  }

  // (9) for the slopes and for the state.
  FASTODE_DEVICE void pull_start() const {
    FASTODE_ROLLED
    for (int of_slope = 1; of_slope >= 0; --of_slope) {
      const int half = (of_slope ? stand_.slope_half : stand_.state_half) == kY ? kY : kZ;
      const float factor = of_slope ? stand_.slope : stand_.state;
      if (factor == 0) continue;
      Choice::pull_squares(call_, pair_.channels(half), maps_.start(half), factor,
                           of_slope ? maps_.slope(0, half) : maps_.start(half), nullptr,
                           of_slope ? carried(half) : total(half), total(half));
    }
  }

  // (4) for the stages that were pulled back: some taps at a time, for all would take more registers than there are.
  static constexpr int kTaps = threads > 256 ? 3 : 9;

  FASTODE_DEVICE void multiply() {
    FASTODE_ROLLED
    for (int first = 0; first < 9; first += kTaps) {
      Products<Tile, kTaps> products;
      products.clear();
      products.first = first;
      FASTODE_ROLLED
      for (int item = 2 * from(step()); item < 2 * to(step()); ++item) {
        block_barrier();
        products.put(pair_.memory().map, bare_of(pair_), factor(item / 2, item % 2, false),
                     factor(item / 2, item % 2, true));
        block_barrier();
        products.add(pair_.memory().map, bare_of(pair_));
      }
      products_of(back_, pair_).add(products, true);
    }
  }

  // Of a solve that did not reach t₁.
  static constexpr uint32_t kNotNumbers = 0x7fff7fffu;

  static FASTODE_DEVICE void fail_parameters(const cuda::SolveBackCall& back, const Pair& pair) {
    const float value = T::unpack(kNotNumbers).low;
    block_barrier();  // the sums of other samples are there
    FASTODE_ROLLED
    for (int i = thread(); i < 2 * C * cuda::kPairNorms; i += threads)
      pair.memory().sums(i / (2 * C))[i % (2 * C)] = value;
    FASTODE_ROLLED
    for (int i = thread(); back.weight && i < Products<Tile>::kEntries; i += threads)
      products_of(back, pair).to[i] = value;
  }

  const cuda::SolveBackCall& back_;
  BackStand& stand_;
  const Maps maps_;
};

}  // namespace fastode::device

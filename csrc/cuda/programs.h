// What the programs are called with, and their launchers: read by nvcc and by the C++ compiler.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../constants.h"
#include "../step_control.h"

namespace fastode::cuda {

// Where a program is launched: a card, and a stream on it.
struct Queue {
  int device = 0;
  void* stream = nullptr;
};

struct Map {
  void* data;
  int64_t sample, channel, row, column;  // strides, in elements
  bool words;                            // two channels lie together, in a word
};

// A tensor of one dimension, null where it is absent.
struct Vector {
  const void* data;
  int64_t stride;
};

// norm, activation, 3×3 convolution without stride. All of the maps' dtype.
struct Unit {
  int norm, groups, activation;  // codes of constants.h; without a norm, groups is 1
  float eps, p, q;
  Vector norm_weight, norm_bias, mean, variance, bias;
  const void* weight;
  int64_t weight_strides[4];
};

struct Branch {
  int count;
  Unit unit[kMostUnits];
  // Of every norm mean, rstd and two means of a pull-back: [evaluation][unit][sample][4][channels]; null where no
  // pull-back reads them.
  float* statistics;
  // Of batch norms in training: what each sample leaves for all, [turn of two][sample][kMostSums][channels], and the
  // mean and variance of each of these norms, [evaluation][norm][2][channels], null where nobody asks.
  float *exchange, *measured;
};

// Kinds of sums of a map by channels, at a time.
inline constexpr int kMostSums = 3;

// Places for a map of each sample in the order of threads, by number: the first `split` are what a forward keeps for
// its backward, those behind are a backward's own. -1: none.
struct Room {
  char* kept;
  char* own;
  int split;
  int64_t samples;
};

struct SchemeCall {
  int samples, stages;
  Branch branch;
  Map x, result;  // backward: the cotangent, and that of x
  Room room;
  // Learned coefficients stay on the card, [2][stages][stages]; null where those of `alpha` and `beta` hold.
  const double* table;
  float alpha[kMostStages][kMostStages], beta[kMostStages][kMostStages];
  int point[kMostStages];              // where u_k lies
  int image[kMostStages];              // where f(u_k) lies
  int input[kMostStages][kMostUnits];  // where the input of each unit lies in the evaluation at u_k
  int bar[kMostStages + 1];            // where the cotangent of u_k lies
};

// What a backward leaves for the parameters' gradients, beside the places of cotangents.
struct BackwardCall {
  SchemeCall scheme;
  int cotangent[kMostStages][kMostUnits];  // of the units' convolutions at each stage; -1: not evaluated
  float* sums;  // of the norms, [block][unit][bias, weight][channels]; null: the parameters' gradients are not wanted
  int back[kMostUnits];  // batch norm in training: where cotangents of the activations wait for the other samples
};

// One product of a convolution's input with the cotangent of its result, for each unit. The input is that of an
// evaluation or, along a tangent, its derivative.
struct Product {
  int evaluation, tangent_evaluation;
  int input[kMostUnits], tangent[kMostUnits], cotangent[kMostUnits];
  float factor[kMostUnits];  // of the cotangent
};

inline constexpr int kMostProducts = 16;
static_assert(kMostProducts >= kMostStages && kMostProducts >= 2 * kMostSteps + 1);

// Shares of the convolutions' gradients, each of some blocks for every unit: [row][unit][9 · channels² as (tap, in,
// out), then channels of the bias]. The first `split` rows lie at `first`, the others at `second`.
struct Shares {
  float *first, *second;
  int split, rows;
};

// The gradients of the convolutions' parameters. Of its blocks, as many for each unit, those that have a row in common
// add to it in turns, in their order.
struct WeightsCall {
  int samples, count;  // of products
  int blocks;
  Branch branch;
  Room room;
  Shares shares;
  Product product[kMostProducts];
};

// The norms of a skew pair: before W on y and on z, after the activation on each.
inline constexpr int kPairNorms = 4;

inline constexpr int kMostGradients = kMostUnits > kPairNorms ? kMostUnits : kPairNorms;

// A unit's gradients: contiguous, of the maps' dtype; null where the parameter is absent.
struct UnitGradients {
  void *norm_weight, *norm_bias, *weight, *bias;
};

struct FinishCall {
  int units, norms, channels;  // the norms are those of as many units, or of a pair
  int stride, own[2];          // of a pair, as Pair has them; of units 1 and their channels
  Shares shares;
  const float* sums;
  int sums_rows;
  UnitGradients unit[kMostGradients];
  // Where a batch is taken part by part, the float sums of the parts before, null at the first one, and where those
  // with this one go, null at the last one. They may be the same.
  const float* before;
  float* after;
};

// What an evaluation of the branch and its pull-back keep, by place.
struct Trace {
  int input[kMostUnits];
  int cotangent[kMostUnits];  // of each unit's convolution
  int back[kMostUnits];       // that through the convolution, of the activation
};

struct DescentCall {
  int samples, steps;
  float step_size, theta;
  Branch branch;  // evaluations: at x, then at y_0 …; behind them the tangents' statistics of each step
  Map x, result;  // backward: the cotangent, and that of x
  Room room;
  int skip;              // where f(x) lies
  Trace at_x, at_point;  // of the first step; those of the next lie `stride` places further each
  int stride;
  // Backward: where ȳ₀, Σ ē, and of the first step ē and the tangents along ȳ lie, those of the next ones `stride_back`
  // places further; and the cotangents in the value's stream of all convolutions but the last, whose cotangent is ē:
  // `stride` places further, for they take the places of `back`.
  int bar, e_bars;
  int e_bar, tangent[kMostUnits];
  int stride_back;
  int value[kMostUnits];
  // Batch norm in training: where cotangents of the activations wait for the other samples, and where a map of zeros
  // is, for each unit.
  int waiting, zero[kMostUnits];
  float* sums;
};

struct PairNorm {
  int mode, groups;  // a code of constants.h
  float eps;
  Vector weight, bias, mean, variance;
};

// A skew pair on maps of the programs, of the side of y: the stride² pixels of z that a pixel of y meets lie there in
// its place, as channels c · stride² + row · stride + column, and W is a 3×3 convolution between them. Channels that
// neither y nor z has begin at zero, meet weights of zero, and are in no group of a norm.
struct Pair {
  int stride, channels[2];  // of y and z; W's kernel has stride + 2 rows
  int activation;
  float p, q, gamma;
  const void* weight;
  int64_t weight_strides[4];
  PairNorm norm[kPairNorms];
};

// On which slopes of a step the result depends: bit i is stage i.
struct Used {
  uint32_t y, z;
};

// A solution of a skew pair by equal steps. In the kept places lie, where there are any, the activation's input of each
// slope that is used, in the order in which they are made, and the states after each step but the last.
struct MarchCall {
  int samples, stages, steps;
  Pair pair;
  Map x, result;  // backward: the result is the cotangent of x
  Room room;
  float table[kMostStages + 1][kMostStages];  // a scheme's rows, and its weights at row `stages`, times the step
  int turn;                                   // the first step of those that use the slopes of used[1]
  Used used[2];
  int before[2][kMostStages], width[2];  // how many slopes are used in a step before each stage, and in all
  float* statistics;  // of the norms, [step][stage][norm][sample][mean, rstd][channels]; null: nothing is kept
};

struct MarchBackCall {
  MarchCall march;
  Map cotangent;
  bool points;  // whether the points of the stages are read again
  // For the gradient of W: places of the inputs of products, one for each slope that is used, and behind them of their
  // cotangents; -1: it is not wanted. And statistics that change nothing, [slope][sample][mean, rstd, 2][channels].
  int products;
  float* plain;
  float* sums;  // of the norms, [block][norm][bias, weight][channels]; null: their gradients are not wanted
};

// What a solve did, as far as its backward asks.
struct SolveTaken {
  int64_t steps, end;
  bool stays;  // whether the first attempt was accepted
  double at;   // the part of the last step at which t₁ lies
  resident::FirstStep first;
};

// The steps of a solve whose beginnings are kept: the first one and every second, fourth … of the others, so that these
// are enough.
inline constexpr int kSolveSlots = 8;

// A solution of a skew pair with steps by error: all samples share them, or each has its own. In the kept places lie,
// where there are any, the state and the first slope at the beginning of each step that is kept.
struct SolveCall {
  int samples, stages;
  bool ends_in_solution, alone;
  Pair pair;
  Map x, result;
  Room room;
  float table[kMostStages][kMostStages];  // the scheme's rows
  double b[kMostStages], error[kMostStages], middle[kMostStages];
  double rtol, atol, t1, first_step;  // 0: chosen by the field
  int64_t order, most;                // attempts at most; negative: any number
  // Of samples that share their steps, the sums that each leaves for all: [turn of two][sample][kSolveSums].
  float* exchange;
  // What each solve did, as csrc/cpu/resident/control.h has it, with `logged` attempts: the first ones and, where there
  // is no room for all, the last one. Null: it is not told.
  double* log;
  int64_t logged;
  // For a backward, of each solve what it did and the sizes of its steps, of at most `most_taken`. Null: it is not
  // kept.
  SolveTaken* taken;
  float* sizes;
  int64_t most_taken;
};

struct SolveBackCall {
  SolveCall solve;  // `result` is the cotangent of x, and the own places are those of cotangents
  Map cotangent;
  bool through;       // whether the derivative goes through the first step's size, where the field chose it
  Room room;          // a block's own places
  float* statistics;  // of the norms, [block][stage][norm][mean, rstd][channels]
  bool weight;        // whether the gradient of W is wanted
  float* partial;     // of W, a row of Shares for each block
  float* sums;        // of the norms, [block][norm][bias, weight][channels]; null: their gradients are not wanted
};

inline constexpr int kSolveSums = 4;

enum class Type { kBFloat16, kFloat16 };

// What is compiled for a card: maps of these channels and sides.
struct Shape {
  int channels, side;
};

// The bytes of a sample's map in the order of threads; 0: there are no programs for such maps.
inline constexpr int kMostMapChannels = 128;
constexpr size_t kept_bytes(Shape shape) {
#define FASTODE_SIZE(channels_, side_, warps, units) \
  if (shape.channels == channels_ && shape.side == side_) return size_t{2} * channels_ * side_ * side_;
  FASTODE_CUDA_TILES(FASTODE_SIZE)
#undef FASTODE_SIZE
  return 0;
}

// The launchers: null, or why the program was not launched; and of those that a backward asks for first, how many
// blocks a launch will have. Those that begin with "batch" are of branches with a batch norm in training, by a
// cooperative launch, and of bfloat16 alone, in which such networks train.
using Reason = const char*;
// clang-format off
#define FASTODE_CUDA_PROGRAMS(each)                     \
  each(Reason, scheme_forward, SchemeCall)              \
  each(Reason, scheme_backward, BackwardCall)           \
  each(Reason, weight_gradients, WeightsCall)           \
  each(Reason, finish_gradients, FinishCall)            \
  each(Reason, descent_forward, DescentCall)            \
  each(Reason, descent_backward, DescentCall)           \
  each(Reason, batch_scheme_forward, SchemeCall)        \
  each(Reason, batch_scheme_backward, BackwardCall)     \
  each(Reason, batch_descent_forward, DescentCall)      \
  each(Reason, batch_descent_backward, DescentCall)     \
  each(Reason, march_forward, MarchCall)                \
  each(Reason, march_backward, MarchBackCall)           \
  each(Reason, solve_forward, SolveCall)                \
  each(Reason, solve_backward, SolveBackCall)           \
  each(int, scheme_backward_blocks, BackwardCall)       \
  each(int, descent_backward_blocks, DescentCall)       \
  each(int, batch_scheme_backward_blocks, BackwardCall) \
  each(int, batch_descent_backward_blocks, DescentCall) \
  each(int, march_backward_blocks, MarchBackCall)       \
  each(int, solve_backward_blocks, SolveBackCall)       \
  each(int, weight_gradients_blocks, WeightsCall)
// clang-format on

#define FASTODE_DECLARED(Result, name, Call) Result name(Type, Shape, const Call&, const Queue&);
FASTODE_CUDA_PROGRAMS(FASTODE_DECLARED)
#undef FASTODE_DECLARED

// The launchers of one dtype that are there, and null for the others. The operators are a library, and each kind of
// program is one for each dtype, which is built where the first call asks for it.
struct Programs {
#define FASTODE_SLOT(Result, name, Call) Result (*name)(Type, Shape, const Call&, const Queue&) = nullptr;
  FASTODE_CUDA_PROGRAMS(FASTODE_SLOT)
#undef FASTODE_SLOT
};

}  // namespace fastode::cuda

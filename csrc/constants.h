// The numbers that C++ and Python must agree on. Python reads them from this very text (fastode/native/constants.py),
// so each is written as `name = integer`.
#pragma once

#include <cstdint>

namespace fastode {

enum NormMode : int64_t {
  kNoNorm = 0,
  kGroupNorm = 1,
  kBatchNorm = 2,
  kFixedNorm = 3,  // with given statistics
};

enum Activation : int64_t {
  kIdentity = 0,
  kRelu = 1,
  kLeakyRelu = 2,
  kTanh = 3,
  kSoftplus = 4,
  kElu = 5,
  kSilu = 6,
  kGelu = 7,
  kSigmoid = 8,
};

// What a forward operator leaves to backward: nothing, tensors as many and as large as they come, or one tensor that
// stands for them, of which a tracer knows the shape (cpu/resident/ticket.h).
enum Keep : int64_t {
  kKeepNothing = 0,
  kKeepPieces = 1,
  kKeepTicket = 2,
};

// The terms of one combination, at most.
inline constexpr int64_t kMostTerms = 16;

namespace resident {

// The channels of either state of a skew pair, at most: a pixel's lie on the stack.
inline constexpr int64_t kMostChannels = 1024;

// How many integers and numbers describe a unit (engine.h).
inline constexpr int64_t kUnitIntegers = 7;
inline constexpr int64_t kUnitNumbers = 3;

// The bits that say which of a unit's or a norm's tensors are present. Running mean and variance come together.
enum Present : int64_t {
  kWeight = 1,
  kBias = 2,
  kRunning = 4,
  kConvWeight = 8,
  kConvBias = 16,
};

}  // namespace resident

// What the programs of csrc/cuda take at most: units of a branch, stages of an explicit scheme; steps of an IE-Skip
// that is differentiated, each of which has two streams whose weight gradients are added up, beside that of f(x).
inline constexpr int64_t kMostUnits = 3;
inline constexpr int64_t kMostStages = 16;
inline constexpr int64_t kMostSteps = 7;

// The maps that they are compiled for: each(channels, pixels of a side, warps of a block, units of a branch at most).
#define FASTODE_CUDA_TILES(each)                                                                                     \
  each(16, 32, 16, 3) each(16, 16, 8, 3) each(16, 8, 4, 3) each(32, 16, 16, 3) each(32, 8, 8, 3) each(64, 16, 16, 2) \
      each(64, 8, 8, 2)
}  // namespace fastode

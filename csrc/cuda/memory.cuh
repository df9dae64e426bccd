// What lies where in the shared memory of a block.
#pragma once

#include "tile.cuh"

namespace fastode::device {

// Shared memory of a block, from its beginning. Parameters lie there for all samples that the block takes.
template <class Tile>
struct Memory {
  static constexpr int C = Tile::kChannels;
  // Of each unit: the norm's weight and bias, the convolution's bias, and sums for the gradients of the first two.
  static constexpr int kNumbers = 5 * C;
  static constexpr int kMeans = 9, kSums = cuda::kMostSums;

  // `weights`: of how many units those of the convolutions lie there, too.
  static constexpr size_t bytes(int units, int weights) {
    return static_cast<size_t>(weights) * Tile::kWeightBytes + Tile::kMapBytes +
           (units * kNumbers + (kMeans + kSums * Tile::kDown) * C) * sizeof(float);
  }

  FASTODE_DEVICE Memory(int units, int weights) {
    map = shared_memory();
    numbers = reinterpret_cast<float*>(map + Tile::kMapBytes);
    mean = numbers + units * kNumbers;
    rstd = mean + C, means = rstd + C, partial = mean + kMeans * C;
    this->weights = reinterpret_cast<char*>(partial + kSums * Tile::kDown * C);
    end = this->weights + weights * Tile::kWeightBytes;
  }

  FASTODE_DEVICE char* weight(int unit) const { return weights + unit * Tile::kWeightBytes; }
  FASTODE_DEVICE float* norm_weight(int unit) const { return numbers + unit * kNumbers; }
  FASTODE_DEVICE float* norm_bias(int unit) const { return norm_weight(unit) + C; }
  FASTODE_DEVICE float* bias(int unit) const { return norm_weight(unit) + 2 * C; }
  FASTODE_DEVICE float* sums(int unit) const { return norm_weight(unit) + 3 * C; }

  char* map;
  float* numbers;
  float *mean, *rstd;  // of the norm at hand, [C]
  float* means;        // of its pull-back, [7][C]
  float* partial;      // sums of warps, [kSums][kDown][C]
  char *weights, *end;
};

}  // namespace fastode::device

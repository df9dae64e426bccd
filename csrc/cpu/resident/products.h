// Tiles as the products of bfloat16 matrices take them, on AMX (tile_products.h) and without it (dot_products.h).
#pragma once

#include <cstdint>

#include "conv_bf16.h"

namespace fastode::resident {

inline constexpr int64_t kTileRows = 16, kTileDepth = 32;              // of every tile; bfloat16 numbers in a row
inline constexpr int64_t kTileElements = kTileRows * kTileDepth;       // of a bfloat16 tile
inline constexpr int64_t kSumElements = kTileRows * (kTileDepth / 2);  // of a float32 tile

// Which rows of M tiles a product is of: of tile m the `count` from `first` on; of all tiles if that is 0.
struct TileRows {
  int tile = 0, first = 0, count = 0;
};

}  // namespace fastode::resident

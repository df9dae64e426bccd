// What the lanes of a warp exchange when they meet.
#pragma once

#include "simt.h"

namespace fastode::device::simt {

// `operands`: what each of the 32 lanes handed to meet().
void exchange(Kind kind, void* const* operands);

// The tensor core's instructions of a meeting: one for each tile of eight columns.
int tiles(Kind kind, void* const* operands);

// How many more turns than one for each matrix the banks of shared memory need to give ldmatrix its rows.
int conflicts(Kind kind, void* const* operands);

}  // namespace fastode::device::simt

// What the lanes of a warp exchange when they meet.
#pragma once

#include "simt.h"

namespace fastode::device::simt {

// `operands`: what each of the 32 lanes handed to meet().
void exchange(Kind kind, void* const* operands);

}  // namespace fastode::device::simt

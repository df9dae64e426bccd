// What the tests set on the machine and read from it.
#pragma once

#include <cstdint>

namespace fastode::device::simt {

enum Order { kForward, kReverse, kRandom };

// The order in which threads that can run do so, and that of a grid's blocks, from the next launch on.
void set_order(Order order, uint64_t seed);

// The launches, and the meetings of each kind, since the library was loaded: kKinds + 1 numbers.
const int64_t* counts();

}  // namespace fastode::device::simt

// What the tests set on the machine and read from it.
#pragma once

#include <cstdint>
#include <string>

namespace fastode::device::simt {

enum Order { kForward, kReverse, kRandom };

// The order in which threads that can run do so, and that of a grid's blocks, from the next launch on.
void set_order(Order order, uint64_t seed);

// How many blocks of a program run at a time, from the next launch on; at first two, so that a block takes several
// samples. It is the number of the card, too, for what is known of a card is kept by that.
void set_blocks(int blocks);
int blocks_at_a_time();

// Whether the card says how many blocks of a program run at a time.
void set_can_be_asked(bool can);
bool can_be_asked();

// Since the library was loaded: the launches, the meetings of each kind (of mma the products), and ldmatrix's conflicts
// of banks. kKinds + 2 numbers.
const int64_t* counts();

// The places of the barriers at which threads have met since the last call, as "file:line ".
std::string take_barriers();

// From the next launch on nobody waits at the barrier of this place; "": all barriers are waited at.
void leave_out(const std::string& barrier);

}  // namespace fastode::device::simt

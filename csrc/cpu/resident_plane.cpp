// Samples moved to the maps of resident programs and back.
#include "resident/plane_impl.h"

namespace fastode::resident {

FASTODE_MOVES(, float, float);
FASTODE_MOVES(, float, bfloat16);
FASTODE_MOVES(, bfloat16, bfloat16);
FASTODE_MOVES(, double, double);
FASTODE_MOVES(, double, bfloat16);

}  // namespace fastode::resident

// Samples moved to the maps of resident programs and back.
#include "resident/plane_impl.h"

namespace fastode::resident {

FASTODE_MOVES();

}  // namespace fastode::resident

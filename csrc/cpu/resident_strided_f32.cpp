#include "resident/strided_impl.h"

namespace fastode::resident {

FASTODE_STRIDED(, float, bfloat16);

}  // namespace fastode::resident

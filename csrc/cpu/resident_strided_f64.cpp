#include "resident/strided_impl.h"

namespace fastode::resident {

FASTODE_STRIDED(, double, float);

}  // namespace fastode::resident

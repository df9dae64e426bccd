#include "resident/conv_impl.h"
#include "resident/strided_impl.h"

namespace fastode::resident {

FASTODE_CONVOLUTIONS(, double, float);
FASTODE_STRIDED(, double, float);

}  // namespace fastode::resident

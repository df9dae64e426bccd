#include "resident/conv_impl.h"
#include "resident/strided_impl.h"
#include "resident/winograd_impl.h"

namespace fastode::resident {

FASTODE_CONVOLUTIONS(, float, bfloat16);
FASTODE_STRIDED(, float, bfloat16);
FASTODE_WINOGRAD(, float, bfloat16);

}  // namespace fastode::resident

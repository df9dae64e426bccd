#include "resident/winograd_impl.h"

namespace fastode::resident {

FASTODE_WINOGRAD(, float, bfloat16);

}  // namespace fastode::resident

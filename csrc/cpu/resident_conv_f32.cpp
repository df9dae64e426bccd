#include "resident/conv_impl.h"

namespace fastode::resident {

FASTODE_CONVOLUTIONS(, float, bfloat16);

}  // namespace fastode::resident

#include "resident/conv_impl.h"

namespace fastode::resident {

FASTODE_CONVOLUTIONS(, double, float);

}  // namespace fastode::resident

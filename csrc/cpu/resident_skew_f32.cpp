#include "resident/skew_instances.h"

namespace fastode::resident {

FASTODE_INSTANTIATE_SKEW(float);

}  // namespace fastode::resident

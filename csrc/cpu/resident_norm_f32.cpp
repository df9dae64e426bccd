#include "resident/norm_instances.h"

namespace fastode::resident {

FASTODE_INSTANTIATE_NORMS(float);

}  // namespace fastode::resident

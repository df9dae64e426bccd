#include "resident/blocks_instances.h"

namespace fastode::resident {

FASTODE_INSTANTIATE_BLOCKS(double);

}  // namespace fastode::resident

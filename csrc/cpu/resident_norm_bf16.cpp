#include "simd.h"

#if FASTODE_TILES

#include "resident/average_impl.h"
#include "resident/norm_instances.h"

namespace fastode::resident {

FASTODE_INSTANTIATE_NORMS(bfloat16);
FASTODE_AVERAGE(, bfloat16);

}  // namespace fastode::resident

#endif

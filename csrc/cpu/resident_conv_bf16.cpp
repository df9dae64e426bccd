#include "simd.h"

#if FASTODE_TILES

#include "resident/skew_bf16_impl.h"

#else

namespace fastode::resident {

bool has_tiles() { return false; }

}  // namespace fastode::resident

#endif

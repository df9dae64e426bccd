#include "simd.h"

#if FASTODE_TILES

#include "resident/engine_impl.h"
#include "resident/sweeps_impl.h"

namespace fastode::resident {

template class Branch<bfloat16>;
template void run_recorded<bfloat16, bfloat16>(const Call<float>&, const Recording<bfloat16>&);

}  // namespace fastode::resident

#endif

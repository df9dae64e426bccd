#include "resident/blocks_instances.h"

namespace fastode::resident {

FASTODE_INSTANTIATE_BLOCKS(float);
template void run_recorded<float, bfloat16>(const Call<float>&, const Recording<float>&);

}  // namespace fastode::resident

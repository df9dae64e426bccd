#include "resident/conv_bf16.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#include "resident/conv_bf16_impl.h"
#include "resident/gradient_bf16_impl.h"
#else

#include <cstdlib>

namespace fastode::resident {

bool has_tiles() { return false; }
int64_t tile_weights_size(const ConvShape&) { return 0; }
int64_t tile_scratch_size(const Plane<float>&, int64_t, int64_t, int64_t) { return 0; }

// Nothing calls these where has_tiles() is false.
void clear_narrow_halo(const Plane<float>&, int64_t, bfloat16*) { std::abort(); }
void narrow_map(const Plane<float>&, int64_t, const View<float>&, bfloat16*) { std::abort(); }
template <class T>
void pack_tile_weights(const ConvShape&, bool, const T*, const int64_t*, float*) {
  std::abort();
}
template void pack_tile_weights(const ConvShape&, bool, const float*, const int64_t*, float*);
template void pack_tile_weights(const ConvShape&, bool, const bfloat16*, const int64_t*, float*);
void convolve(const Plane<float>&, const ConvShape&, const float*, const float*, const TileJob*, int64_t) {
  std::abort();
}
void weight_gradient(const Plane<float>&, const ConvShape&, const GradientPair<float>*, int64_t, float*, void*) {
  std::abort();
}

}  // namespace fastode::resident

#endif

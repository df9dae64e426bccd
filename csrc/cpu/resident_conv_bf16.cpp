#include "resident/skew_bf16.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#include "resident/skew_bf16_impl.h"
#else

#include <cstdlib>

namespace fastode::resident {

bool has_tiles() { return false; }
int64_t tile_weights_size(const ConvShape&) { return 0; }
int64_t tile_scratch_size(const Plane<float>&, const ConvShape&, int64_t, int64_t) { return 0; }

// Nothing calls these where has_tiles() is false.
template <class T>
void pack_tile_weights(const ConvShape&, bool, const T*, const int64_t*, float*) {
  std::abort();
}
template void pack_tile_weights(const ConvShape&, bool, const float*, const int64_t*, float*);
template void pack_tile_weights(const ConvShape&, bool, const bfloat16*, const int64_t*, float*);
void convolve(const Plane<float>&, const ConvShape&, int64_t, const float*, const float*, const ConvJob<bfloat16>*,
              int64_t, Ahead*) {
  std::abort();
}
void weight_gradient(const Plane<float>&, const ConvShape&, int64_t, const GradientPair<bfloat16>*, int64_t, float*,
                     void*) {
  std::abort();
}

SkewTiles::SkewTiles(const SkewShape&) { std::abort(); }
int64_t SkewTiles::down_size() const { std::abort(); }
int64_t SkewTiles::up_size() const { std::abort(); }
int64_t SkewTiles::gradient_scratch() const { std::abort(); }
template <class T>
void SkewTiles::pack(const T*, const int64_t*, float*, float*) const {
  std::abort();
}
template void SkewTiles::pack(const float*, const int64_t*, float*, float*) const;
template void SkewTiles::pack(const bfloat16*, const int64_t*, float*, float*) const;
void SkewTiles::round(bool, const View<float>&, int64_t, int64_t, bfloat16*) const { std::abort(); }
void SkewTiles::down(const float*, const bfloat16*, int64_t, int64_t, const View<float>&, const Combine<float>&,
                     Ahead*) const {
  std::abort();
}
void SkewTiles::up(const float*, const bfloat16*, int64_t, int64_t, const View<float>&, const Combine<float>&,
                   Ahead*) const {
  std::abort();
}
void SkewTiles::weight_gradient(const bfloat16*, const bfloat16*, float*, bfloat16*) const { std::abort(); }

}  // namespace fastode::resident

#endif

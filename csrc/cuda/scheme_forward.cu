#include "scheme.cuh"
#include "shapes.cuh"

namespace fastode::cuda {

const char* scheme_forward(Type type, Shape shape, const SchemeCall& call, void* stream) {
  return device::launch_program<device::SchemeForward>(type, shape, call, stream);
}

size_t kept_bytes(Shape shape) {
  size_t bytes = 0;
  device::with_tile<device::BFloat16>(shape, [&]<class Tile>() { bytes = Tile::kKeptBytes; });
  return bytes;
}

size_t shared_bytes(Shape shape, int units) {
  size_t bytes = 0;
  device::with_tile<device::BFloat16>(shape, [&]<class Tile>() { bytes = device::Memory<Tile>::bytes(units); });
  return bytes;
}

}  // namespace fastode::cuda

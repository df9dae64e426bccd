// What the programs ask for in shared memory, by the device code's own reckoning.
#include <torch/csrc/stable/library.h>

#include "shapes.cuh"

namespace fastode::device {

namespace {

int64_t shared_bytes(int64_t channels, int64_t side, int64_t units) {
  int64_t bytes = 0;
  with_tile<BFloat16>({static_cast<int>(channels), static_cast<int>(side)}, [&]<class Tile>() {
    bytes = static_cast<int64_t>(Memory<Tile>::bytes(static_cast<int>(units), static_cast<int>(units)));
  });
  return bytes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastode_simt, m) { m.def("shared_bytes(int channels, int side, int units) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(fastode_simt, CompositeExplicitAutograd, m) {
  m.impl("shared_bytes", TORCH_BOX(&shared_bytes));
}

}  // namespace fastode::device

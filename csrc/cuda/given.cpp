// In every library of programs: hands the launchers that it has to the operators' library.
#include "programs.h"

namespace fastode::cuda {

// A launcher that is compiled into another library is null here.
#define FASTODE_PERHAPS(Result, name, Call) __attribute__((weak)) Result name(Type, Shape, const Call&, const Queue&);
FASTODE_CUDA_PROGRAMS(FASTODE_PERHAPS)
#undef FASTODE_PERHAPS

}  // namespace fastode::cuda

extern "C" __attribute__((visibility("default"))) void fastode_give(fastode::cuda::Programs* programs) {
#define FASTODE_GIVEN(Result, name, Call) \
  if (fastode::cuda::name) programs->name = fastode::cuda::name;
  FASTODE_CUDA_PROGRAMS(FASTODE_GIVEN)
#undef FASTODE_GIVEN
}

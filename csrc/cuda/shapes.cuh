// The maps for which programs are compiled, and the launch of one.
#pragma once

#include <algorithm>
#include <type_traits>

#include "branch.cuh"

namespace fastode::device {

// Calls f<Tile>() for a shape, or not at all.
template <class T, class F>
void with_tile(cuda::Shape shape, const F& f) {
#define FASTODE_TILE(channels_, side_, warps, units)                                           \
  static_assert(Memory<Tile<T, channels_, side_, warps>>::bytes(units, units) <= kMostShared); \
  if (shape.channels == channels_ && shape.side == side_) f.template operator()<Tile<T, channels_, side_, warps>>();
  FASTODE_CUDA_TILES(FASTODE_TILE)
#undef FASTODE_TILE
}

// Calls f<T>() for a dtype: of a library of one dtype for that one.
template <class F>
void with_type(cuda::Type type, const F& f) {
#ifdef FASTODE_TYPE
  static_cast<void>(type);
  f.template operator()<FASTODE_TYPE>();
#else
  if (type == cuda::Type::kBFloat16)
    f.template operator()<BFloat16>();
  else
    f.template operator()<Float16>();
#endif
}

// Calls f<Tile>() for a dtype and a shape.
template <class F>
void with_tile(cuda::Type type, cuda::Shape shape, const F& f) {
  with_type(type, [&]<class T>() { with_tile<T>(shape, f); });
}

inline constexpr const char* kNoProgram = "there is no program for such maps";

// How many blocks of a program run at a time, asked once for each thread's last card and size: to ask takes as long as
// a launch.
template <class Program, class Call>
int known_blocks(const Launch& how) {
  struct Answer {
    int device, most;
    size_t bytes;
  };
  thread_local Answer last{-1, 0, 0};
  if (last.device != how.device || last.bytes != how.shared_bytes) {
    const int most = most_blocks<Program, Call>(how);
    if (most == 0) return 0;  // the next call may be able to ask
    last = {how.device, most, how.shared_bytes};
  }
  return last.most;
}

// A launch of a program with a block for each of so many items, but no more than run at a time: a block reads all
// parameters.
template <class Program, class Call>
Launch plan(int items, size_t bytes, const cuda::Queue& queue) {
  Launch how{items, Program::threads, bytes, 1, false, queue.stream, queue.device};
  const int most = known_blocks<Program, Call>(how);
  if (most > 0) how.blocks = std::min(how.blocks, most);
  return how;
}

// Whether the blocks of a program meet, and so must all be there at once.
template <class Program>
inline constexpr bool kMeets = requires { Program::meets; };

// The shared memory of a program: its own, or that of a branch of so many units.
template <class Program, class Tile>
constexpr size_t bytes_of(int units) {
  if constexpr (requires { Program::bytes(units); })
    return Program::bytes(units);
  else
    return Memory<Tile>::bytes(units, units);
}

// Calls f<Program<Tile>>() with the launch of a program that takes sample by sample. One whose blocks meet is compiled
// for bfloat16 alone.
template <template <class> class Program, class Call, class F>
void plan_by_sample(cuda::Type type, cuda::Shape shape, int samples, int units, const cuda::Queue& queue, const F& f) {
  const CurrentDevice here(queue.device);
  with_tile(type, shape, [&]<class Tile>() {
    using P = Program<Tile>;
    if constexpr (!kMeets<P> || std::is_same_v<typename Tile::Type, BFloat16>) {
      Launch how = plan<P, Call>(samples, bytes_of<P, Tile>(units), queue);
      how.cooperative = kMeets<P>;
      f.template operator()<P>(how);
    }
  });
}

template <template <class> class Program, class Call>
const char* launch_by_sample(cuda::Type type, cuda::Shape shape, const Call& call, int samples, int units,
                             const cuda::Queue& queue) {
  const char* reason = kNoProgram;
  plan_by_sample<Program, Call>(type, shape, samples, units, queue,
                                [&]<class P>(const Launch& how) { reason = launch<P>(how, call); });
  return reason;
}

// How many blocks that launch has.
template <template <class> class Program, class Call>
int blocks_by_sample(cuda::Type type, cuda::Shape shape, int samples, int units, const cuda::Queue& queue) {
  int blocks = 0;
  plan_by_sample<Program, Call>(type, shape, samples, units, queue,
                                [&]<class P>(const Launch& how) { blocks = how.blocks; });
  return blocks;
}

}  // namespace fastode::device

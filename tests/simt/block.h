// A block's shared memory, and what it can tell of what was written where nothing may be.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "fiber.h"

namespace fastode::device::simt {

constexpr size_t kGuard = 1024;  // bytes before and after what a block may touch
constexpr char kUnset = '\xff';  // shared memory before it is written: NaN in each of the formats

struct Block {
  struct Gap {
    char* begin;
    size_t bytes;
  };

  char* shared = nullptr;
  size_t bytes = 0;
  int running = 0;  // threads
  std::vector<Gap> gaps;

  // Bytes of a block in a row of them: no more aligned than is promised, to 16 bytes.
  static size_t stride(size_t bytes) { return (bytes + 2 * kGuard + 127) / 128 * 128 + 128; }
  static char* place(char* first, size_t bytes, int index) { return first + index * stride(bytes) + kGuard + 16; }

  void open(int threads) {
    running = threads;
    gaps.clear();
    std::memset(shared - kGuard, kUnset, bytes + 2 * kGuard);
    add_gap(shared - kGuard, kGuard);
    add_gap(shared + bytes, kGuard);
  }

  void add_gap(char* begin, size_t size) {
    gaps.push_back({begin, size});
#if FASTODE_ASAN
    ASAN_POISON_MEMORY_REGION(begin, size);
#endif
  }

  bool contains(const void* begin, size_t size) const {
    const char* first = static_cast<const char*>(begin);
    return first >= shared && first + size <= shared + bytes;
  }

  // What was written to a gap, or nothing. From now on the memory is no one's.
  std::string close() {
#if FASTODE_ASAN
    ASAN_UNPOISON_MEMORY_REGION(shared - kGuard, bytes + 2 * kGuard);
#endif
    std::string why;
    for (const Gap& gap : gaps) {
      const char* found = written(gap.begin, gap.bytes);
      if (found && why.empty())
        why = "wrote byte " + std::to_string(found - shared) + " of its shared memory, which is " +
              (contains(found, 1) ? "a gap" : "beyond the " + std::to_string(bytes) + " asked for");
    }
    std::memset(shared - kGuard, kUnset, bytes + 2 * kGuard);
    return why;
  }

  // Whether something was written after close().
  bool touched() const { return written(shared - kGuard, bytes + 2 * kGuard); }

 private:
  static const char* written(const char* begin, size_t size) {
    const char* found = std::find_if(begin, begin + size, [](char byte) { return byte != kUnset; });
    return found == begin + size ? nullptr : found;
  }
};

}  // namespace fastode::device::simt

// Large pieces of memory that go from call to call.
#pragma once

#include <mutex>
#include <numeric>
#include <optional>

#include "../../environment.h"
#include "new_tensors.h"

namespace fastode::resident {

// Large pieces that calls have given back: malloc would give their pages to the system and get others, one by one,
// which takes longer than a step of a few samples. At most kPieces are kept, of kMost bytes together; none with
// FASTODE_LESS_MEMORY=1. Below kLeast glibc's malloc learns to keep the memory by itself, and what it gives next lies
// in the cache.
class SpareMemory {
 public:
  static constexpr int64_t kLeast = int64_t{1} << 25, kMost = int64_t{1} << 27;

  // The process's. It is never destroyed: a call may outlast main.
  static SpareMemory& get() {
    static auto* const memory = new SpareMemory;
    return *memory;
  }

  // Bytes: one that is kept, if it is large enough and not twice as large, else a new one.
  Tensor take(int64_t bytes) {
    if (bytes >= kLeast) {
      const std::lock_guard lock(mutex_);
      const auto fits = [=](const Tensor& piece) { return piece.numel() >= bytes && piece.numel() < 2 * bytes; };
      const auto found = std::find_if(pieces_.begin(), pieces_.end(), fits);
      if (found != pieces_.end()) {
        const Tensor piece = *found;
        pieces_.erase(found);
        return fresh(piece);
      }
    }
    return new_vector(bytes, ScalarType::Byte);
  }
  // Those that were given back before the others make room.
  void give(const Tensor& piece) {
    if (!keeps_ || piece.numel() < kLeast) return;
    const std::lock_guard lock(mutex_);
    pieces_.push_back(piece);
    const auto too_much = [&] {
      const auto add = [](int64_t sum, const Tensor& each) { return sum + each.numel(); };
      return pieces_.size() > kPieces || std::accumulate(pieces_.begin(), pieces_.end(), int64_t{0}, add) > kMost;
    };
    while (too_much()) pieces_.erase(pieces_.begin());
  }

 private:
  static constexpr size_t kPieces = 4;

  std::mutex mutex_;
  std::vector<Tensor> pieces_;  // of bytes; those that were given back last behind
  const bool keeps_ = !asks_for_less_memory();
};

// One piece of memory for the time of a call, uninitialised: in the object itself where it is little, because malloc
// tidies up whenever it is asked for more than a kilobyte.
class CallMemory {
 public:
  CallMemory() = default;
  CallMemory(const CallMemory&) = delete;
  CallMemory& operator=(const CallMemory&) = delete;
  ~CallMemory() {
    if (tensor_) SpareMemory::get().give(*tensor_);
  }

  void* take(int64_t bytes) {
    if (bytes > kHere) return tensor_.emplace(SpareMemory::get().take(bytes)).data_ptr();
    fill_fresh(here_, bytes);
    return here_;
  }

 private:
  static constexpr int64_t kHere = 3 << 14;

  alignas(64) char here_[kHere];
  std::optional<Tensor> tensor_;
};

}  // namespace fastode::resident

// Scratch handed out in order from one allocation; with a null base it only counts.
//
// A debug build (FASTODE_DEBUG) fills every piece with NaN and lays it between guard words, so close that the first
// byte beyond either end is one of them; `check` throws with the piece's number and size where one was written.
#pragma once

#include <cstdint>
#ifdef FASTODE_DEBUG
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>
#endif

namespace fastode::resident {

inline constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// In a debug build every bit is set, which is NaN in every floating type.
inline void fill_fresh([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef FASTODE_DEBUG
  if (bytes > 0) std::memset(data, 0xff, static_cast<size_t>(bytes));
#endif
}

class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class A>
  A* take(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(A)), rounded = divide_up(bytes, 64) * 64;
    used_ += kGuard;
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += rounded + kGuard;
#ifdef FASTODE_DEBUG
    if (piece) {
      std::memset(piece - kGuard, kGuardByte, kGuard);
      fill_fresh(piece, bytes);
      std::memset(piece + bytes, kGuardByte, rounded - bytes + kGuard);
      pieces_.push_back({piece, bytes});
    }
#endif
    return reinterpret_cast<A*>(piece);
  }

  int64_t used() const { return used_; }

  // Throws std::runtime_error where something was written before or behind a piece; looks in debug builds only.
  void check() const {
#ifdef FASTODE_DEBUG
    for (size_t i = 0; i < pieces_.size(); ++i) {
      const auto [piece, bytes] = pieces_[i];
      const int64_t behind = divide_up(bytes, 64) * 64 - bytes + kGuard;
      check_(i, "before its start", piece - kGuard, kGuard);
      check_(i, "behind its end", piece + bytes, behind);
    }
#endif
  }

 private:
#ifdef FASTODE_DEBUG
  static constexpr int64_t kGuard = 64;
  static constexpr unsigned char kGuardByte = 0x5a;

  struct Piece {
    char* data;
    int64_t bytes;
  };

  void check_(size_t index, const char* where, const char* guard, int64_t bytes) const {
    const char* end = guard + bytes;
    const char* hit = std::find_if(guard, end, [](char c) { return static_cast<unsigned char>(c) != kGuardByte; });
    if (hit == end) return;
    throw std::runtime_error("scratch piece " + std::to_string(index + 1) + " of " + std::to_string(pieces_.size()) +
                             " (" + std::to_string(pieces_[index].bytes) + " bytes) was written " + where);
  }

  std::vector<Piece> pieces_;
#else
  static constexpr int64_t kGuard = 0;
#endif

  char* base_;
  int64_t used_ = 0;
};

}  // namespace fastode::resident

// Whose memory a program works in, and when its segments run.
//
// A program is recorded: each of its steps queues segments, which know how to do their part for a few samples. `flush`
// takes a range of samples through everything that is queued, while it stays in the cache, before it takes the next.
// Only a batch norm in training needs all samples at one point and so a flush there; with other norms the whole
// program is one flush. Flushes go up and down the samples in turn, because those at which one ends are in the cache
// when the next begins.
#pragma once

#include <atomic>
#include <functional>
#include <list>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../parallel.h"
#include "conv_bf16.h"
#include "spare.h"

namespace fastode::resident {

inline constexpr int64_t kGroup = kMostJobs;  // samples in a range at most

// Zeros, by all threads where they are many: fresh pages are cleared as they are touched.
template <class T>
void fill_zeros(T* to, int64_t count) {
  constexpr int64_t stretch = 1 << 16;  // bytes
  if (count * static_cast<int64_t>(sizeof(T)) <= 2 * stretch) return void(std::fill_n(to, count, T{}));
  in_parallel(count, stretch / static_cast<int64_t>(sizeof(T)),
              [=](int64_t begin, int64_t end) { std::fill(to + begin, to + end, T{}); });
}

// The samples a segment works on now: [first, first + count) of the batch, in which of its parts; and what the worker
// goes over after them.
struct Range {
  int64_t worker, part, first, count;
  Ahead* ahead;
};

// A map of the batch: where it begins, and bytes of a sample.
struct Touched {
  const char* at;
  int64_t stride;
};

// Whose samples a piece of memory holds: all of the batch's, or those of each worker's current range.
enum class Extent { kBatch, kRange };

class Schedule {
 public:
  // Worker w of W takes the samples [w N / W, (w + 1) N / W), `group` of them at a time, and then what others have
  // left, from the end that they would come to last. What segments add up they add for each of `parts`, as many of
  // every worker: one that is begun is gone through by whoever has begun it, so that sums have the same order each
  // time. With no parts nothing is added up, and every range is taken by itself.
  Schedule(int64_t samples, int64_t workers, int64_t group, int64_t parts)
      : samples(samples), workers(workers), group(group), parts(parts) {}

  // `touched`: the maps of the batch that f goes over.
  template <class F>
  void each(F f, const std::vector<Touched>& touched = {}) {
    queue_.emplace_back(std::move(f));
    for (const Touched& map : touched) {
      const auto same = [&](const Touched& other) { return other.at == map.at; };
      if (std::none_of(touched_.begin(), touched_.end(), same)) touched_.push_back(map);
    }
  }

  // Whether some worker has another range after the first.
  bool looks_ahead() const { return divide_up(samples, workers) > group || parts > workers; }

  // The next flush goes up, whatever ran before: what follows sums in the same order each time.
  void rewind() { down_ = false; }

  void flush() {
    if (queue_.empty()) return;
    std::vector<Left> left(workers);
    const auto work = [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w)
        for (int64_t next = 0; next < workers; ++next) {
          const int64_t owner = (w + next) % workers, pieces = pieces_of(owner);
          for (int64_t k; (k = left[owner].take(pieces, next > 0)) >= 0;) run(w, owner, k, pieces);
        }
    };
    if (workers == 1)
      work(0, 1);
    else
      in_parallel(workers, 1, work);
    queue_.clear();
    touched_.clear();
    down_ = !down_;
  }

  const int64_t samples, workers, group, parts;

 private:
  // How many pieces of a worker's are taken already, from the front and from the back.
  class alignas(64) Left {
   public:
    // The next one, or -1: there is none.
    int64_t take(int64_t pieces, bool back) {
      uint64_t now = gone_.load(std::memory_order_relaxed);
      for (;;) {
        const int64_t front = now & kFront, behind = now >> 32;
        if (front + behind >= pieces) return -1;
        if (gone_.compare_exchange_weak(now, now + (back ? kFront + 1 : 1), std::memory_order_relaxed))
          return back ? pieces - 1 - behind : front;
      }
    }

   private:
    static constexpr uint64_t kFront = 0xffffffffu;
    std::atomic<uint64_t> gone_{0};
  };

  // Samples, up to the last one's end.
  struct Span {
    int64_t first, last;
  };

  Span of_worker(int64_t w) const { return {w * samples / workers, (w + 1) * samples / workers}; }
  // What is taken at once: parts, or ranges where there are none.
  int64_t pieces_of(int64_t w) const {
    const Span own = of_worker(w);
    return parts > 0 ? parts / workers : divide_up(own.last - own.first, group);
  }
  // The k-th in the order in which they are taken.
  int64_t turned(int64_t k, int64_t count) const { return down_ ? count - 1 - k : k; }
  int64_t part_of(int64_t owner, int64_t k, int64_t pieces) const { return owner * pieces + turned(k, pieces); }
  Span piece(int64_t owner, int64_t k, int64_t pieces) const {
    if (parts > 0) {
      const int64_t part = part_of(owner, k, pieces);
      return {part * samples / parts, (part + 1) * samples / parts};
    }
    return range_of(of_worker(owner), k);
  }
  Span range_of(const Span& all, int64_t r) const {
    const int64_t first = all.first + turned(r, divide_up(all.last - all.first, group)) * group;
    return {first, std::min(first + group, all.last)};
  }

  // Has a worker take an owner's k-th piece through all that is queued.
  void run(int64_t worker, int64_t owner, int64_t k, int64_t pieces) const {
    const Span all = piece(owner, k, pieces);
    const int64_t ranges = divide_up(all.last - all.first, group);
    for (int64_t r = 0; r < ranges; ++r) {
      const Span now = range_of(all, r);
      Ahead ahead;
      if (r + 1 < ranges || k + 1 < pieces) {
        const Span next = range_of(r + 1 < ranges ? all : piece(owner, k + 1, pieces), r + 1 < ranges ? r + 1 : 0);
        for (const Touched& map : touched_)
          ahead.add(map.at + next.first * map.stride, (next.last - next.first) * map.stride);
      }
      const Range range{worker, parts > 0 ? part_of(owner, k, pieces) : 0, now.first, now.last - now.first, &ahead};
      for (const auto& segment : queue_) segment(range);
    }
  }

  std::vector<std::function<void(const Range&)>> queue_;
  std::vector<Touched> touched_;
  bool down_ = false;
};

// A feature map of several samples.
template <class T>
struct Map {
  View<T> view = {};   // of the first sample
  int64_t stride = 0;  // elements from one sample to the next, or from one `together` to the next
  int64_t blocks = 0;
  Extent extent = Extent::kBatch;
  int64_t per_worker = 0;  // samples per worker, for kRange
  bool pinned = false;     // is no one's scratch
  bool halo = false;       // has a zero one around it
  int64_t together = 1;    // samples whose pixels take turns
  int64_t turn = 0;        // elements from one of these to the next
  int64_t phase = 0;       // elements from the pixels of one parity to those of the next, where these lie apart

  explicit operator bool() const { return blocks > 0; }
  View<T> at(const Range& range, int64_t i) const {
    View<T> moved = view;
    const int64_t n = extent == Extent::kRange ? range.worker * per_worker + i : range.first + i;
    moved.at += together == 1 ? n * stride : n / together * stride + n % together * turn;
    return moved;
  }
};

// One row of numbers per sample, or one for all.
template <class A>
struct Rows {
  A* base = nullptr;
  int64_t stride = 0;  // 0: one row for all samples
  Extent extent = Extent::kBatch;
  int64_t per_worker = 0;

  A* at(const Range& range, int64_t i) const {
    return base + (extent == Extent::kRange ? range.worker * per_worker + i : range.first + i) * stride;
  }
};

// Memory from torch, where its profiler sees it: large pieces in tensors of their own, small ones together, of which
// the first lie in the object itself, so that a small call allocates nothing.
class Scratch {
 public:
  Scratch() { shared_ = &arenas_.emplace_back(here_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    for (const Tensor& piece : tensors_) SpareMemory::get().give(piece);
  }

  template <class T>
  T* take(int64_t count) {
    Arena needed(nullptr);
    needed.take<T>(count);
    if (needed.used() > kChunk / 2) return arenas_.emplace_back(allocate(needed.used())).template take<T>(count);
    if (shared_->used() + needed.used() > room_) {
      room_ = kChunk;
      shared_ = &arenas_.emplace_back(allocate(kChunk));
    }
    return shared_->template take<T>(count);
  }

  void check() const {
    for (const Arena& arena : arenas_) arena.check();
  }

 private:
  static constexpr int64_t kHere = 1 << 15, kChunk = 1 << 16;

  void* allocate(int64_t bytes) { return tensors_.emplace_back(SpareMemory::get().take(bytes)).data_ptr(); }

  alignas(64) char here_[kHere];
  std::vector<Tensor> tensors_;
  std::list<Arena> arenas_;
  Arena* shared_;
  int64_t room_ = kHere;  // of `shared_`
};

// What forward leaves to backward: made by a forward program and found again, in the same order, by the backward one.
// Little of it lies in one tensor, because a tensor for each piece takes longer than a small map's arithmetic; of much
// every piece has its own, so that the allocator can give the next call the same pages.
class Kept {
 public:
  explicit Kept(std::vector<Tensor> pieces) : found(!pieces.empty()), pieces_(std::move(pieces)) {}

  // Bytes of a piece of so many elements in the common tensor.
  template <class A>
  static int64_t room(int64_t length) {
    return divide_up(length * static_cast<int64_t>(sizeof(A)), 64) * 64;
  }

  // Says how much all pieces take together, by `room`, before the first is taken.
  void reserve(int64_t bytes) {
    if (bytes == 0 || bytes > kTogether) return;
    if (!found) pieces_.push_back(new_vector(bytes / sizeof(float), ScalarType::Float));
    if (pieces_.size() != 1 || pieces_[0].numel() * static_cast<int64_t>(sizeof(float)) != bytes)
      throw std::logic_error("backward looks for other than what forward has kept");
    common_ = static_cast<char*>(pieces_[0].data_ptr()), left_ = bytes;
  }

  template <class A>
  A* take(int64_t length) {
    if (common_) {
      char* piece = common_;
      common_ += room<A>(length), left_ -= room<A>(length);
      if (left_ < 0) throw std::logic_error("more is kept for backward than was reserved");
      return reinterpret_cast<A*>(piece);
    }
    if (!found) {
      const auto type = std::is_same_v<A, double>     ? ScalarType::Double
                        : std::is_same_v<A, bfloat16> ? ScalarType::BFloat16
                                                      : ScalarType::Float;
      pieces_.push_back(new_vector(length, type));
    }
    return static_cast<A*>(pieces_[next_++].data_ptr());
  }

  // Throws where less was taken than reserved.
  void check() const {
    if (left_ > 0) throw std::logic_error("less is kept for backward than was reserved");
  }

  const std::vector<Tensor>& pieces() const { return pieces_; }
  const bool found;

 private:
  static constexpr int64_t kTogether = 1 << 17;  // below what malloc maps apart

  std::vector<Tensor> pieces_;
  size_t next_ = 0;
  char* common_ = nullptr;
  int64_t left_ = 0;
};

// A program's maps. Those that cross a batch norm's barrier hold the batch, as all do where the samples are coupled;
// otherwise a worker has room for its current range. A map that is given back is taken again by what is recorded later:
// a sample's segments run in the order of their recording, so it is free by then.
template <class T>
class Memory {
 public:
  using A = Number<T>;

  Memory(const Plane<A>& plane, const Schedule& schedule, bool coupled, Kept* kept)
      : plane(plane), coupled(coupled), kept(kept), schedule_(schedule) {}

  Map<T> take(int64_t blocks) { return take(blocks, plane); }

  // A map on a plane of its own. It goes over one of another plane that was given back.
  Map<T> take(int64_t blocks, const Plane<A>& on) {
    const int64_t stride = blocks * on.pixels() * Plane<A>::lanes;
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it)
      if (it->view.pixel == Plane<A>::lanes ? it->stride >= stride : it->blocks == blocks)
        if (best == free_.end() || it->stride <= best->stride) best = it;  // of equals the last, still in the cache
    if (best != free_.end()) {
      Map<T> map = *best;
      free_.erase(best);
      map.blocks = blocks;
      if (map.view.pixel == Plane<A>::lanes) map.view = on.compact(map.view.at);
      return map;
    }
    const auto [base, extent, per_worker] = own<T>(stride);
    return {on.compact(base), stride, blocks, extent, per_worker};
  }

  void give(const Map<T>& map) {
    if (map && !map.pinned && (map.extent == Extent::kBatch) == coupled) free_.push_back(map);
  }

  // Of each worker's current range, with a zero halo: what a convolution reads.
  Map<T> padded(int64_t blocks, int64_t together) { return padded(blocks, together, plane); }
  // With `apart` the pixels of each parity lie on a plane `on` of their own.
  Map<T> padded(int64_t blocks, int64_t together, const Plane<A>& on, bool apart = false) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      const Narrow narrow(on, blocks * Narrow::lanes, together);
      const int64_t one = divide_up(narrow.elements, 32) * 32, stride = apart ? 4 * one : one;
      const int64_t sets = divide_up(schedule_.group, together);
      T* base = scratch_.take<T>(stride * sets * schedule_.workers);
      fill_zeros(base, stride * sets * schedule_.workers);
      return {narrow.view(base), stride,       blocks,         Extent::kRange, sets * together, false, true,
              together,          narrow.depth, apart ? one : 0};
    } else {
      const int64_t stride = blocks * on.size, count = schedule_.workers * schedule_.group;
      const View<T> view = on.padded(scratch_.take<T>(stride * count));
      for (int64_t n = 0; n < count; ++n) {
        View<T> sample = view;
        sample.at += n * stride;
        clear_halo(on, sample, blocks);
      }
      return {view, stride, blocks, Extent::kRange, schedule_.group, false, true};
    }
  }

  // A map that is left to backward, where anything is; else as take(). A backward program may write over it.
  Map<T> keep(int64_t blocks) { return keep(blocks, plane); }
  Map<T> keep(int64_t blocks, const Plane<A>& on) {
    if (!kept) return take(blocks, on);
    const int64_t stride = blocks * on.pixels() * Plane<A>::lanes;
    T* base = kept->take<T>(stride * schedule_.samples);
    return {on.compact(base), stride, blocks, Extent::kBatch, 0, !kept->found};
  }

  // Bytes that `keep` and `keep_rows` take where they are reserved.
  int64_t room(int64_t blocks) const { return room(blocks, plane); }
  int64_t room(int64_t blocks, const Plane<A>& on) const {
    return Kept::room<T>(blocks * on.pixels() * Plane<A>::lanes * schedule_.samples);
  }
  int64_t room_of_rows(int64_t length) const { return Kept::room<A>(length * schedule_.samples); }

  Rows<A> rows(int64_t length) {
    const auto [base, extent, per_worker] = own<A>(length);
    return {base, length, extent, per_worker};
  }
  Rows<A> one_row(int64_t length) { return {scratch_.take<A>(length)}; }
  Rows<A> keep_rows(int64_t length) { return {kept->take<A>(length * schedule_.samples), length}; }
  Rows<A> keep_one_row(int64_t length) { return {kept->take<A>(length)}; }

  // `length` elements for each worker.
  template <class U>
  U* per_worker(int64_t length) {
    return scratch_.take<U>(length * schedule_.workers);
  }

  // Throws where something was written beside a piece of this memory; looks in debug builds only.
  void check() const { scratch_.check(); }

  const Plane<A>& plane;
  const bool coupled;
  Kept* const kept;

 private:
  template <class U>
  struct Own {
    U* base;
    Extent extent;
    int64_t per_worker;
  };

  template <class U>
  Own<U> own(int64_t length) {
    if (coupled) return {scratch_.take<U>(length * schedule_.samples), Extent::kBatch, 0};
    return {scratch_.take<U>(length * schedule_.workers * schedule_.group), Extent::kRange, schedule_.group};
  }

  const Schedule& schedule_;
  Scratch scratch_;
  std::list<Map<T>> free_;
};

}  // namespace fastode::resident

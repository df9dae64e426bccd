// The machine: fibers that run until they have to wait, and the meetings at which they wait for each other.
#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "block.h"
#include "collectives.h"
#include "control.h"

namespace fastode::device::simt {

Thread* running;

namespace {

constexpr const char* kNames[] = {"block_barrier", "cluster_barrier",    "grid_barrier", "warp_barrier",
                                  "shuffle_xor",   "mma_bf16",           "mma_f16",      "mma_tf32",
                                  "ldmatrix",      "ldmatrix_transposed"};
static_assert(std::size(kNames) == kKinds);

// Threads first … first + size - 1, which meet.
struct Group {
  int first, size;
  int waiting = 0;
  int opener = 0;
};

struct Fiber : Thread {
  Stack stack;
  int index = 0;
  Group* groups[4] = {};  // its block, cluster, grid and warp
  const Site* waits = nullptr;
  Kind kind{};
  bool left = false;
};

std::string place(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line());
}

std::string at(Kind kind, const Site& site) { return std::string(kNames[kind]) + " (" + place(site) + ")"; }

std::string name_of(const Thread& thread) {
  return "thread " + std::to_string(thread.thread) + " of block " + std::to_string(thread.block);
}

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

class Machine {
 public:
  Order order = kForward;
  uint64_t seed = 0;
  int blocks_at_a_time = 2;
  bool can_be_asked = true;
  int64_t counted[kKinds + 2] = {};
  std::string left_out;            // the place of a barrier at which nobody waits
  std::set<std::string> barriers;  // the places of those at which threads have met

  const char* launch(const Launch& how, int most_threads, Program program, const void* arguments) {
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    error_ = refused(how, most_threads);
    if (error_.empty()) {
      ++counted[0];
      how_ = how, program_ = program, arguments_ = arguments, random_ = seed * 0x9e3779b97f4a7c15u + 1;
      const int together = how.cooperative ? how.blocks : how.cluster;
      allocate(together);
      std::vector<int> turns(how.blocks / together);
      std::iota(turns.begin(), turns.end(), 0);
      if (order == kReverse) std::reverse(turns.begin(), turns.end());
      if (order == kRandom)
        for (size_t i = turns.size(); i > 1; --i) std::swap(turns[i - 1], turns[draw(i)]);
      for (size_t i = 0; i < turns.size() && error_.empty(); ++i) run(turns[i] * together);
      running = nullptr;
    }
    return error_.empty() ? nullptr : error_.c_str();
  }

  void meet(Kind kind, void* operands, const Site& site) {
    Fiber& self = own();
    if (static_cast<char*>(__builtin_frame_address(0)) < self.stack.bottom + kStackMargin && !FASTODE_ASAN)
      fail(name_of(self) + " needs more than " + std::to_string(kStackBytes >> 10) + " KiB of stack");
    if (kind <= kWarpBarrier && !left_out.empty() && place(site) == left_out) return;
    Group& group = *self.groups[std::min<int>(kind, kWarpBarrier)];
    self.waits = &site, self.kind = kind;
    if (group.waiting == 0) {
      group.opener = self.index;
    } else if (const Fiber& first = fibers_[group.opener]; first.kind != kind || !same(*first.waits, site)) {
      fail(name_of(self) + " is at " + at(kind, site) + " where " + name_of(first) + " waits at " +
           at(first.kind, *first.waits));
    }
    operands_[self.index] = operands;
    if (++group.waiting == group.size) {
      group.waiting = 0;
      if (kind > kWarpBarrier) {
        void* const* of_lanes = &operands_[group.first];
        counted[1 + kind] += tiles(kind, of_lanes);
        counted[1 + kKinds] += conflicts(kind, of_lanes);
        exchange(kind, of_lanes);
      } else {
        ++counted[1 + kind];
        barriers.insert(place(site));
      }
      ready(group.first, group.size);
    }
    leave_to(next());
    self.waits = nullptr;
  }

  void meet_grid(const Site& site) {
    if (!how_.cooperative) fail(at(kGridBarrier, site) + " in a launch that is not cooperative");
    meet(kGridBarrier, nullptr, site);
  }

  void check_row(const void* row, const Site& site) {
    if (reinterpret_cast<uintptr_t>(row) % 16)
      fail("a row of " + place(site) + "'s ldmatrix is not aligned to 16 bytes in " + name_of(own()));
    if (!own_block().contains(row, 16))
      fail("a row of " + place(site) + "'s ldmatrix is not in the shared memory of the block in " + name_of(own()));
  }

  void check_word(const void* at, const Site& site) {
    if (reinterpret_cast<uintptr_t>(at) % 4)
      fail("a word that " + place(site) + " reads is not aligned to 4 bytes in " + name_of(own()));
  }

  void check_copy(const void* to, const void* from, const Site& site) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
      fail("a copy of " + place(site) + " is not aligned to 16 bytes in " + name_of(own()));
    if (!own_block().contains(static_cast<const char*>(to), 16))
      fail("a copy of " + place(site) + " does not go to the shared memory of " + name_of(own()));
  }

  char* peer(char* own_place, int rank, const Site& site) {
    if (rank < 0 || rank >= how_.cluster)
      fail("peer (" + place(site) + ") of rank " + std::to_string(rank) + " in a cluster of " +
           std::to_string(how_.cluster));
    if (!own_block().contains(own_place, 1))
      fail("peer (" + place(site) + ") of a place that is not in the shared memory of the block");
    const Block& other = (&own_block())[rank - own().rank];
    if (other.running == 0) fail("peer (" + place(site) + ") of a block that has left");
    return own_place - own().shared + other.shared;
  }

  void gap(char* begin, size_t bytes, const Site& site) {
    if (!own_block().contains(begin, bytes))
      fail("a gap (" + place(site) + ") that is not in the shared memory of the block");
    if (own().thread == 0) own_block().add_gap(begin, bytes);
  }

 private:
  std::mutex mutex_;
  Launch how_{};
  Program program_ = nullptr;
  const void* arguments_ = nullptr;
  std::string error_;
  uint64_t random_ = 0;
  Pages stacks_, shared_;
  Fiber host_{};
  std::vector<Fiber> fibers_;
  std::vector<void*> operands_;
  std::vector<int> ready_;
  std::vector<Block> blocks_;
  std::vector<Group> groups_[4];  // of blocks, clusters, the grid, warps

  static std::string refused(const Launch& how, int most_threads) {
    const auto number = [](auto value) { return std::to_string(value); };
    if (how.blocks < 1 || how.cluster < 1 || how.cluster > 8 || how.blocks % how.cluster)
      return "a grid must be a multiple of a cluster of 1 to 8 blocks; got " + number(how.blocks) + " in clusters of " +
             number(how.cluster);
    if (how.threads < 32 || how.threads % 32 || how.threads > most_threads || most_threads > 1024)
      return "a block of this kernel must have a multiple of 32 threads, at most " +
             number(std::min(most_threads, 1024)) + "; got " + number(how.threads);
    if (how.shared_bytes > kMostShared)
      return "a block has at most " + number(kMostShared) + " bytes of shared memory; got " + number(how.shared_bytes);
    return "";
  }

  Fiber& own() { return *static_cast<Fiber*>(running); }
  Block& own_block() { return blocks_[own().index / how_.threads]; }

  uint64_t draw(uint64_t below) {
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    return random_ % below;
  }

  // ---- turns

  // What comes later in the order is put below what comes earlier: the last of `ready_` runs first.
  void ready(int first, int size) {
    for (int i = 0; i < size; ++i) ready_.push_back(order == kReverse ? first + i : first + size - 1 - i);
  }

  Fiber& next() {
    if (ready_.empty()) return host_;
    if (order == kRandom) std::swap(ready_[draw(ready_.size())], ready_.back());
    const int index = ready_.back();
    ready_.pop_back();
    return fibers_[index];
  }

  void leave_to(Fiber& to) {
    Fiber& from = own();
    if (&to == &from) return;
    running = &to;
    switch_stack(from.stack, to.stack);
  }

  [[noreturn]] void fail(std::string why) {
    error_ = std::move(why);
    leave_to(host_);
    __builtin_unreachable();
  }

  // ---- a run: the blocks that are there together

  // Memory and groups for `together` blocks.
  void allocate(int together) {
    const int threads = how_.threads, count = together * threads;
    char* stacks = stacks_.at_least(count * kStackBytes);
    char* shared = shared_.at_least(together * Block::stride(how_.shared_bytes));
    fibers_.assign(count, {});
    operands_.assign(count, nullptr);
    blocks_.assign(together, {});
    for (int i = 0; i < together; ++i)
      blocks_[i].shared = Block::place(shared, how_.shared_bytes, i), blocks_[i].bytes = how_.shared_bytes;
    for (int i = 0; i < count; ++i) fibers_[i].index = i, fibers_[i].stack.bottom = stacks + i * kStackBytes;
    const int sizes[] = {threads, how_.cluster * threads, count, 32};
    for (int scope = 0; scope < 4; ++scope) {
      groups_[scope].clear();
      for (int i = 0; i < count; i += sizes[scope]) groups_[scope].push_back({i, sizes[scope]});
      for (int i = 0; i < count; ++i) fibers_[i].groups[scope] = &groups_[scope][i / sizes[scope]];
    }
  }

  void run(int first_block) {
    const int threads = how_.threads;
    for (size_t i = 0; i < blocks_.size(); ++i) {
      Block& block = blocks_[i];
      block.open(threads);
      for (int j = 0; j < threads; ++j) {
        Fiber& fiber = fibers_[i * threads + j];
        const int number = first_block + static_cast<int>(i);
        static_cast<Thread&>(fiber) = {j, threads, number, how_.blocks, number % how_.cluster, block.shared};
        fiber.left = false;
        prepare(fiber.stack, enter, j);
      }
    }
    ready_.clear();
    ready(0, static_cast<int>(fibers_.size()));
    host_ = {};
    running = &host_;
    leave_to(next());
    if (error_.empty() && std::any_of(fibers_.begin(), fibers_.end(), [](const Fiber& f) { return !f.left; }))
      error_ = deadlock();
    if (!error_.empty()) return abandon();
    for (size_t i = 0; i < blocks_.size() && blocks_.size() > 1; ++i)
      if (blocks_[i].touched())
        error_ = "the shared memory of block " + std::to_string(first_block + i) + " was written after it had left";
  }

  // After an error: nobody goes on with what is left on the stacks and in shared memory.
  void abandon() {
    for (Block& block : blocks_) block.close();
#if FASTODE_ASAN
    for (const Fiber& fiber : fibers_) {
      const char* pointer = static_cast<char*>(fiber.stack.pointer);
      ASAN_UNPOISON_MEMORY_REGION(pointer, fiber.stack.bottom + fiber.stack.bytes - pointer);
    }
#endif
  }

  static void enter();

  void leave() {
    Fiber& self = own();
    self.left = true;
    Block& block = own_block();
    if (--block.running == 0) {
      if (std::string why = block.close(); !why.empty()) fail("block " + std::to_string(self.block) + " " + why);
    }
#if FASTODE_ASAN
    Fiber& to = next();
    running = &to;
    __asan_handle_no_return();  // nothing on this stack is poisoned any more
    __sanitizer_start_switch_fiber(nullptr, to.stack.bottom, to.stack.bytes);
    fastode_simt_switch(&self.stack.pointer, to.stack.pointer);
#else
    leave_to(next());
#endif
    __builtin_unreachable();
  }

  std::string deadlock() {
    using Place = std::tuple<int, std::string>;
    std::map<Place, std::vector<const Fiber*>> waiting;
    for (const Fiber& fiber : fibers_)
      waiting[fiber.left ? Place{1, "have left"} : Place{0, "wait at " + at(fiber.kind, *fiber.waits)}].push_back(
          &fiber);
    std::string why;
    for (const auto& [place, threads] : waiting)
      why += (why.empty() ? "" : ", ") + std::to_string(threads.size()) + " threads " + std::get<1>(place) +
             " (first " + name_of(*threads[0]) + ")";
    return "no thread can go on: " + why;
  }

 public:
  void body() {
    program_(arguments_);
    leave();
  }
  Stack& host() { return host_.stack; }
};

Machine machine;

void Machine::enter() {
#if FASTODE_ASAN
  // The first fiber comes from the host's stack, which only the sanitizer knows.
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (machine.host().bytes == 0)
    machine.host().bottom = static_cast<char*>(const_cast<void*>(bottom)), machine.host().bytes = bytes;
#endif
  machine.body();
}

}  // namespace

void meet(Kind kind, void* operands, const Site& site) { machine.meet(kind, operands, site); }
void meet_grid(const Site& site) { machine.meet_grid(site); }
void check_row(const void* row, const Site& site) { machine.check_row(row, site); }
void check_word(const void* at, const Site& site) { machine.check_word(at, site); }
void check_copy(const void* to, const void* from, const Site& site) { machine.check_copy(to, from, site); }
char* peer(char* own, int rank, const Site& site) { return machine.peer(own, rank, site); }
void gap(char* begin, size_t bytes, const Site& site) { machine.gap(begin, bytes, site); }

const char* launch(const Launch& how, int most_threads, Program program, const void* arguments) {
  return machine.launch(how, most_threads, program, arguments);
}

void set_order(Order order, uint64_t seed) { machine.order = order, machine.seed = seed; }
void set_blocks(int blocks) { machine.blocks_at_a_time = blocks; }
int blocks_at_a_time() { return machine.blocks_at_a_time; }
void set_can_be_asked(bool can) { machine.can_be_asked = can; }
bool can_be_asked() { return machine.can_be_asked; }
const int64_t* counts() { return machine.counted; }

std::string take_barriers() {
  std::string all;
  for (const std::string& barrier : machine.barriers) all += barrier + " ";
  machine.barriers.clear();
  return all;
}

void leave_out(const std::string& barrier) { machine.left_out = barrier; }

}  // namespace fastode::device::simt

// A stack of its own to run a function on, and the switch from one to another. Included once, by simt.cpp.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FASTODE_ASAN 1
#else
#define FASTODE_ASAN 0
#endif

#ifndef __x86_64__
#error "the test machine switches stacks by hand, for x86-64 only"
#endif

namespace fastode::device::simt {

// Frames are several times larger under the sanitizer.
constexpr size_t kStackBytes = FASTODE_ASAN ? size_t{1} << 18 : size_t{1} << 16;
constexpr size_t kStackMargin = 4096;  // the machine's own calls

struct Stack {
  char* bottom = nullptr;     // the lowest byte
  size_t bytes = 0;           // up to the top
  void* pointer = nullptr;    // where it was left
  void* sanitizer = nullptr;  // what the sanitizer keeps for it
};

// Saves the registers that a call keeps, and goes on where `to` was left. It ends in a jump, because a processor
// predicts that a return goes back to the caller, which it does not.
extern "C" void fastode_simt_switch(void** save, void* to);
asm(R"(
.text
.hidden fastode_simt_switch
.globl fastode_simt_switch
.type fastode_simt_switch, @function
fastode_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size fastode_simt_switch, .-fastode_simt_switch
)");

inline void switch_stack(Stack& from, const Stack& to) {
#if FASTODE_ASAN
  __sanitizer_start_switch_fiber(&from.sanitizer, to.bottom, to.bytes);
#endif
  fastode_simt_switch(&from.pointer, to.pointer);
#if FASTODE_ASAN
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

// Makes the next switch to `stack` call `entry`, which must not return. Tops are staggered: stacks whose frames lie a
// multiple of 4096 bytes apart would share a few sets of the cache.
inline void prepare(Stack& stack, void (*entry)(), int index) {
  char* top = stack.bottom + kStackBytes - 4096 - 64 + index % 32 * 128;
  stack.bytes = kStackBytes;
  void** at = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  at[7] = nullptr;  // the return address of `entry`
  at[6] = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) at[i] = nullptr;
  stack.pointer = at;
}

// Memory that grows and is never given back; its pages are real once they are touched.
class Pages {
 public:
  // At least `bytes` bytes; what was in them is lost if they had to grow.
  char* at_least(size_t bytes) {
    if (bytes > bytes_) {
      if (bytes_) munmap(begin_, bytes_);
      bytes_ = 0;
      void* got = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (got == MAP_FAILED) throw std::bad_alloc();
      begin_ = static_cast<char*>(got), bytes_ = bytes;
    }
    return begin_;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* begin_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace fastode::device::simt

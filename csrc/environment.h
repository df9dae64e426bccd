// A switch in the process's environment that several libraries read.
#pragma once

#include <cstdlib>
#include <cstring>

namespace fastode {

// Whether less is to be kept from one call to another, as fastode/ops/resident/functions.py has it.
inline bool asks_for_less_memory() {
  const char* const asked = std::getenv("FASTODE_LESS_MEMORY");
  return asked && *asked && std::strcmp(asked, "0") != 0;
}

}  // namespace fastode

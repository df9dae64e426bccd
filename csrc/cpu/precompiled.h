// What most units of the CPU's operators include, compiled once for all of them: a unit still includes what it uses.
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include "march_backward.cu"

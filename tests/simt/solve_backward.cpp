#include "solve_backward.cu"

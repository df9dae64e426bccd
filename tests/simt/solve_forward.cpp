#include "solve_forward.cu"

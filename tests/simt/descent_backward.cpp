#include "descent_backward.cu"

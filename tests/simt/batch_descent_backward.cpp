#include "batch_descent_backward.cu"

#include "batch_descent_forward.cu"

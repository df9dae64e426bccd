#include "batch_scheme_backward.cu"

#include "batch_scheme.cu"

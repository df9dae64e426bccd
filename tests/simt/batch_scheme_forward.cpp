#include "batch_scheme_forward.cu"

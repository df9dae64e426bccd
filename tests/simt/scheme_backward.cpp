#include "scheme_backward.cu"

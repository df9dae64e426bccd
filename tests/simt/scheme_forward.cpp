#include "scheme_forward.cu"

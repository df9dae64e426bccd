#include "descent_forward.cu"

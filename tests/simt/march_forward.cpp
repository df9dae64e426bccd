#include "march_forward.cu"

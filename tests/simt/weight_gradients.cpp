#include "weight_gradients.cu"

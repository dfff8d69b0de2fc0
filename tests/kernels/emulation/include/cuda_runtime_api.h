// The include path has this file before CUDA's own.
#include "../cuda_emulation.h"

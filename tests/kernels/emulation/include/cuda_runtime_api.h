// Found by the kernels before the real one.
#include "../cuda_emulation.h"

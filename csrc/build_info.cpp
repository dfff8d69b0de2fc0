// What the CUDA library was built for, which native.py reads in the file before it loads it.
#include <cuda_runtime_api.h>

#define TEXT_OF(number) #number
#define TEXT(macro) TEXT_OF(macro)

extern "C" __attribute__((used, visibility("default"))) const char syncbn_cuda_build[] =
    "syncbn-cuda-archs=" SYNCBN_CUDA_ARCHS ";syncbn-cuda-version=" TEXT(CUDART_VERSION) ";";

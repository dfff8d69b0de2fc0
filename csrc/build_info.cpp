// The architectures in the CUDA library, for native.py to read in the file before it loads it.
extern "C" __attribute__((used, visibility("default"))) const char syncbn_cuda_archs[] = "syncbn-cuda-archs=" SYNCBN_CUDA_ARCHS ";";

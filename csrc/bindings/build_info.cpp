// What the library was built for. syncbn/build_info.py reads this from the file, before the library is loaded.
#if defined(SYNCBN_CUDA_ARCHS)
#include <cuda_runtime_api.h>
#define TEXT_OF(number) #number
#define TEXT(macro) TEXT_OF(macro)
#define CUDA "cuda=" TEXT(CUDART_VERSION) ";archs=" SYNCBN_CUDA_ARCHS ";"
#else
#define CUDA
#endif

__attribute__((used, section("syncbn_build"))) static const char build_info[] = "schemas=" SYNCBN_SCHEMAS ";" CUDA;

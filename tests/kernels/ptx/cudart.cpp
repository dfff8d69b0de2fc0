// As much of CUDA's runtime as nvcc's host code of a launch calls. A kernel is found by name among those that tests/support/ptx.py made.
#include <map>
#include <string>

#include "ptx.h"
#include "scheduler.h"

namespace {

struct Dim {
  unsigned x, y, z;
};
struct Configuration {
  Dim grid, block;
  size_t shared_bytes;
  void* stream;
};
struct Definition {
  ptx::Kernel kernel;
  int max_threads;
};

// Of cudaError_t.
constexpr int INVALID_CONFIGURATION = 9, INVALID_DEVICE_FUNCTION = 98;

Configuration configuration;
int last_error = 0;

std::map<std::string, Definition>& definitions() {
  static std::map<std::string, Definition> all;
  return all;
}
std::map<const void*, std::string>& names() {  // by the address of what stands for the kernel on the host
  static std::map<const void*, std::string> all;
  return all;
}

}  // namespace

void ptx::define(const char* name, Kernel kernel, int max_threads) { definitions()[name] = {kernel, max_threads}; }

namespace cudart {
extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const void* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names()[host] = name;
}

unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared_bytes, void* stream) {
  configuration = {grid, block, shared_bytes, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared_bytes, void** stream) {
  *grid = configuration.grid, *block = configuration.block, *shared_bytes = configuration.shared_bytes, *stream = configuration.stream;
  return 0;
}

int cudaLaunchKernel(const void* host, Dim grid, Dim block, void** arguments, size_t shared_bytes, void*) {
  const auto found = definitions().find(names()[host]);
  if (found == definitions().end()) return last_error = INVALID_DEVICE_FUNCTION;
  if (static_cast<int>(block.x) > found->second.max_threads || grid.y * grid.z * block.y * block.z != 1) {
    return last_error = INVALID_CONFIGURATION;
  }
  emulation::launch(grid.x, block.x, shared_bytes, [&] { found->second.kernel(reinterpret_cast<const uint64_t*>(arguments)); });
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, Dim grid, Dim block, void** arguments, size_t shared_bytes, void* stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}
int cudaGetLastError() {
  const int error = last_error;
  last_error = 0;
  return error;
}

// Runs a kernel of one parameter in one warp.
const char* emulate_ptx(const char* name, void* parameter) {
  const uint64_t parameters[] = {reinterpret_cast<uint64_t>(&parameter)};
  emulation::seed(0);
  emulation::launch(1, 32, 0, [&] { definitions().at(name).kernel(parameters); });
  return emulation::error().empty() ? nullptr : emulation::error().c_str();
}
}
}  // namespace cudart

// Times one op over plans, layouts, types and shapes, without torch. For each layout it prints CSV, then a table of shares of the rate of a
// copy. It measures that rate first.
//
//   nvcc -std=c++17 -O3 -arch=sm_90 -I csrc/cuda -DSWEPT_OP=stats benchmarks/sweep.cu -o sweep_stats
//   ./sweep_stats [--pool MB] [--calls N] [--repeats N] [--shape 32x64x112x112]...
//
// launch/gpu_build.sh compiles it for each op. The calls of a configuration take turns in a pool of memory that is larger than any
// cache, and are captured in a graph, so that the host's part is not in the figures.

#define SWEPT_CONCATENATE_(a, b) a##b
#define SWEPT_CONCATENATE(a, b) SWEPT_CONCATENATE_(a, b)
#define SWEPT_QUOTE_(x) #x
#define SWEPT_QUOTE(x) SWEPT_QUOTE_(x)
#define SWEPT_KERNEL SWEPT_CONCATENATE(SWEPT_OP, _kernel)
#include SWEPT_QUOTE(SWEPT_OP.cu)

#include <type_traits>

#include "sweep.h"

namespace syncbn::cuda {

// ---- Plans ------------------------------------------------------------------------------------------------------------------

template <class A>
A args_of(cudaError_t (*)(const A&, const Target&));
using Args = decltype(args_of(SWEPT_OP));
constexpr bool SUMS = std::is_same_v<Args, StatsArgs> || std::is_same_v<Args, BackwardReduceArgs>;

// A Plan (plans.cuh) with the same blocks per SM and vectors per step in both layouts, and tiles of `width` vectors of channels.
template <int blocks, int unroll, int width = 8>
struct SweptPlan {
  static constexpr int planes_blocks = blocks, planes_unroll = unroll;
  static constexpr int columns_blocks = blocks, columns_unroll = unroll, columns_width = width;
  static constexpr bool sums = SUMS, reversed = !SUMS;
};

namespace {

// The Plan that the library is built with.
template <int bytes>
[[maybe_unused]] StatsPlan<bytes> plan_of(const StatsArgs&);
template <int bytes>
[[maybe_unused]] NormalizePlan<bytes> plan_of(const NormalizeArgs&);
template <int bytes>
[[maybe_unused]] BackwardReducePlan<bytes> plan_of(const BackwardReduceArgs&);
template <int bytes>
[[maybe_unused]] BackwardInputPlan<bytes> plan_of(const BackwardInputArgs&);
template <int bytes>
using BuiltPlan = decltype(plan_of<bytes>(Args()));

// launch() of walk.cuh for aligned tensors of one type: a fraction of its instantiations.
template <class Walk, typename scalar_t>
cudaError_t launch_walk(const Args& args, const Target& target) {
  const Config config = Walk::make_config(args.layout, SUMS, target.sm_count);
  const auto kernel = SWEPT_KERNEL<scalar_t, Walk>;
  LAUNCH(kernel, config, target.stream, args, config, workspace(target));
  return cudaGetLastError();
}

template <class Plan16, class Plan32 = Plan16>
cudaError_t contiguous(const Args& args, const Target& target) {
  if (args.dtype == DType::float32) return launch_walk<PlanesOf<VECTOR<float>, Plan32>, float>(args, target);
  return launch_walk<PlanesOf<VECTOR<__nv_bfloat16>, Plan16>, __nv_bfloat16>(args, target);
}

template <class Plan16, class Plan32 = Plan16>
cudaError_t channels_last(const Args& args, const Target& target) {
  if (args.dtype == DType::float32) return launch_walk<ColumnsOf<VECTOR<float>, Plan32>, float>(args, target);
  return launch_walk<ColumnsOf<VECTOR<__nv_bfloat16>, Plan16>, __nv_bfloat16>(args, target);
}

struct Entry {
  const char* plan;  // blocks per SM x vectors per step, and the width of a tile
  cudaError_t (*launch)(const Args&, const Target&);
};
const std::vector<Entry> CONTIGUOUS = {
    {"built", contiguous<BuiltPlan<2>, BuiltPlan<4>>},
    {"2 x 2", contiguous<SweptPlan<2, 2>>},
    {"2 x 4", contiguous<SweptPlan<2, 4>>},
    {"3 x 2", contiguous<SweptPlan<3, 2>>},
    {"3 x 4", contiguous<SweptPlan<3, 4>>},
    {"4 x 2", contiguous<SweptPlan<4, 2>>},
    {"4 x 4", contiguous<SweptPlan<4, 4>>},
};
const std::vector<Entry> CHANNELS_LAST = {
    {"built", channels_last<BuiltPlan<2>, BuiltPlan<4>>}, {"2 x 2 / 8", channels_last<SweptPlan<2, 2>>},
    {"2 x 4 / 8", channels_last<SweptPlan<2, 4>>},        {"3 x 2 / 8", channels_last<SweptPlan<3, 2>>},
    {"3 x 4 / 8", channels_last<SweptPlan<3, 4>>},        {"2 x 2 / 4", channels_last<SweptPlan<2, 2, 4>>},
    {"2 x 4 / 4", channels_last<SweptPlan<2, 4, 4>>},
};

// ---- Memory and arguments ---------------------------------------------------------------------------------------------------

// Values of magnitude 1 to 2, of either sign, whether the memory is read as bfloat16 or as float32.
__global__ void fill(uint4* p, size_t n, unsigned seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) {
    unsigned v = static_cast<unsigned>(i) * 2654435761u + seed;
    v ^= v >> 15;
    const unsigned word = 0x3f803f80u | (v & 0x807f807fu);
    p[i] = uint4{word, word ^ 0x00110011u, word ^ 0x80228022u, word ^ 0x00550055u};
  }
}

__global__ void copy(uint4* to, const uint4* from, size_t n) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) to[i] = from[i];
}

template <typename T>
T* device_memory(size_t count) {
  void* memory;
  CHECK(cudaMalloc(&memory, count * sizeof(T)));
  CHECK(cudaMemset(memory, 0, count * sizeof(T)));
  return static_cast<T*>(memory);
}

// Tensors of x's size are in three pools: two are read, one is written. The statistics are those of mean 0 and variance 1.
struct Memory {
  size_t bytes;
  int64_t channels;
  uint4 *x, *dy, *out;
  double *stats, *sums, *result;
  float* vectors;
  Target target;

  Memory(const sweep::Options& options, int sm_count, cudaStream_t stream) : bytes(options.pool_bytes), channels(0) {
    for (const sweep::Shape& shape : options.shapes) channels = std::max(channels, shape.channels);
    x = device_memory<uint4>(bytes / 16), dy = device_memory<uint4>(bytes / 16), out = device_memory<uint4>(bytes / 16);
    stats = device_memory<double>(stats_numel(channels)), sums = device_memory<double>(sums_numel(channels));
    result = device_memory<double>(stats_numel(channels)), vectors = device_memory<float>(6 * channels);
    target = {sm_count, device_memory<char>(workspace_bytes(sm_count)), stream};
    const Config config = every_sm();
    LAUNCH(fill, config, stream, x, bytes / 16, 1u);
    LAUNCH(fill, config, stream, dy, bytes / 16, 2u);
    CHECK(cudaGetLastError());
  }

  Config every_sm() const {
    Config config{};
    config.groups = target.sm_count * 32;
    config.splits = 1;
    config.threads = THREADS;
    return config;
  }

  void set_stats(const sweep::Shape& shape) const {
    const double count = static_cast<double>(shape.n * shape.inner);
    std::vector<double> values(stats_numel(shape.channels));
    std::fill(values.begin() + 2 * shape.channels, values.end(), count);
    CHECK(cudaMemcpy(stats, values.data(), values.size() * sizeof(double), cudaMemcpyHostToDevice));
  }

  char* at(uint4* pool, size_t offset) const { return reinterpret_cast<char*>(pool) + offset; }
  ChannelVector vector(int i) const { return {vectors + i * channels, DType::float32}; }
};

// What an op reads and writes, `offset` bytes from the start of the pools.
template <class A>
void set_common(A& args, const Memory& memory, size_t offset) {
  args.x = memory.at(memory.x, offset);
  args.stats = {memory.stats, 1e-5};
  args.weight = memory.vector(0);
  args.bias = memory.vector(1);
  args.activation = Activation::relu;
}
[[maybe_unused]] void set(StatsArgs& args, const Memory& memory, size_t offset) {
  args.x = memory.at(memory.x, offset);
  args.stats = memory.result;
}
[[maybe_unused]] void set(NormalizeArgs& args, const Memory& memory, size_t offset) {
  set_common(args, memory, offset);
  args.running_mean = memory.vector(2);
  args.running_var = memory.vector(3);
  args.momentum = 0.1;
  args.unbiased = true;
  args.y = memory.at(memory.out, offset);
}
[[maybe_unused]] void set(BackwardReduceArgs& args, const Memory& memory, size_t offset) {
  set_common(args, memory, offset);
  args.dy = memory.at(memory.dy, offset);
  args.sums = memory.result;
  args.dweight = memory.vector(4);
  args.dbias = memory.vector(5);
}
[[maybe_unused]] void set(BackwardInputArgs& args, const Memory& memory, size_t offset) {
  set_common(args, memory, offset);
  args.dy = memory.at(memory.dy, offset);
  args.sums = memory.sums;
  args.dx = memory.at(memory.out, offset);
}
// How many tensors of x's size the op reads or writes.
constexpr double MOVED = std::is_same_v<Args, StatsArgs> ? 1 : std::is_same_v<Args, BackwardInputArgs> ? 3 : 2;

// ---- The sweep --------------------------------------------------------------------------------------------------------------

double plan_microseconds(const Entry& entry, Args args, const Memory& memory, const sweep::Stopwatch& stopwatch, size_t bytes,
                         int most_calls) {
  const size_t step = (bytes + 255) / 256 * 256, inputs = std::max<size_t>(1, memory.bytes / step);
  const int calls = static_cast<int>(std::min<size_t>(most_calls, std::max<size_t>(8, (size_t{1} << 30) / bytes)));
  return stopwatch.microseconds(calls, [&](int i) {
    set(args, memory, i % inputs * step);
    CHECK(entry.launch(args, memory.target));
  });
}

void run(const sweep::Options& options) {
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  const sweep::Stopwatch stopwatch(options.repeats);
  const Memory memory(options, properties.multiProcessorCount, stopwatch.stream);
  const double copy_us =
      stopwatch.microseconds(4, [&](int) { LAUNCH(copy, memory.every_sm(), stopwatch.stream, memory.out, memory.x, memory.bytes / 16); });
  const double rate = 2.0 * static_cast<double>(memory.bytes) / copy_us;  // bytes in a microsecond
  std::printf("# %s, %d SMs, copy %.3g TB/s\n", properties.name, properties.multiProcessorCount, rate / 1e6);
  std::printf("op,layout,dtype,shape,MB,plan,us,share\n");

  for (const bool last : {false, true}) {
    const std::vector<Entry>& entries = last ? CHANNELS_LAST : CONTIGUOUS;
    const std::string layout = last ? "channels-last" : "contiguous";
    sweep::Table table;
    for (const Entry& entry : entries) table.plans.push_back(entry.plan);
    for (const DType dtype : {DType::bfloat16, DType::float32}) {
      const std::string type = dtype == DType::float32 ? "fp32" : "bf16";
      for (const sweep::Shape& shape : options.shapes) {
        Args args{};
        args.dtype = dtype;
        args.layout = last ? Layout{shape.n * shape.inner, shape.channels, 1} : Layout{shape.n, shape.channels, shape.inner};
        memory.set_stats(shape);
        const size_t bytes = shape.elements() * (dtype == DType::float32 ? 4 : 2);
        std::vector<double> shares;
        for (const Entry& entry : entries) {
          const double us = plan_microseconds(entry, args, memory, stopwatch, bytes, options.calls);
          shares.push_back(MOVED * static_cast<double>(bytes) / us / rate);
          std::printf("%s,%s,%s,%s,%.1f,%s,%.2f,%.4g\n", SWEPT_QUOTE(SWEPT_OP), layout.c_str(), type.c_str(), shape.name.c_str(),
                      static_cast<double>(bytes) / 1e6, entry.plan, us, shares.back());
        }
        table.add(type, shape.name, shares);
      }
    }
    table.print(SWEPT_QUOTE(SWEPT_OP) " " + layout);
  }
  CHECK(cudaDeviceSynchronize());
}

}  // namespace
}  // namespace syncbn::cuda

int main(int count, char** values) { syncbn::cuda::run(sweep::parse(count, values)); }

// The parts of benchmarks/sweep.cu that depend on no kernel and no plan: options, a stopwatch, and a table.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

namespace sweep {

#define CHECK(call)                                                                               \
  do {                                                                                            \
    const cudaError_t error_ = (call);                                                            \
    if (error_ != cudaSuccess) {                                                                  \
      std::fprintf(stderr, "sweep: %s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(error_)); \
      std::exit(1);                                                                               \
    }                                                                                             \
  } while (false)

// ---- Options ----------------------------------------------------------------------------------------------------------------

struct Shape {
  std::string name;
  int64_t n, channels, inner;

  int64_t elements() const { return n * channels * inner; }
};

struct Options {
  size_t pool_bytes = size_t{3} << 30;  // of each of three pools
  int calls = 100;                      // at most, in a graph
  int repeats = 5;                      // samples, each one replay of a graph
  std::vector<Shape> shapes;
};

constexpr const char* USAGE = "usage: sweep [--pool MB] [--calls N] [--repeats N] [--shape NxCxHxW]...\n";
// Layers of ResNet-50 at batch 32 and 2, of DeepLabV3 and of a 3-D U-Net.
constexpr const char* SHAPES[] = {"32x64x112x112", "32x256x56x56", "32x512x28x28", "32x1024x14x14",
                                  "32x2048x7x7",   "2x256x56x56",  "2x2048x97x97", "2x32x128x128x128"};

[[noreturn]] inline void refuse(const std::string& message) {
  std::fprintf(stderr, "sweep: %s\n%s", message.c_str(), USAGE);
  std::exit(2);
}

inline int64_t parse_positive(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end || value <= 0) refuse(name + " needs positive integers, got '" + text + "'");
  return value;
}

inline Shape parse_shape(const std::string& text) {
  std::vector<int64_t> sizes;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find('x', begin), text.size());
    sizes.push_back(parse_positive("--shape", text.substr(begin, end - begin)));
    begin = end + 1;
  }
  if (sizes.size() < 3) refuse("--shape must be NxCxHxW or the like, got " + text);
  Shape shape{text, sizes[0], sizes[1], 1};
  for (size_t i = 2; i < sizes.size(); ++i) shape.inner *= sizes[i];
  // Other layers are walked element by element, or are channels-last in either layout.
  if (shape.inner == 1 || shape.channels % 8) refuse("--shape needs planes of more than one value, and C % 8 == 0, got " + text);
  return shape;
}

inline Options parse(int count, char** values) {
  Options options;
  for (int i = 1; i < count; i += 2) {
    const std::string name = values[i];
    if (name == "--help") {
      std::printf("%s", USAGE);
      std::exit(0);
    }
    const std::string value = i + 1 < count ? values[i + 1] : "";
    if (name == "--pool") options.pool_bytes = static_cast<size_t>(parse_positive(name, value)) << 20;
    else if (name == "--calls") options.calls = static_cast<int>(parse_positive(name, value));
    else if (name == "--repeats") options.repeats = static_cast<int>(parse_positive(name, value));
    else if (name == "--shape") options.shapes.push_back(parse_shape(value));
    else refuse("unknown option " + name);
  }
  if (options.shapes.empty()) {
    for (const char* shape : SHAPES) options.shapes.push_back(parse_shape(shape));
  }
  for (const Shape& shape : options.shapes) {
    if (shape.elements() * 4 > static_cast<int64_t>(options.pool_bytes)) refuse("the pool is smaller than " + shape.name + " in float32");
  }
  return options;
}

// ---- Time -------------------------------------------------------------------------------------------------------------------

class Stopwatch {
  cudaEvent_t start_, stop_;
  int repeats_;

 public:
  cudaStream_t stream;

  explicit Stopwatch(int repeats) : repeats_(repeats) {
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaEventCreate(&start_));
    CHECK(cudaEventCreate(&stop_));
  }

  // Microseconds of one of `times` calls: the median over replays of a graph of all of them.
  template <class Call>
  double microseconds(int times, Call&& call) const {
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    for (int i = 0; i < times; ++i) call(i);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&replay, graph, 0));
    CHECK(cudaGraphLaunch(replay, stream));
    std::vector<double> samples;
    for (int i = 0; i < repeats_; ++i) {
      float ms = 0;
      CHECK(cudaEventRecord(start_, stream));
      CHECK(cudaGraphLaunch(replay, stream));
      CHECK(cudaEventRecord(stop_, stream));
      CHECK(cudaEventSynchronize(stop_));
      CHECK(cudaEventElapsedTime(&ms, start_, stop_));
      samples.push_back(ms * 1e3 / times);
    }
    CHECK(cudaGraphExecDestroy(replay));
    CHECK(cudaGraphDestroy(graph));
    std::sort(samples.begin(), samples.end());
    return samples[samples.size() / 2];
  }
};

// ---- The table --------------------------------------------------------------------------------------------------------------

// A row for each type and shape has the share of the copy rate that each plan reaches. Below are the geometric means over the shapes, and
// for each type the plan with the greatest mean, next to the first plan.
struct Table {
  std::vector<std::string> plans;
  std::vector<std::pair<std::string, std::vector<double>>> rows;
  std::map<std::string, std::vector<std::vector<double>>> by_type;

  void add(const std::string& type, const std::string& shape, const std::vector<double>& shares) {
    rows.emplace_back(type + " " + shape, shares);
    by_type[type].push_back(shares);
  }

  void print(const std::string& title) const {
    std::printf("# %-32s", title.c_str());
    for (const std::string& plan : plans) std::printf("  %9s", plan.c_str());
    std::printf("\n");
    for (const auto& [name, shares] : rows) print_row(name, shares);
    for (const auto& [type, all] : by_type) print_row(type + " geometric mean", geometric_means(all));
    for (const auto& [type, all] : by_type) {
      const std::vector<double> means = geometric_means(all);
      const size_t best = std::max_element(means.begin(), means.end()) - means.begin();
      std::printf("# best %s %s: plan %s %.3f, plan %s %.3f\n", title.c_str(), type.c_str(), plans[best].c_str(), means[best],
                  plans[0].c_str(), means[0]);
    }
  }

 private:
  std::vector<double> geometric_means(const std::vector<std::vector<double>>& shares) const {
    std::vector<double> means(plans.size());
    for (size_t plan = 0; plan < plans.size(); ++plan) {
      for (const std::vector<double>& row : shares) means[plan] += std::log(row[plan]) / static_cast<double>(shares.size());
      means[plan] = std::exp(means[plan]);
    }
    return means;
  }

  void print_row(const std::string& name, const std::vector<double>& shares) const {
    std::printf("# %-32s", name.c_str());
    for (const double share : shares) std::printf("  %9.3f", share);
    std::printf("\n");
  }
};

}  // namespace sweep

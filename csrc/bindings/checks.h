// The checks of the bindings: each error names the argument, and most show what the caller gave. They cover what memory safety needs,
// because a direct call of an op reaches no other check.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>

#include "../args.h"

namespace syncbn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Error, typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  fail<std::invalid_argument>("syncbn: ", parts...);
}

// A macro, because composing a message costs more than a small layer does: it is composed only if the check fails.
#define SYNCBN_REQUIRE(condition, ...)     \
  do {                                     \
    if (!(condition)) refuse(__VA_ARGS__); \
  } while (false)

inline std::string show(torch::headeronly::IntHeaderOnlyArrayRef numbers) {
  std::ostringstream out;
  for (size_t i = 0; i < numbers.size(); ++i) out << (i ? ", " : "[") << numbers[i];
  return numbers.size() ? out.str() + "]" : "[]";
}

inline const char* show(ScalarType type) { return torch::headeronly::toString(type); }

inline bool is_channels_last(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  const auto fits = [&](size_t d) {
    const bool fit = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return fit;
  };
  if (!fits(1)) return false;
  for (size_t d = sizes.size() - 1; d >= 2; --d) {
    if (!fits(d)) return false;
  }
  return fits(0);
}

inline DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Double: return DType::float64;
    default: refuse(name, " must be float32, float16, bfloat16 or float64, got ", show(t.scalar_type()));
  }
}

inline Activation activation_of(int64_t number) {
  SYNCBN_REQUIRE(0 <= number && number < ACTIVATIONS, "activation must be one of syncbn.activation.Activation, got ", number);
  return static_cast<Activation>(number);
}

inline double tag_of(int64_t tag) {
  SYNCBN_REQUIRE(0 <= tag && tag < int64_t{1} << 20, "tag must be in [0, 2^20), got ", tag);
  return static_cast<double>(tag);
}

}  // namespace syncbn

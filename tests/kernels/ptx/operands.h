// The registers of PTX, what an instruction takes them for, and memory: addresses, loads and stores of an emulated kernel.
#pragma once

#include <algorithm>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_emulation.h"

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using f32 = float;
using f64 = double;
using pred = bool;
struct f16 {
  __half value;
  f16(float v) : value(__float2half_rn(v)) {}
  operator float() const { return __half2float(value); }
};
struct bf16 {
  __nv_bfloat16 value;
  bf16(float v) : value(__float2bfloat16_rn(v)) {}
  operator float() const { return __bfloat162float(value); }
};

// Registers are bool or unsigned; signed values are immediate operands.
template <class T, class A>
T get(A a) {
  if constexpr (std::is_signed_v<A> || std::is_same_v<A, bool>) {
    return static_cast<T>(a);
  } else {
    static_assert(sizeof(T) <= sizeof(A));
    alignas(T) char bytes[sizeof(T)];
    std::memcpy(bytes, &a, sizeof(T));
    return *reinterpret_cast<const T*>(bytes);
  }
}

// A narrower integer is extended, as its type says.
template <class T, class D>
void set(D& d, T value) {
  static_assert(sizeof(T) <= sizeof(D));
  if constexpr (std::is_integral_v<T>) d = static_cast<D>(value);
  else std::memcpy(&d, &value, sizeof(T));
}

// Registers that no instruction has written yet: NaN.
template <class R, size_t N>
void poison(R (&registers)[N]) {
  std::fill_n(registers, N, static_cast<R>(-1));
}

struct Address {
  u64 base;
  int64_t offset;
};
template <class B>
Address at(B base, int64_t offset) {
  return {u64{base}, offset};
}

struct Shared {
  const char* name;
  size_t bytes;
};
// A shared variable's address has its number in the upper 12 bits; the dynamic one is number 0.
inline std::vector<Shared>& shared_variables() {
  static std::vector<Shared> variables(1);
  return variables;
}
inline u32 shared_variable(const char* name, size_t bytes) {
  shared_variables().push_back({name, bytes});
  return (shared_variables().size() - 1) << 20;
}

inline char* aligned(char* p, size_t bytes, const char* site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) emulation::fail(std::string("misaligned: ") + site);
  return p;
}
inline char* global(Address a, size_t bytes, const char* site) { return aligned(reinterpret_cast<char*>(a.base) + a.offset, bytes, site); }
inline char* shared(Address a, size_t bytes, const char* site) {
  const u32 address = static_cast<u32>(a.base + a.offset), number = address >> 20, offset = address & 0xfffff;
  if (number >= shared_variables().size()) emulation::fail(std::string("no shared memory is there: ") + site);
  const Shared& variable = shared_variables()[number];
  const size_t size = number == 0 ? emulation::dynamic_shared_bytes() : variable.bytes;
  if (offset + bytes > size) emulation::fail(std::string("out of bounds of shared memory: ") + site);
  void* start = number == 0 ? emulation::dynamic_shared() : emulation::shared(variable.name, variable.bytes);
  return aligned(static_cast<char*>(start) + offset, bytes, site);
}

template <class T, class D>
void load(D& d, const char* from) {
  alignas(T) char bytes[sizeof(T)];
  std::memcpy(bytes, from, sizeof(T));
  set<T>(d, *reinterpret_cast<const T*>(bytes));
}
template <class T, class A>
void store(A a, char* to) {
  const T value = get<T>(a);
  std::memcpy(to, &value, sizeof(T));
}
// {a, b, c, d} of a vector.
template <class T, class... D>
void load(std::tuple<D&...> vector, const char* from) {
  std::apply([&](D&... d) { (load<T>(d, std::exchange(from, from + sizeof(T))), ...); }, vector);
}
template <class T, class... A>
void store(std::tuple<A&...> vector, char* to) {
  std::apply([&](A&... a) { (store<T>(a, std::exchange(to, to + sizeof(T))), ...); }, vector);
}
template <class... A>
std::tuple<A&...> vector(A&&... a) {
  return {a...};
}
template <class D>
constexpr size_t length = 1;
template <class... D>
constexpr size_t length<std::tuple<D...>> = sizeof...(D);

#define LOAD(name, space)                                            \
  template <class T, class D>                                        \
  void name(const char* site, D&& d, Address a) {                    \
    load<T>(d, space(a, sizeof(T) * length<std::decay_t<D>>, site)); \
  }
LOAD(ld_param_, global)
LOAD(ld_global_, global)
LOAD(ld_global_cg_, global)
LOAD(ld_shared_, shared)

inline void prefetch_global_L2_(Address) {}

#define STORE(name, space)                                            \
  template <class T, class A>                                         \
  void name(const char* site, Address d, A&& a) {                     \
    store<T>(a, space(d, sizeof(T) * length<std::decay_t<A>>, site)); \
  }
STORE(st_global_, global)
STORE(st_global_cg_, global)
STORE(st_volatile_global_, global)
STORE(st_shared_, shared)

template <class T, class D, class A>
void atom_acq_rel_gpu_global_inc_(const char* site, D& d, Address a, A last) {
  set<T>(d, emulation::count(reinterpret_cast<unsigned*>(global(a, sizeof(T), site)), get<T>(last)));
}

}  // namespace ptx

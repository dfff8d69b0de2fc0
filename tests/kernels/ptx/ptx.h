// The instructions of PTX that nvcc uses for csrc/cuda, each as a function of its name; ../ptx.py writes the calls.
//
// A register holds bits, and an instruction says what they mean: add.f32 is add_<f32>. What is not here does not compile.
// PTX ISA 9.0: https://docs.nvidia.com/cuda/parallel-thread-execution
#pragma once

#include <algorithm>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_emulation.h"

namespace ptx {

// ---- Types and operands ----------------------------------------------------------------------------------------------------

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

// What nobody has written yet: NaN.
template <class R, size_t N>
void poison(R (&registers)[N]) {
  std::fill_n(registers, N, static_cast<R>(-1));
}

// ---- Memory ----------------------------------------------------------------------------------------------------------------

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
inline char* global(Address a, size_t bytes, const char* site) {
  return aligned(reinterpret_cast<char*>(a.base) + a.offset, bytes, site);
}
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
void atom_global_inc_(const char* site, D& d, Address a, A limit) {
  set<T>(d, atomicInc(reinterpret_cast<unsigned*>(global(a, sizeof(T), site)), get<T>(limit)));
}

// ---- Threads ---------------------------------------------------------------------------------------------------------------

inline u32 tid_x() { return threadIdx.x; }
inline u32 ntid_x() { return blockDim.x; }
inline u32 ctaid_x() { return blockIdx.x; }
inline u32 nctaid_x() { return gridDim.x; }

inline void membar_gl_() { __threadfence(); }
inline void bar_sync_(const char* site, int number) {
  if (number != 0) emulation::fail(std::string("only barrier 0 is emulated: ") + site);
  emulation::barrier(site);
}

template <class T, class D, class A, class B, class C, class M>
void shfl_sync_bfly_(const char* site, D& d, bool& valid, A a, B offset, C clamp, M mask) {
  if (get<u32>(clamp) != 31 || get<u32>(offset) > 31) emulation::fail(std::string("only whole warps are emulated: ") + site);
  set<T>(d, emulation::exchange(site, get<u32>(mask), get<T>(a))[(threadIdx.x % 32) ^ get<u32>(offset)]);
  valid = true;
}
template <class T, class M>
void vote_sync_any_(const char* site, bool& d, bool a, M mask) {
  d = emulation::ballot(site, get<u32>(mask), a) != 0;
}

// ---- Values ----------------------------------------------------------------------------------------------------------------

template <class T, class D, class A>
void mov_(D& d, A a) {
  set<T>(d, get<T>(a));
}
// Of {a, b}, the lower bits are a.
template <class T, class... D, class A>
void mov_(std::tuple<D&...> d, A a) {
  load<std::tuple_element_t<sizeof(T) / sizeof...(D) / 2, std::tuple<b8, b16, b32>>>(d, reinterpret_cast<const char*>(&a));
}
template <class T, class D, class... A>
void mov_(D& d, std::tuple<A&...> a) {
  T whole;
  store<std::tuple_element_t<sizeof(T) / sizeof...(A) / 2, std::tuple<b8, b16, b32>>>(a, reinterpret_cast<char*>(&whole));
  set<T>(d, whole);
}
template <class T, class D, class A>
void cvta_to_global_(D& d, A a) {
  set<T>(d, get<T>(a));
}

#define CONVERSION(name, ...)                       \
  template <class To, class From, class D, class A> \
  void name(D& d, A operand) {                      \
    const From a = get<From>(operand);              \
    set<To>(d, static_cast<To>(__VA_ARGS__));       \
  }
CONVERSION(cvt_, a)
CONVERSION(cvt_rn_, a)
CONVERSION(cvt_sat_, a > 0 ? std::min<From>(a, 1) : 0)  // 0 for NaN

#define UNARY(name, ...)                    \
  template <class T, class D, class A>      \
  void name(D& d, A operand) {              \
    const T a = get<T>(operand);            \
    set<T>(d, static_cast<T>(__VA_ARGS__)); \
  }
UNARY(neg_, -a)
UNARY(abs_, std::abs(a))
UNARY(not_, std::is_same_v<T, bool> ? !a : ~a)
UNARY(rcp_rn_, 1 / a)
UNARY(sqrt_rn_, std::sqrt(a))
UNARY(ex2_approx_ftz_, std::exp2(a))

#define BINARY(name, ...)                          \
  template <class T, class D, class A, class B>    \
  void name(D& d, A first, B second) {             \
    const T a = get<T>(first), b = get<T>(second); \
    set<T>(d, static_cast<T>(__VA_ARGS__));        \
  }
BINARY(add_, a + b)
BINARY(add_rn_, a + b)
BINARY(sub_, a - b)
BINARY(mul_, a * b)
BINARY(mul_lo_, a * b)
BINARY(and_, a & b)
BINARY(or_, a | b)
BINARY(xor_, a ^ b)
BINARY(div_, a / b)
BINARY(div_rn_, a / b)
BINARY(div_approx_, a / b)
BINARY(rem_, a % b)
template <class T>
using Integer = std::enable_if_t<std::is_integral_v<T>, T>;
BINARY(min_, std::min<Integer<T>>(a, b))
BINARY(max_, std::max<Integer<T>>(a, b))

inline u32 wide(u16 a) { return a; }
inline s32 wide(s16 a) { return a; }
inline u64 wide(u32 a) { return a; }
inline s64 wide(s32 a) { return a; }
template <class T, class D, class A, class B>
void mul_wide_(D& d, A a, B b) {
  set(d, wide(get<T>(a)) * wide(get<T>(b)));
}

// Shifts by more than there are bits leave none, or the sign.
#define SHIFT(name, shifted, all)                                     \
  template <class T, class D, class A, class B>                       \
  void name(D& d, A operand, B by) {                                  \
    const T a = get<T>(operand);                                      \
    const u32 n = get<u32>(by);                                       \
    set<T>(d, static_cast<T>(n < 8 * sizeof(T) ? (shifted) : (all))); \
  }
SHIFT(shl_, a << n, 0)
SHIFT(shr_, a >> n, std::is_signed_v<T> && a < 0 ? -1 : 0)

// A name in -u holds where either is NaN.
#define COMPARISON(name, ...)                      \
  template <class T, class A, class B>             \
  void name(bool& d, A first, B second) {          \
    const T a = get<T>(first), b = get<T>(second); \
    d = __VA_ARGS__;                               \
  }
COMPARISON(setp_eq_, a == b)
COMPARISON(setp_ne_, a < b || a > b)
COMPARISON(setp_lt_, a < b)
COMPARISON(setp_le_, a <= b)
COMPARISON(setp_gt_, a > b)
COMPARISON(setp_ge_, a >= b)
COMPARISON(setp_neu_, !(a == b))
COMPARISON(setp_ltu_, !(a >= b))
COMPARISON(setp_leu_, !(a > b))
COMPARISON(setp_gtu_, !(a <= b))
COMPARISON(setp_geu_, !(a < b))

#define TERNARY(name, ...)                                            \
  template <class T, class D, class A, class B, class C>              \
  void name(D& d, A first, B second, C third) {                       \
    const T a = get<T>(first), b = get<T>(second), c = get<T>(third); \
    set<T>(d, static_cast<T>(__VA_ARGS__));                           \
  }
// Rounded down, from the double, in which the product of two floats is exact and the sum nearly.
inline float rounded_down(double v) {
  const float nearest = static_cast<float>(v);
  return nearest > v ? std::nextafter(nearest, -INFINITY) : nearest;
}
TERNARY(fma_rn_, std::fma(a, b, c))
TERNARY(fma_rm_, rounded_down(double{a} * b + c))
TERNARY(mad_lo_, a * b + c)

template <class T, class D, class A, class B>
void selp_(D& d, A a, B b, bool condition) {
  set<T>(d, condition ? get<T>(a) : get<T>(b));
}

// The lower bits of a, put into b.
template <class T, class D, class A, class B, class P, class L>
void bfi_(D& d, A a, B b, P position, L bits) {
  const T mask = ((T{1} << get<u32>(bits)) - 1) << get<u32>(position);  // `bits` is below T's
  set<T>(d, (get<T>(b) & ~mask) | ((get<T>(a) << get<u32>(position)) & mask));
}

// ---- Kernels ---------------------------------------------------------------------------------------------------------------

using Kernel = void (*)(const u64* param);  // addresses of the parameters
void define(const char* name, Kernel kernel, int max_threads);
struct Defined {
  Defined(const char* name, Kernel kernel, int max_threads) { define(name, kernel, max_threads); }
};

}  // namespace ptx

// The instructions of PTX that compute values from values.
#pragma once

#include "operands.h"

namespace ptx {

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
BINARY(mul_, a* b)
BINARY(mul_lo_, a* b)
BINARY(and_, a& b)
BINARY(or_, a | b)
BINARY(xor_, a ^ b)
BINARY(div_, a / b)
BINARY(div_rn_, a / b)
BINARY(div_approx_, __fdividef(a, b))  // of f32 only
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

// Shifts by as many bits as there are, or more, leave none, or the sign.
#define SHIFT(name, shifted, all)                                     \
  template <class T, class D, class A, class B>                       \
  void name(D& d, A operand, B by) {                                  \
    const T a = get<T>(operand);                                      \
    const u32 n = get<u32>(by);                                       \
    set<T>(d, static_cast<T>(n < 8 * sizeof(T) ? (shifted) : (all))); \
  }
SHIFT(shl_, a << n, 0)
SHIFT(shr_, a >> n, std::is_signed_v<T>&& a < 0 ? -1 : 0)

// A comparison whose name ends in u also holds if either is NaN.
#define COMPARISON(name, ...)                      \
  template <class T, class A, class B>             \
  void name(bool& d, A first, B second) {          \
    const T a = get<T>(first), b = get<T>(second); \
    d = __VA_ARGS__;                               \
  }
COMPARISON(setp_eq_, a == b)
COMPARISON(setp_ne_, a<b || a> b)
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
TERNARY(mad_lo_, a* b + c)

template <class T, class D, class A, class B>
void selp_(D& d, A a, B b, bool condition) {
  set<T>(d, condition ? get<T>(a) : get<T>(b));
}

// The lower bits of a, put into b.
template <class T, class D, class A, class B, class P, class L>
void bfi_(D& d, A a, B b, P position, L bits) {
  const T mask = ((T{1} << get<u32>(bits)) - 1) << get<u32>(position);  // fewer `bits` than T has
  set<T>(d, (get<T>(b) & ~mask) | ((get<T>(a) << get<u32>(position)) & mask));
}

}  // namespace ptx

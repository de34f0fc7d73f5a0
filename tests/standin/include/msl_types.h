// MSL's scalar and vector types, traits and limits, for clang's C++-for-OpenCL front end.
//
// That front end is chosen because it has Metal's address spaces: device = __global, threadgroup = __local,
// thread = __private and `constant` itself, with Apple's rules for mixing them; and half, swizzles and vectors.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define __METAL__ 1
#define __METAL_VERSION__ 310
#define METAL_FUNC inline __attribute__((always_inline))
#define device __global
#define threadgroup __local
#define thread __private
#define MSL_SITE ((uint)__builtin_LINE() << 10 | ((uint)__builtin_COLUMN() & 1023u))
// Words that OpenCL reserves and Metal does not.
#define local msl_local
#define global msl_global
#define private msl_private
#define kernel
#define generic msl_generic
#define pipe msl_pipe

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef __bf16 bfloat;

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.1920928955e-7f
#define INT_MAX 2147483647
#define UINT_MAX 4294967295u

// The runtime (runtime/machine.cpp).
extern "C" {
threadgroup void* msl_threadgroup(uint id, ulong size, uint align, uint element, uint line);
void msl_barrier(uint flags, uint simdgroup_only, uint site);
thread void* msl_exchange(uint name, uint site, thread const void* payload, uint size);
void msl_matrix(uint op, uint site, thread void* payload);
uint msl_lane(void);
}

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <class T, T v>
struct integral_constant {
  static constexpr constant T value = v;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> static constexpr constant bool is_same_v = is_same<A, B>::value;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;
template <class A, class B> struct is_convertible : bool_constant<__is_convertible(A, B)> {};
template <class A, class B> static constexpr constant bool is_convertible_v = __is_convertible(A, B);

template <class T> static constexpr constant bool is_integral_v = false;
template <class T> static constexpr constant bool is_floating_point_v = false;
template <> constexpr constant bool is_floating_point_v<float> = true;
template <> constexpr constant bool is_floating_point_v<half> = true;
template <> constexpr constant bool is_floating_point_v<bfloat> = true;
#define MSL_INTEGERS(X) X(char) X(int8_t) X(uchar) X(short) X(ushort) X(int) X(uint) X(long) X(ulong)
#define MSL_IS_INTEGRAL(T) template <> constexpr constant bool is_integral_v<T> = true;
MSL_INTEGERS(MSL_IS_INTEGRAL)
MSL_IS_INTEGRAL(bool)
#undef MSL_IS_INTEGRAL
template <class T> struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T> struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T> static constexpr constant bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;

// float4(a, b2, c): clang has no such constructor for vectors, so msl_vectors.h makes each name a macro for this.
template <class V> struct vec_traits {
  using element = V;
  static constexpr constant int size = 1;
};
template <class T, int N> struct vec_traits<vec<T, N>> {
  using element = T;
  static constexpr constant int size = N;
};
template <class V, class A> constexpr auto vec_part(A a) {
  if constexpr (vec_traits<A>::size > 1) return a;
  else return static_cast<typename vec_traits<V>::element>(a);
}
template <class V, class A, class... B> constexpr V make_vec(A a, B... b) {
  if constexpr (sizeof...(B) > 0) return V{vec_part<V>(a), vec_part<V>(b)...};
  else if constexpr (vec_traits<A>::size > 1) return __builtin_convertvector(a, V);
  else return (V)(static_cast<typename vec_traits<V>::element>(a));
}

template <class T> struct numeric_limits;
#define MSL_LIMITS(T, MAX, MIN, EPSILON, DIGITS)                                  \
  template <> struct numeric_limits<T> {                                          \
    static constexpr T max() { return T(MAX); }                                   \
    static constexpr T min() { return T(MIN); }                                   \
    static constexpr T lowest() { return T(-MAX); }                               \
    static constexpr T infinity() { return T(__builtin_inff()); }                 \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }              \
    static constexpr T epsilon() { return T(EPSILON); }                           \
    static constexpr constant int digits = DIGITS;                                \
  };
MSL_LIMITS(float, 3.402823466e+38f, 1.17549435e-38f, 1.1920928955e-7f, 24)
MSL_LIMITS(half, 65504.0f, 6.103515625e-5f, 9.765625e-4f, 11)
MSL_LIMITS(bfloat, 3.3895313892515355e38f, 1.17549435e-38f, 0.0078125f, 8)
#undef MSL_LIMITS
#define MSL_LIMITS(T)                                                                                        \
  template <> struct numeric_limits<T> {                                                                     \
    static constexpr T max() { return T(-1) < T(0) ? T((1ul << (sizeof(T) * 8 - 1)) - 1) : T(-1); }          \
    static constexpr T min() { return T(-1) < T(0) ? T(-max() - 1) : T(0); }                                 \
    static constexpr T lowest() { return min(); }                                                            \
  };
MSL_INTEGERS(MSL_LIMITS)
#undef MSL_LIMITS
}  // namespace metal

#define MSL_VECTORS(T)            \
  typedef metal::vec<T, 2> T##2; \
  typedef metal::vec<T, 3> T##3; \
  typedef metal::vec<T, 4> T##4;
MSL_VECTORS(char) MSL_VECTORS(uchar) MSL_VECTORS(short) MSL_VECTORS(ushort) MSL_VECTORS(int) MSL_VECTORS(uint)
MSL_VECTORS(long) MSL_VECTORS(ulong) MSL_VECTORS(half) MSL_VECTORS(float) MSL_VECTORS(bfloat)

template <class To, class From>
METAL_FUNC constexpr To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  return __builtin_bit_cast(To, x);
}

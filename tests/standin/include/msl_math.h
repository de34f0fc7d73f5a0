// MSL's mathematical functions. half and bfloat compute in float and round once; vectors go element by element.
// libm's float functions stand in for Apple's: results agree to a few units in the last place, not to the bit.
#pragma once
#include "msl_types.h"

extern "C" {
float expf(float);
float exp2f(float);
float exp10f(float);
float logf(float);
float log2f(float);
float log10f(float);
float sinf(float);
float cosf(float);
float tanf(float);
float asinf(float);
float acosf(float);
float atanf(float);
float sinhf(float);
float coshf(float);
float tanhf(float);
float asinhf(float);
float acoshf(float);
float atanhf(float);
float roundf(float);
float powf(float, float);
float atan2f(float, float);
float fmodf(float, float);
float ldexpf(float, int);
}

namespace metal {
namespace f32 {  // the float version of each function
METAL_FUNC float sqrt(float x) { return __builtin_sqrtf(x); }
METAL_FUNC float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
METAL_FUNC float fabs(float x) { return __builtin_fabsf(x); }
METAL_FUNC float floor(float x) { return __builtin_floorf(x); }
METAL_FUNC float ceil(float x) { return __builtin_ceilf(x); }
METAL_FUNC float trunc(float x) { return __builtin_truncf(x); }
METAL_FUNC float rint(float x) { return __builtin_rintf(x); }
METAL_FUNC float fract(float x) { return __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f); }
METAL_FUNC float saturate(float x) { return __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f); }
METAL_FUNC float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? x : 0.0f; }
METAL_FUNC float fmin(float x, float y) { return __builtin_fminf(x, y); }
METAL_FUNC float fmax(float x, float y) { return __builtin_fmaxf(x, y); }
METAL_FUNC float copysign(float x, float y) { return __builtin_copysignf(x, y); }
METAL_FUNC float divide(float x, float y) { return x / y; }
METAL_FUNC float powr(float x, float y) { return x < 0 ? __builtin_nanf("") : powf(x, y); }
METAL_FUNC float step(float edge, float x) { return x < edge ? 0.0f : 1.0f; }
#define MSL_LIBM1(X)                                                                                              \
  X(exp) X(exp2) X(exp10) X(log) X(log2) X(log10) X(sin) X(cos) X(tan) X(asin) X(acos) X(atan) X(sinh) X(cosh)    \
      X(tanh) X(asinh) X(acosh) X(atanh) X(round)
#define MSL_LIBM2(X) X(pow) X(atan2) X(fmod)
#define MSL_CALL1(name) METAL_FUNC float name(float x) { return name##f(x); }
#define MSL_CALL2(name) METAL_FUNC float name(float x, float y) { return name##f(x, y); }
MSL_LIBM1(MSL_CALL1)
MSL_LIBM2(MSL_CALL2)
#undef MSL_CALL1
#undef MSL_CALL2
}  // namespace f32

#define MSL_UNARY(name)                                                                       \
  METAL_FUNC float name(float x) { return f32::name(x); }                                     \
  METAL_FUNC half name(half x) { return (half)f32::name((float)x); }                          \
  METAL_FUNC bfloat name(bfloat x) { return (bfloat)f32::name((float)x); }                    \
  template <class T, int N> METAL_FUNC vec<T, N> name(vec<T, N> x) {                          \
    for (int i = 0; i < N; i++) x[i] = name((T)x[i]);                                         \
    return x;                                                                                 \
  }
#define MSL_BINARY(name)                                                                      \
  METAL_FUNC float name(float x, float y) { return f32::name(x, y); }                         \
  METAL_FUNC half name(half x, half y) { return (half)f32::name((float)x, (float)y); }        \
  METAL_FUNC bfloat name(bfloat x, bfloat y) { return (bfloat)f32::name((float)x, (float)y); } \
  MSL_BINARY_VEC(name)
#define MSL_BINARY_VEC(name)                                                                  \
  template <class T, int N> METAL_FUNC vec<T, N> name(vec<T, N> x, vec<T, N> y) {             \
    for (int i = 0; i < N; i++) x[i] = name((T)x[i], (T)y[i]);                                \
    return x;                                                                                 \
  }
#define MSL_INTEGER(T)                                                                        \
  METAL_FUNC constexpr T min(T x, T y) { return y < x ? y : x; }                              \
  METAL_FUNC constexpr T max(T x, T y) { return x < y ? y : x; }                              \
  METAL_FUNC constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }         \
  METAL_FUNC constexpr T abs(T x) { return x < T(0) ? T(-x) : x; }
#define MSL_FLOAT(T)                                                                          \
  METAL_FUNC T min(T x, T y) { return (T)__builtin_fminf((float)x, (float)y); }               \
  METAL_FUNC T max(T x, T y) { return (T)__builtin_fmaxf((float)x, (float)y); }               \
  METAL_FUNC T clamp(T x, T low, T high) { return min(max(x, low), high); }                   \
  METAL_FUNC T abs(T x) { return (T)__builtin_fabsf((float)x); }                              \
  METAL_FUNC T mix(T x, T y, T a) { return (T)(x + (y - x) * a); }                            \
  METAL_FUNC T fma(T x, T y, T z) { return (T)__builtin_fmaf((float)x, (float)y, (float)z); } \
  METAL_FUNC bool isnan(T x) { return __builtin_isnan((float)x); }                            \
  METAL_FUNC bool isinf(T x) { return __builtin_isinf((float)x); }                            \
  METAL_FUNC bool isfinite(T x) { return __builtin_isfinite((float)x); }                      \
  METAL_FUNC bool signbit(T x) { return __builtin_signbit((float)x); }                        \
  METAL_FUNC T ldexp(T x, int k) { return (T)ldexpf((float)x, k); }
#define MSL_MATH                                                                                            \
  MSL_LIBM1(MSL_UNARY) MSL_LIBM2(MSL_BINARY) MSL_UNARY(sqrt) MSL_UNARY(rsqrt) MSL_UNARY(fabs)               \
  MSL_UNARY(floor) MSL_UNARY(ceil) MSL_UNARY(trunc) MSL_UNARY(rint) MSL_UNARY(fract) MSL_UNARY(saturate)    \
  MSL_UNARY(sign) MSL_BINARY(fmin) MSL_BINARY(fmax) MSL_BINARY(copysign) MSL_BINARY(divide)                 \
  MSL_BINARY(powr) MSL_BINARY(step) MSL_FLOAT(float) MSL_FLOAT(half) MSL_FLOAT(bfloat)                      \
  MSL_BINARY_VEC(min) MSL_BINARY_VEC(max)                                                                   \
  template <class T, int N> METAL_FUNC vec<T, N> fma(vec<T, N> x, vec<T, N> y, vec<T, N> z) {               \
    for (int i = 0; i < N; i++) x[i] = fma((T)x[i], (T)y[i], (T)z[i]);                                      \
    return x;                                                                                               \
  }
MSL_MATH
MSL_INTEGERS(MSL_INTEGER)
namespace fast {
MSL_MATH
}
namespace precise {
MSL_MATH
}

template <class T> METAL_FUNC T select(T no, T yes, bool c) { return c ? yes : no; }
template <class T, int N, class C> METAL_FUNC vec<T, N> select(vec<T, N> no, vec<T, N> yes, vec<C, N> c) {
  for (int i = 0; i < N; i++) no[i] = c[i] ? yes[i] : no[i];
  return no;
}
template <class T, int N> METAL_FUNC T dot(vec<T, N> x, vec<T, N> y) {
  T sum = x[0] * y[0];
  for (int i = 1; i < N; i++) sum += x[i] * y[i];
  return sum;
}
METAL_FUNC uint popcount(uint x) { return __builtin_popcount(x); }
METAL_FUNC uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
METAL_FUNC uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
}  // namespace metal

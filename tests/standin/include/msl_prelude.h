// What stands before a kernel's own source: Metal's standard library, then the helpers that MLX puts before every
// custom kernel (bfloat16_t, elem_to_loc, ceildiv ...), as far as kernels use them.
#pragma once
#include "msl_types.h"
#include "msl_math.h"
#include "msl_simd.h"

using namespace metal;
typedef bfloat bfloat16_t;
typedef half float16_t;

template <typename I = int64_t>
METAL_FUNC I elem_to_loc(I element, constant const int* shape, constant const int64_t* strides, int ndim) {
  I location = 0;
  for (int i = ndim - 1; i >= 0; --i) {
    location += (element % shape[i]) * I(strides[i]);
    element /= shape[i];
  }
  return location;
}
METAL_FUNC int64_t elem_to_loc(uint element, constant const int* shape, constant const int64_t* strides, int ndim) {
  return elem_to_loc<int64_t>(element, shape, strides, ndim);
}
template <typename T, typename U>
inline T ceildiv(T n, U m) {
  return (n + m - 1) / m;
}
#define MLX_MTL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")
#define MLX_MTL_LOOP_UNROLL _Pragma("clang loop unroll(full)")

// A function of the kernel's file in which `threadgroup T a[n], b[m];` has become MSL_ARRAY(id, a, [n], 1, T); ...
// What alignas says stands in the place of the 1.
template <class T> struct msl_element { using type = T; };
template <class T, int N> struct msl_element<T[N]> : msl_element<T> {};
template <class T, int N> struct msl_element<threadgroup T[N]> : msl_element<T> {};
#define MSL_ARRAY(id, name, size, align, ...)                                                                   \
  typedef __VA_ARGS__ name##_stored size;                                                                       \
  threadgroup name##_stored& name = *(threadgroup name##_stored*)msl_threadgroup(                               \
      id, sizeof(name##_stored), align > alignof(name##_stored) ? align : alignof(name##_stored),               \
      sizeof(typename msl_element<name##_stored>::type), __LINE__)

// Must agree with runtime.h's Position; the wrapper that source.py appends unpacks it.
struct msl_position {
  uint in_grid[3], in_threadgroup[3], threadgroup_[3], groups_per_grid[3], grid[3], group_size[3], launch_group_size[3];
  uint index, lane, simdgroup, simdgroups, launch_simdgroups;
};
#define MSL_UINT3(field) (uint3){at->field[0], at->field[1], at->field[2]}
// (msl_vectors.h, which turns `float4(...)` into make_vec<float4>(...), comes after everything that needs the types.)
#include "msl_vectors.h"

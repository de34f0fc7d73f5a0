// Barriers, simdgroup functions and simdgroup_matrix. Every call carries its place in the source: lanes that meet must
// be at the same call, as a GPU's divergent simdgroup would be undefined.
#pragma once
#include "msl_math.h"

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags((uint)a | (uint)b); }
METAL_FUNC void threadgroup_barrier(mem_flags flags, uint site = MSL_SITE) { msl_barrier((uint)flags, 0, site); }
METAL_FUNC void simdgroup_barrier(mem_flags flags, uint site = MSL_SITE) { msl_barrier((uint)flags, 1, site); }

// What the lanes posted (runtime.h's Exchange). A lane that has returned early reads as all ones: a NaN.
template <class T>
struct Lanes {
  thread const uchar* slots;
  METAL_FUNC bool has(uint i) const { return *(thread const uint*)(slots + 2048) >> i & 1; }
  METAL_FUNC T operator[](uint i) const {
    if (has(i & 31)) return *(thread const T*)(slots + (i & 31) * 64);
    T none;
    __builtin_memset(&none, 0xff, sizeof(T));
    return none;
  }
};
enum Name { SUM = 1, PRODUCT, MAX, MIN, AND, OR, XOR, SCAN, BROADCAST, SHUFFLE, SHUFFLE_XOR, UP, DOWN, ROTATE_UP,
            ROTATE_DOWN, FILL_UP, FILL_DOWN, ALL, ANY, BALLOT, FIRST };

template <class T>
METAL_FUNC Lanes<T> exchange(Name name, T x, uint site) {
  static_assert(sizeof(typename vec_traits<T>::element) <= 4, "simdgroup functions take elements of 32 bits at most");
  return Lanes<T>{(thread const uchar*)msl_exchange(name, site, &x, sizeof(T))};
}
// Reductions as a tree over distance 16, 8, ..., the order that a butterfly of shuffles would have.
template <class T, class F>
METAL_FUNC T reduce_lanes(Lanes<T> lanes, T identity, F f) {
  T v[32];
  for (uint i = 0; i < 32; i++) v[i] = lanes.has(i) ? lanes[i] : identity;
  for (uint k = 16; k; k /= 2)
    for (uint i = 0; i < k; i++) v[i] = f(v[i], v[i + k]);
  return v[0];
}
#define MSL_REDUCE(function, NAME, IDENTITY, EXPRESSION)                                                   \
  template <class T> METAL_FUNC T function(T x, uint site = MSL_SITE) {                                    \
    return reduce_lanes<T>(exchange(NAME, x, site), IDENTITY, [](T a, T b) { return (T)(EXPRESSION); });   \
  }
MSL_REDUCE(simd_sum, SUM, T(0), a + b)
MSL_REDUCE(simd_product, PRODUCT, T(1), a * b)
MSL_REDUCE(simd_max, MAX, x, max(a, b))
MSL_REDUCE(simd_min, MIN, x, min(a, b))
MSL_REDUCE(simd_and, AND, x, a & b)
MSL_REDUCE(simd_or, OR, x, a | b)
MSL_REDUCE(simd_xor, XOR, T(0), a ^ b)
#undef MSL_REDUCE
#define MSL_SCAN(function, IDENTITY, INCLUSIVE, EXPRESSION)                   \
  template <class T> METAL_FUNC T function(T x, uint site = MSL_SITE) {       \
    Lanes<T> lanes = exchange(SCAN, x, site);                                 \
    T a = T(IDENTITY);                                                        \
    for (uint i = 0; i < msl_lane() + INCLUSIVE; i++) {                       \
      T b = lanes.has(i) ? lanes[i] : T(IDENTITY);                            \
      a = T(EXPRESSION);                                                      \
    }                                                                         \
    return a;                                                                 \
  }
MSL_SCAN(simd_prefix_exclusive_sum, 0, 0, a + b)
MSL_SCAN(simd_prefix_inclusive_sum, 0, 1, a + b)
MSL_SCAN(simd_prefix_exclusive_product, 1, 0, a* b)
MSL_SCAN(simd_prefix_inclusive_product, 1, 1, a* b)
#undef MSL_SCAN
// Moves between lanes: `l` is this lane, `n` the argument; past the end a lane keeps its own value.
#define MSL_MOVE(function, NAME, EXPRESSION)                                           \
  template <class T> METAL_FUNC T function(T x, ushort n, uint site = MSL_SITE) {      \
    Lanes<T> from = exchange(NAME, x, site);                                           \
    const uint l = msl_lane();                                                         \
    return EXPRESSION;                                                                 \
  }
MSL_MOVE(simd_broadcast, BROADCAST, ((void)l, from[n]))
MSL_MOVE(simd_shuffle, SHUFFLE, ((void)l, from[n]))
MSL_MOVE(simd_shuffle_xor, SHUFFLE_XOR, from[l ^ n])
MSL_MOVE(simd_shuffle_up, UP, l < n ? x : from[l - n])
MSL_MOVE(simd_shuffle_down, DOWN, l + n > 31 ? x : from[l + n])
MSL_MOVE(simd_shuffle_rotate_up, ROTATE_UP, from[l - n])
MSL_MOVE(simd_shuffle_rotate_down, ROTATE_DOWN, from[l + n])
MSL_MOVE(quad_broadcast, BROADCAST, from[(l & ~3u) + (n & 3)])
MSL_MOVE(quad_shuffle, SHUFFLE, from[(l & ~3u) + (n & 3)])
MSL_MOVE(quad_shuffle_xor, SHUFFLE_XOR, from[(l & ~3u) + ((l ^ n) & 3)])
#undef MSL_MOVE
template <class T> METAL_FUNC T simd_shuffle_and_fill_up(T x, T fill, ushort n, uint site = MSL_SITE) {
  Lanes<T> from = exchange(FILL_UP, x, site), filler = exchange(FILL_UP, fill, site + 1);
  const uint l = msl_lane();
  return l < n ? filler[32 - n + l] : from[l - n];
}
template <class T> METAL_FUNC T simd_shuffle_and_fill_down(T x, T fill, ushort n, uint site = MSL_SITE) {
  Lanes<T> from = exchange(FILL_DOWN, x, site), filler = exchange(FILL_DOWN, fill, site + 1);
  const uint l = msl_lane();
  return l + n > 31 ? filler[l + n - 32] : from[l + n];
}
template <class T> METAL_FUNC T simd_broadcast_first(T x, uint site = MSL_SITE) {
  Lanes<T> from = exchange(FIRST, x, site);
  uint first = 0;
  while (!from.has(first)) first++;
  return from[first];
}
struct simd_vote {
  typedef ulong vote_t;
  ulong bits;
  METAL_FUNC explicit operator vote_t() const { return bits; }
  METAL_FUNC bool all() const { return (uint)bits == 0xffffffffu; }
  METAL_FUNC bool any() const { return bits != 0; }
};
METAL_FUNC simd_vote simd_ballot(bool x, uint site = MSL_SITE) {
  Lanes<uint> lanes = exchange(BALLOT, (uint)x, site);
  ulong bits = 0;
  for (uint i = 0; i < 32; i++)
    if (lanes.has(i) && lanes[i]) bits |= 1ul << i;
  return simd_vote{bits};
}
METAL_FUNC bool simd_all(bool x, uint site = MSL_SITE) {
  return reduce_lanes<uint>(exchange(ALL, (uint)x, site), 1u, [](uint a, uint b) { return a & b; });
}
METAL_FUNC bool simd_any(bool x, uint site = MSL_SITE) {
  return reduce_lanes<uint>(exchange(ANY, (uint)x, site), 0u, [](uint a, uint b) { return a | b; });
}
METAL_FUNC bool simd_is_first(uint site = MSL_SITE) { return simd_broadcast_first(msl_lane(), site) == msl_lane(); }

// ---- simdgroup_matrix: two neighbours of one row per lane, laid out as MLX's matrix kernels assume.
template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "Metal has 8x8 matrices only");
  static_assert(is_floating_point_v<T>, "Metal has matrices of float, half and bfloat");
  vec<T, 2> held;
  simdgroup_matrix() = default;
  METAL_FUNC explicit simdgroup_matrix(T diagonal) {
    const uint l = msl_lane(), r = ((l / 4) & 4) + (l / 2) % 4, c = ((l / 4) & 2) * 2 + (l % 2) * 2;
    held[0] = r == c ? diagonal : T(0);
    held[1] = r == c + 1 ? diagonal : T(0);
  }
  METAL_FUNC thread vec<T, 2>& thread_elements() { return *(thread vec<T, 2>*)&held; }
  METAL_FUNC const thread vec<T, 2>& thread_elements() const { return *(const thread vec<T, 2>*)&held; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int R, int C> METAL_FUNC simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T x) {
  simdgroup_matrix<T, R, C> m;
  m.held = (vec<T, 2>)x;
  return m;
}

struct MatrixMove {  // machine.cpp has the same
  ulong memory, row, x, y;
  uint bytes, transpose, space, line;
  ulong registers;
};
#define MSL_MATRIX_MOVES(space, SPACE)                                                                                \
  template <class T> METAL_FUNC void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& d, const space T* source,       \
      ulong row = 8, ulong2 origin = ulong2{0, 0}, bool transpose = false, uint site = MSL_SITE) {                    \
    MatrixMove m = {(ulong)source, row, origin.x, origin.y, sizeof(T), transpose, SPACE, site, (ulong)&d.held};       \
    msl_matrix(1, site, &m);                                                                        \
  }                                                                                                                   \
  template <class T> METAL_FUNC void simdgroup_store(simdgroup_matrix<T, 8, 8> s, space T* target, ulong row = 8,     \
      ulong2 origin = ulong2{0, 0}, bool transpose = false, uint site = MSL_SITE) {                                   \
    MatrixMove m = {(ulong)target, row, origin.x, origin.y, sizeof(T), transpose, SPACE, site, (ulong)&s.held};       \
    msl_matrix(2, site, &m);                                                                       \
  }
MSL_MATRIX_MOVES(device, 1)
MSL_MATRIX_MOVES(threadgroup, 3)
#undef MSL_MATRIX_MOVES

struct MatrixMultiply {  // machine.cpp has the same
  float a[2], b[2], c[2];
  ulong result, sum;
};
template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                              simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c,
                                              uint site = MSL_SITE) {
  vec<float, 2> result;
  MatrixMultiply m = {{(float)a.held[0], (float)a.held[1]}, {(float)b.held[0], (float)b.held[1]},
                      {(float)c.held[0], (float)c.held[1]}, (ulong)&result, (ulong)&d};
  msl_matrix(3, site, &m);
  d.held[0] = (D)result[0];
  d.held[1] = (D)result[1];
}
template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                   simdgroup_matrix<B, 8, 8> b, uint site = MSL_SITE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>((D)0), site);
}
}  // namespace metal

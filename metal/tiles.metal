// Tiles: everything that is Metal's own, behind a few words, and the tiles made of it.
//
// A kernel body speaks of tiles (8R x 8C floats spread over one simdgroup as 8x8 fragments) and of arrays that
// the threadgroup shares. It names no address space, no barrier's flag, no attribute of the launch: those stand in
// the first section only, and tests/test_metal_sources.py holds all files to it. To run the bodies on another GPU,
// replace the first section, as tiles.cuh does for CUDA, and the products, as products.cuh does.

// ---- What a GPU has of its own -----------------------------------------------------------------
//
//     FUNC                a function
//     CONSTANT float X    a constant of the program
//     SHARED float a[n]   an array of the threadgroup, in a body, at a multiple of 16 bytes
//     IN_SHARED float* p  a pointer to its elements
//     OWN Frag& f         a reference to what a thread has in registers
//     Pair                two floats, [0] and [1]
//     Run<T, N>           2 or 4 neighbours in memory, [0] to [N - 1]: one load or store, at a multiple of their size
//     sync_threadgroup    a barrier; sync_staged: one after which there is what `stage` and copy_sixteen have brought
//     AHEAD_BYTES         of a chunk's staged tiles, up to which the next chunk's are staged while it is worked on
//     exp_two, log_two    2^x and its inverse
//     Score               what a left operand is kept in that a threadgroup makes of numbers that it staged
//     launch              which thread of which threadgroup this is, in every body; `at` is its lane's Spot

#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;

#define FUNC METAL_FUNC
#define CONSTANT constant constexpr
#define SHARED alignas(16) threadgroup
#define IN_SHARED threadgroup
#define OWN thread
#define Pair float2

typedef float Score;

#ifndef HLA_UNROLL  // registers are indexed by the loop variables below, so the loops must unroll
#define HLA_UNROLL _Pragma("clang loop unroll(full)")
#endif

struct Launch {
  int index, threads;   // in the threadgroup
  int simdgroup, lane;  // of 32 lanes each
  uint3 group, groups;  // in the grid
};

//# before each body
  const Launch launch = {
      int(thread_index_in_threadgroup), int(threads_per_threadgroup.x),
      int(simdgroup_index_in_threadgroup), int(thread_index_in_simdgroup),
      threadgroup_position_in_grid, threadgroups_per_grid};
  const Spot at = lane_spot(launch.lane);
//# end

typedef simdgroup_matrix<float, 8, 8> Frag;

template <typename T, int N>
using Run = vec<T, N>;

template <int N, typename T>
FUNC Run<T, N> run_read(const device T* p) { return *reinterpret_cast<const device Run<T, N>*>(p); }

template <int N, typename T>
FUNC Run<T, N> run_read(const threadgroup T* p) { return *reinterpret_cast<const threadgroup Run<T, N>*>(p); }

template <typename T, int N>
FUNC void run_write(device T* p, Run<T, N> run) { *reinterpret_cast<device Run<T, N>*>(p) = run; }

template <typename T, int N>
FUNC void run_write(threadgroup T* p, Run<T, N> run) { *reinterpret_cast<threadgroup Run<T, N>*>(p) = run; }

FUNC bool at_multiple(const device void* p, int bytes) { return (reinterpret_cast<ulong>(p) & (bytes - 1)) == 0; }

// 16 bytes to threadgroup memory, zeros if not `there`; both at multiples of 16.
FUNC void copy_sixteen(threadgroup void* to, const device void* from, bool there) {
  uint4 bytes = uint4(0u);
  if (there) bytes = *static_cast<const device uint4*>(from);
  *static_cast<threadgroup uint4*>(to) = bytes;
}

FUNC void fence_loads() { simdgroup_barrier(mem_flags::mem_none); }

FUNC void sync_threadgroup() { threadgroup_barrier(mem_flags::mem_threadgroup); }

FUNC void sync_staged() { sync_threadgroup(); }

CONSTANT int AHEAD_BYTES = 0;

// A lane holds two neighbours of a fragment: (row, col) and (row, col + 1). MLX's steel kernels rely on
// the same layout.
struct Spot {
  int row, col;
};

FUNC Spot lane_spot(uint lane) {
  int quad = lane / 4;
  Spot at;
  at.row = (quad & 4) + (lane / 2) % 4;
  at.col = (quad & 2) * 2 + (lane % 2) * 2;
  return at;
}

FUNC Frag frag_zero() { return make_filled_simdgroup_matrix<float, 8, 8>(0.0f); }

FUNC void frag_mma(OWN Frag& c, Frag a, Frag b) { simdgroup_multiply_accumulate(c, a, b, c); }

FUNC void frag_set(OWN Frag& f, float left, float right) {
  f.thread_elements()[0] = left;
  f.thread_elements()[1] = right;
}

FUNC Pair frag_get(OWN Frag& f) {
  return Pair(f.thread_elements()[0], f.thread_elements()[1]);
}

FUNC void frag_scale(OWN Frag& f, float by) {
  f.thread_elements()[0] *= by;
  f.thread_elements()[1] *= by;
}

FUNC float exp_two(float x) { return exp2(x); }

FUNC float log_two(float x) { return log2(x); }

// Sum over the lanes up to and including this one.
FUNC float lanes_cumsum(float x) { return simd_prefix_inclusive_sum(x); }

FUNC float lanes_sum(float x) { return simd_sum(x); }

// Sum over the 8 lanes from a multiple of 8 on that this one is of.
FUNC float eight_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  x += simd_shuffle_xor(x, 2);
  return x + simd_shuffle_xor(x, 4);
}

// Sums over the lanes that hold the same row, or the same two columns, of a fragment.
FUNC float row_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 8);
}

FUNC float col_sum(float x) {
  x += simd_shuffle_xor(x, 2);
  x += simd_shuffle_xor(x, 4);
  return x + simd_shuffle_xor(x, 16);
}

// ---- Runs in memory ------------------------------------------------------------------------------

// N neighbours in memory as floats.
template <int N>
struct Floats {
  float of[N];

  template <typename P>
  static FUNC Floats read(P p) {
    const auto run = run_read<N>(p);
    Floats x;
    HLA_UNROLL
    for (int e = 0; e < N; e++) x.of[e] = static_cast<float>(run[e]);
    return x;
  }

  template <typename T, typename P>
  static FUNC void write(P p, Floats x) {
    Run<T, N> run;
    HLA_UNROLL
    for (int e = 0; e < N; e++) run[e] = static_cast<T>(x.of[e]);
    run_write(p, run);
  }
};

template <>
struct Floats<1> {
  float of[1];

  template <typename P>
  static FUNC Floats read(P p) {
    Floats x;
    x.of[0] = static_cast<float>(*p);
    return x;
  }

  template <typename T, typename P>
  static FUNC void write(P p, Floats x) { *p = static_cast<T>(x.of[0]); }
};

// Whether the rows of a block at p consist of runs that one load or store moves; the same for all lanes.
template <int N, typename P>
FUNC bool in_runs(P p, int row_step, int col_step, int cols) {
  return col_step == 1 && ((cols | row_step) & (N - 1)) == 0 && at_multiple(p, N * sizeof(*p));
}

// N elements from p on, zeros from the count-th on; runs: see in_runs.
template <int N, typename P>
FUNC Floats<N> floats_read(P p, int step, int count, bool runs) {
  Floats<N> x;
  HLA_UNROLL
  for (int e = 0; e < N; e++) x.of[e] = 0.0f;
  if (runs) {
    if (count > 0) x = Floats<N>::read(p);
  } else {
    HLA_UNROLL
    for (int e = 0; e < N; e++) {
      if (e < count) x.of[e] = static_cast<float>(p[e * step]);
    }
  }
  return x;
}

// The inverse.
template <typename T, int N, typename P>
FUNC void floats_write(P p, int step, int count, bool runs, Floats<N> x) {
  if (runs) {
    if (count > 0) Floats<N>::template write<T>(p, x);
  } else {
    HLA_UNROLL
    for (int e = 0; e < N; e++) {
      if (e < count) p[e * step] = static_cast<T>(x.of[e]);
    }
  }
}

// ---- Tiles ---------------------------------------------------------------------------------------
//
// Which 8 of a sum's terms a fragment has is free, if it is the same on both sides; which 8 of its rows a state's
// fragment has, too. So G fragments are woven: the g-th has every G-th row or column, from the g-th on, and what
// a lane has of all of them lies together.

template <int G>
struct Woven {
  Frag f[G];
};

// The 8 rows at p, in threadgroup memory, of G fragments whose columns are woven.
template <int G, typename P>
FUNC Woven<G> frags_read(P p, int ld, Spot at) {
  constexpr int N = G == 1 ? 2 : 4;  // of a run
  p += at.row * ld + G * at.col;
  float of[2 * G];
  HLA_UNROLL
  for (int i = 0; i < 2 * G; i += N) {
    const Floats<N> run = Floats<N>::read(p + i);
    HLA_UNROLL
    for (int e = 0; e < N; e++) of[i + e] = run.of[e];
  }
  Woven<G> woven;
  HLA_UNROLL
  for (int g = 0; g < G; g++) frag_set(woven.f[g], of[g], of[G + g]);
  return woven;
}

// Their transposes.
template <int G, typename P>
FUNC Woven<G> frags_turned(P p, int ld, Spot at) {
  p += at.col * ld + G * at.row;
  const Floats<G> left = Floats<G>::read(p), right = Floats<G>::read(p + ld);
  Woven<G> woven;
  HLA_UNROLL
  for (int g = 0; g < G; g++) frag_set(woven.f[g], left.of[g], right.of[g]);
  return woven;
}

// G of its rows of fragments are woven.
template <int R, int C, int G = 1>
struct Tile {
  Frag f[R][C];
};

// The row of the tile that a lane has in fragment row r.
template <int G>
FUNC int woven_row(int r, Spot at) { return 8 * (r - r % G) + G * at.row + r % G; }

template <int R, int C, int G>
FUNC void tile_zero(OWN Tile<R, C, G>& t) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    HLA_UNROLL
    for (int c = 0; c < C; c++) t.f[r][c] = frag_zero();
  }
}

// Of a row of a tile a lane holds 2C neighbours, the columns from C at.col on; two of them in each fragment. Which
// columns of its stripe a fragment has is nobody's business but that of tile_mma_upper, see there.
template <int R, int C, int G>
FUNC Floats<2 * C> part_get(OWN Tile<R, C, G>& t, int r) {
  Floats<2 * C> part;
  HLA_UNROLL
  for (int c = 0; c < C; c++) {
    Pair pair = frag_get(t.f[r][c]);
    part.of[2 * c] = pair[0];
    part.of[2 * c + 1] = pair[1];
  }
  return part;
}

template <int R, int C, int G>
FUNC void part_set(OWN Tile<R, C, G>& t, int r, Floats<2 * C> part) {
  HLA_UNROLL
  for (int c = 0; c < C; c++) frag_set(t.f[r][c], part.of[2 * c], part.of[2 * c + 1]);
}

// A lane's part of the row at p, zero from column `cols` on and if not `there`.
template <int C, typename P>
FUNC Floats<2 * C> part_read(P p, int col_step, int cols, bool runs, bool there, Spot at) {
  const int col = C * at.col;
  return floats_read<2 * C>(p + col * col_step, col_step, there ? cols - col : 0, runs);
}

// t = the block at p, element (r, c) at p[r row_step + c col_step], zero from row `rows`, column `cols` on.
template <int R, int C, int G, typename P>
FUNC void tile_read(OWN Tile<R, C, G>& t, P p, int row_step, int col_step, int rows, int cols, Spot at) {
  const bool runs = in_runs<2 * C>(p, row_step, col_step, cols);
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    const int row = woven_row<G>(r, at);
    part_set(t, r, part_read<C>(p + row * row_step, col_step, cols, runs, row < rows, at));
  }
}

// The inverse of tile_read.
template <typename T, int R, int C, int G, typename P>
FUNC void tile_write(OWN Tile<R, C, G>& t, P p, int row_step, int col_step, int rows, int cols, Spot at) {
  const bool runs = in_runs<2 * C>(p, row_step, col_step, cols);
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    const int row = woven_row<G>(r, at), col = C * at.col;
    const Floats<2 * C> part = part_get(t, r);
    floats_write<T>(p + row * row_step + col * col_step, col_step, row < rows ? cols - col : 0, runs, part);
  }
}

// The same in threadgroup memory, where all rows count and `cols` and ld are multiples of 4: t += by (the block at
// p), nothing from column `cols` on.
template <int R, int C, typename P>
FUNC void tile_add(OWN Tile<R, C>& t, P p, int ld, int cols, float by, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    if (C * at.col < cols) {
      const Floats<2 * C> more = Floats<2 * C>::read(p + (8 * r + at.row) * ld + C * at.col);
      Floats<2 * C> part = part_get(t, r);
      HLA_UNROLL
      for (int e = 0; e < 2 * C; e++) part.of[e] += by * more.of[e];
      part_set(t, r, part);
    }
  }
}

// t = that block.
template <int R, int C, typename P>
FUNC void tile_take(OWN Tile<R, C>& t, P p, int ld, int cols, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    part_set(t, r, part_read<C>(p + (8 * r + at.row) * ld, 1, cols, true, true, at));
  }
}

// That block = t.
template <int R, int C, typename S>
FUNC void tile_put(OWN Tile<R, C>& t, IN_SHARED S* p, int ld, int cols, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    const Floats<2 * C> part = part_get(t, r);
    floats_write<S>(p + (8 * r + at.row) * ld + C * at.col, 1, cols - C * at.col, true, part);
  }
}

template <int R, int C, int G>
FUNC void tile_scale(OWN Tile<R, C, G>& t, float by) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    HLA_UNROLL
    for (int c = 0; c < C; c++) frag_scale(t.f[r][c], by);
  }
}

template <int R, int C>
FUNC void tile_sum(OWN Tile<R, C>& t, OWN Tile<R, C>& other) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    HLA_UNROLL
    for (int c = 0; c < C; c++) {
      Pair sum = frag_get(t.f[r][c]) + frag_get(other.f[r][c]);
      frag_set(t.f[r][c], sum[0], sum[1]);
    }
  }
}

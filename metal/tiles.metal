// Tiles: everything that is Metal's own, behind a few words, and the matrix products made of them.
//
// A kernel body speaks of tiles (8R x 8C floats spread over one simdgroup as 8x8 fragments) and of arrays that
// the threadgroup shares. It names no address space, no barrier's flag, no attribute of the launch: those stand in
// the first section only, and tests/test_metal_sources.py holds all files to it. To run the bodies on another GPU,
// replace the first section: tiles.cuh does that for CUDA, and has products of its own.
//
// Layout of a product: the threadgroup's simdgroups divide the columns of the result. Simdgroup s owns
// the stripe of 8C columns from 8C s on, of the state, of the output and of the right operand, all in
// registers; left operands are read from threadgroup memory by everybody. So a state never leaves its
// registers while a threadgroup walks over chunks, and no product needs a reduction over simdgroups.

// ---- What a GPU has of its own -----------------------------------------------------------------
//
//     FUNC                a function
//     CONSTANT float X    a constant of the program
//     SHARED float a[n]   an array of the threadgroup, in a body, at a multiple of 16 bytes
//     IN_SHARED float* p  a pointer to its elements
//     OWN Frag& f         a reference to what a thread has in registers
//     Pair                two floats, [0] and [1]
//     Run<T, N>           2 or 4 neighbours in memory, [0] to [N - 1]: one load or store, at a multiple of their size
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

// Sum over the lanes up to and including this one.
FUNC float lanes_cumsum(float x) { return simd_prefix_inclusive_sum(x); }

FUNC float lanes_sum(float x) { return simd_sum(x); }

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

// ---- Fragments from memory -----------------------------------------------------------------------

// p points at the block's first element in threadgroup memory; TURNED reads the block's transpose.
template <bool TURNED, typename P>
FUNC Frag frag_read(P p, int ld, Spot at) {
  Frag f;
  if (TURNED) {
    frag_set(f, static_cast<float>(p[at.col * ld + at.row]), static_cast<float>(p[(at.col + 1) * ld + at.row]));
  } else {
    const auto run = run_read<2>(p + at.row * ld + at.col);
    frag_set(f, static_cast<float>(run[0]), static_cast<float>(run[1]));
  }
  return f;
}

// ---- Tiles ---------------------------------------------------------------------------------------

template <int R, int C>
struct Tile {
  Frag f[R][C];
};

template <int R, int C>
FUNC void tile_zero(OWN Tile<R, C>& t) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    HLA_UNROLL
    for (int c = 0; c < C; c++) t.f[r][c] = frag_zero();
  }
}

// Of a row of a tile a lane holds 2C neighbours, the columns from C at.col on; two of them in each fragment. Which
// columns of its stripe a fragment has is nobody's business but that of tile_mma_upper, see there.
template <int C>
struct Part {
  float of[2 * C];
};

template <int R, int C>
FUNC Part<C> part_get(OWN Tile<R, C>& t, int r) {
  Part<C> part;
  HLA_UNROLL
  for (int c = 0; c < C; c++) {
    Pair pair = frag_get(t.f[r][c]);
    part.of[2 * c] = pair[0];
    part.of[2 * c + 1] = pair[1];
  }
  return part;
}

template <int R, int C>
FUNC void part_set(OWN Tile<R, C>& t, int r, Part<C> part) {
  HLA_UNROLL
  for (int c = 0; c < C; c++) frag_set(t.f[r][c], part.of[2 * c], part.of[2 * c + 1]);
}

// Whether the rows of a block at p consist of runs that one load or store moves; the same for all lanes.
template <int N, typename P>
FUNC bool in_runs(P p, int row_step, int col_step, int cols) {
  return col_step == 1 && ((cols | row_step) & (N - 1)) == 0 && at_multiple(p, N * sizeof(*p));
}

// A lane's part of the row at p, zero from column `cols` on and if not `there`.
template <int C, typename P>
FUNC Part<C> part_read(P p, int col_step, int cols, bool runs, bool there, Spot at) {
  constexpr int N = 2 * C;
  const int col = C * at.col;
  Part<C> part;
  HLA_UNROLL
  for (int e = 0; e < N; e++) part.of[e] = 0.0f;
  if (runs) {
    if (there && col < cols) {
      const auto run = run_read<N>(p + col);
      HLA_UNROLL
      for (int e = 0; e < N; e++) part.of[e] = static_cast<float>(run[e]);
    }
  } else {
    HLA_UNROLL
    for (int e = 0; e < N; e++) {
      if (there && col + e < cols) part.of[e] = static_cast<float>(p[(col + e) * col_step]);
    }
  }
  return part;
}

// t = the block at p, element (r, c) at p[r row_step + c col_step], zero from row `rows`, column `cols` on.
template <int R, int C, typename P>
FUNC void tile_read(OWN Tile<R, C>& t, P p, int row_step, int col_step, int rows, int cols, Spot at) {
  const bool runs = in_runs<2 * C>(p, row_step, col_step, cols);
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    const int row = 8 * r + at.row;
    part_set(t, r, part_read<C>(p + row * row_step, col_step, cols, runs, row < rows, at));
  }
}

// The inverse of tile_read.
template <typename T, int R, int C, typename P>
FUNC void tile_write(OWN Tile<R, C>& t, P p, int row_step, int col_step, int rows, int cols, Spot at) {
  constexpr int N = 2 * C;
  const bool runs = in_runs<N>(p, row_step, col_step, cols);
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    const int row = 8 * r + at.row, col = C * at.col;
    const Part<C> part = part_get(t, r);
    if (row < rows && runs && col < cols) {
      Run<T, N> run;
      HLA_UNROLL
      for (int e = 0; e < N; e++) run[e] = static_cast<T>(part.of[e]);
      run_write(p + row * row_step + col, run);
    } else if (row < rows && !runs) {
      HLA_UNROLL
      for (int e = 0; e < N; e++) {
        if (col + e < cols) p[row * row_step + (col + e) * col_step] = static_cast<T>(part.of[e]);
      }
    }
  }
}

// The same in threadgroup memory, where all rows count and `cols` and ld are multiples of 4: t += by (the block at
// p), nothing from column `cols` on.
template <int R, int C, typename P>
FUNC void tile_add(OWN Tile<R, C>& t, P p, int ld, int cols, float by, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    if (C * at.col < cols) {
      const auto run = run_read<2 * C>(p + (8 * r + at.row) * ld + C * at.col);
      Part<C> part = part_get(t, r);
      HLA_UNROLL
      for (int e = 0; e < 2 * C; e++) part.of[e] += by * static_cast<float>(run[e]);
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
template <int R, int C>
FUNC void tile_put(OWN Tile<R, C>& t, IN_SHARED float* p, int ld, int cols, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    const Part<C> part = part_get(t, r);
    if (C * at.col < cols) {
      Run<float, 2 * C> run;
      HLA_UNROLL
      for (int e = 0; e < 2 * C; e++) run[e] = part.of[e];
      run_write(p + (8 * r + at.row) * ld + C * at.col, run);
    }
  }
}

template <int R, int C>
FUNC void tile_scale(OWN Tile<R, C>& t, float by) {
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

// ---- Products ------------------------------------------------------------------------------------
//
// The sum's index k goes outermost: between two products with one accumulator come those with all the others. The
// fences keep the compiler from loading the fragments of every k before the first product, which spills registers.

// c += A b with A (8R x 8K) in threadgroup memory at a, row-major with leading dimension ld;
// TURNED: A is the transpose of what lies there; CAUSAL: what lies there is zero above its diagonal blocks.
template <int R, int K, int C, bool TURNED, bool CAUSAL, typename P>
FUNC void tile_mma(OWN Tile<R, C>& c, P a, int ld, OWN Tile<K, C>& b, Spot at) {
  HLA_UNROLL
  for (int k = 0; k < K; k++) {
    fence_loads();
    HLA_UNROLL
    for (int r = 0; r < R; r++) {
      if (!CAUSAL || (TURNED ? k >= r : k <= r)) {
        Frag x = frag_read<TURNED>(TURNED ? a + 8 * k * ld + 8 * r : a + 8 * r * ld + 8 * k, ld, at);
        HLA_UNROLL
        for (int j = 0; j < C; j++) frag_mma(c.f[r][j], x, b.f[k][j]);
      }
    }
  }
}

// The same for c += A^T b where the result is symmetric and c its columns from block `col` on, a block to a fragment:
// those below the diagonal are left out.
template <int R, int K, int C, typename P>
FUNC void tile_mma_upper(OWN Tile<R, C>& c, P a, int ld, OWN Tile<K, C>& b, int col, Spot at) {
  HLA_UNROLL
  for (int k = 0; k < K; k++) {
    fence_loads();
    HLA_UNROLL
    for (int r = 0; r < R; r++) {
      if (r < col + C) {
        Frag x = frag_read<true>(a + 8 * k * ld + 8 * r, ld, at);
        HLA_UNROLL
        for (int j = 0; j < C; j++) {
          if (r <= col + j) frag_mma(c.f[r][j], x, b.f[k][j]);
        }
      }
    }
  }
}

// c += x y^T for 8 rows of x and 8 rows of y, both 8K wide in threadgroup memory.
template <int K, typename PX, typename PY>
FUNC void block_mma(OWN Frag& c, PX x, int ldx, PY y, int ldy, Spot at) {
  Frag odd = frag_zero();
  HLA_UNROLL
  for (int k = 0; k < K; k++) {
    fence_loads();
    Frag a = frag_read<false>(x + 8 * k, ldx, at);
    Frag b = frag_read<true>(y + 8 * k, ldy, at);
    frag_mma(k % 2 ? odd : c, a, b);
  }
  const Pair sum = frag_get(c) + frag_get(odd);
  frag_set(c, sum[0], sum[1]);
}

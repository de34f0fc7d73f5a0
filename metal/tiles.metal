// Tiles: everything that is Metal's own, behind a few words, and the matrix products made of them.
//
// A kernel body speaks of tiles (8R x 8C floats spread over one simdgroup as 8x8 fragments), of arrays that
// the threadgroup shares, and of the decay inside one chunk of W tokens. It names no address space, no barrier's
// flag, no attribute of the launch: those stand in the first section only, and tests/test_metal_sources.py
// holds all files to it. To run the bodies on another GPU, replace the first section: tiles.cuh does that for CUDA, and
// has products and staging of its own.
//
// Layout of a product: the threadgroup's simdgroups divide the columns of the result. Simdgroup s owns
// the stripe of 8C columns from 8C s on, of the state, of the output and of the right operand, all in
// registers; left operands are read from threadgroup memory by everybody. So a state never leaves its
// registers while a threadgroup walks over chunks, and no product needs a reduction over simdgroups.

// ---- What a GPU has of its own -----------------------------------------------------------------
//
//     FUNC                a function
//     CONSTANT float X    a constant of the program
//     SHARED float a[n]   an array of the threadgroup, in a body
//     IN_SHARED float* p  a pointer to its elements
//     OWN Frag& f         a reference to what a thread has in registers
//     Pair                two floats, [0] and [1]
//     launch              which thread of which threadgroup this is, in every body; `at` is its lane's Spot

#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;

#define FUNC METAL_FUNC
#define CONSTANT constant constexpr
#define SHARED threadgroup
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
    frag_set(f, static_cast<float>(p[at.row * ld + at.col]), static_cast<float>(p[at.row * ld + at.col + 1]));
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

// t = the block at p, element (r, c) at p[r row_step + c col_step], zero from row `rows`, column `cols` on.
template <int R, int C, typename P>
FUNC void tile_read(OWN Tile<R, C>& t, P p, int row_step, int col_step, int rows, int cols, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    HLA_UNROLL
    for (int c = 0; c < C; c++) {
      int row = 8 * r + at.row, col = 8 * c + at.col;
      float left = 0.0f, right = 0.0f;
      if (row < rows && col < cols) left = static_cast<float>(p[row * row_step + col * col_step]);
      if (row < rows && col + 1 < cols) right = static_cast<float>(p[row * row_step + (col + 1) * col_step]);
      frag_set(t.f[r][c], left, right);
    }
  }
}

// The inverse of tile_read.
template <typename T, int R, int C, typename P>
FUNC void tile_write(OWN Tile<R, C>& t, P p, int row_step, int col_step, int rows, int cols, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    HLA_UNROLL
    for (int c = 0; c < C; c++) {
      int row = 8 * r + at.row, col = 8 * c + at.col;
      Pair pair = frag_get(t.f[r][c]);
      if (row < rows && col < cols) p[row * row_step + col * col_step] = static_cast<T>(pair[0]);
      if (row < rows && col + 1 < cols) p[row * row_step + (col + 1) * col_step] = static_cast<T>(pair[1]);
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

// t += by (the block at p in threadgroup memory), nothing from column `cols` on.
template <int R, int C, typename P>
FUNC void tile_add(OWN Tile<R, C>& t, P p, int ld, int cols, float by, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    HLA_UNROLL
    for (int c = 0; c < C; c++) {
      int row = 8 * r + at.row, col = 8 * c + at.col;
      if (col < cols) {
        Pair pair = frag_get(t.f[r][c]);
        float left = static_cast<float>(p[row * ld + col]), right = static_cast<float>(p[row * ld + col + 1]);
        frag_set(t.f[r][c], pair[0] + by * left, pair[1] + by * right);
      }
    }
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

// Write what tile_mma_upper made, and its mirror image, to a size x size matrix at p.
template <int R, int C, typename P>
FUNC void tile_write_symmetric(OWN Tile<R, C>& t, P p, int size, int col0, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    HLA_UNROLL
    for (int c = 0; c < C; c++) {
      int row = 8 * r + at.row, col = col0 + 8 * c + at.col, diagonal = col0 + 8 * c - 8 * r;
      Pair pair = frag_get(t.f[r][c]);
      HLA_UNROLL
      for (int e = 0; e < 2; e++) {
        if (diagonal >= 0 && row < size && col + e < size) {
          p[row * size + col + e] = pair[e];
          if (diagonal > 0) p[(col + e) * size + row] = pair[e];
        }
      }
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

// The same for c += A^T b where the result is symmetric and c its columns from block `col` on: the blocks
// below the diagonal are left out.
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

// ---- The decay inside a chunk --------------------------------------------------------------------
//
// cum[r] holds log g_0 + .. + log g_r of the chunk's tokens in two parts: each log is split into a
// multiple of 2^-10, whose sums float32 holds exactly, and a rest below 2^-11. So a difference of two
// sums has no cancellation, and D_ij = exp(cum_i - cum_j) is exact to rounding. log 0 counts as -128,
// whose exponential is 0 in float32: an exact zero in the decay resets the state to exact zeros. A NaN stays
// one: so is everything that it decays, as in a step.

CONSTANT float LOG_ZERO = -128.0f;

// One simdgroup, its lane holding the decay of token `lane` (1 beyond the chunk).
FUNC void decay_sums(IN_SHARED Pair* cum, int width, float g, float log_least, int lane) {
  float l = log(g);
  if (g <= 0.0f || l < log_least) l = log_least;  // not max, which drops a NaN
  float hi = rint(l * 1024.0f) * (1.0f / 1024.0f);
  Pair sum = Pair(lanes_cumsum(hi), lanes_cumsum(l - hi));
  if (lane < width) cum[lane] = sum;
}

// The sums of a chunk of W <= 32 tokens by the first simdgroup, to be read after the next barrier. g is the decay of
// the chunk's first token, that of the next lies `step` on.
template <int W, typename P>
FUNC void stage_decay(IN_SHARED Pair* cum, P g, long step, int rows, Launch launch) {
  if (launch.simdgroup == 0) {
    const float decay = launch.lane < rows ? g[launch.lane * step] : 1.0f;
    decay_sums(cum, W, decay, LOG_ZERO, launch.lane);
  }
}

// (product of g over the tokens after `from` up to `to`)^power
FUNC float decay_between(Pair to, Pair from, float power) {
  return exp(power * ((to[0] - from[0]) + (to[1] - from[1])));
}

FUNC float decay_since_start(Pair to, float power) { return exp(power * (to[0] + to[1])); }

// Row r of t times (decay from token r to the chunk's end)^power.
template <int R, int C>
FUNC void tile_decay_to_end(OWN Tile<R, C>& t, IN_SHARED const Pair* cum, float power, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    float by = decay_between(cum[8 * R - 1], cum[8 * r + at.row], power);
    HLA_UNROLL
    for (int c = 0; c < C; c++) frag_scale(t.f[r][c], by);
  }
}

// Row r of t times scale (decay from the chunk's start through token r)^power.
template <int R, int C>
FUNC void tile_decay_from_start(
    OWN Tile<R, C>& t, IN_SHARED const Pair* cum, float power, float scale, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    float by = scale * decay_since_start(cum[8 * r + at.row], power);
    HLA_UNROLL
    for (int c = 0; c < C; c++) frag_scale(t.f[r][c], by);
  }
}

// ---- Scores --------------------------------------------------------------------------------------

// The n-th block of a lower triangle, row by row.
FUNC Spot triangle_block(int n) {
  Spot block;
  block.row = 0;
  while (n > block.row) n -= ++block.row;
  block.col = n;
  return block;
}

// p = scale D^power (x y^T) on and below the diagonal of the W x W chunk, zero above it inside the
// diagonal blocks (the blocks above are neither written nor read). x and y in threadgroup memory,
// W rows of 8K. The blocks are dealt out to the simdgroups in turn.
template <int W, int K, typename PX, typename PY>
FUNC void scores(
    IN_SHARED float* p, int ldp, PX x, int ldx, PY y, int ldy, IN_SHARED const Pair* cum, float power,
    float scale, Launch launch, Spot at) {
  constexpr int B = W / 8;
  for (int n = launch.simdgroup; n < B * (B + 1) / 2; n += launch.threads / 32) {
    const Spot ij = triangle_block(n);
    Frag s = frag_zero();
    block_mma<K>(s, x + 8 * ij.row * ldx, ldx, y + 8 * ij.col * ldy, ldy, at);
    int row = 8 * ij.row + at.row, col = 8 * ij.col + at.col;
    Pair pair = frag_get(s);
    Pair to = cum[row];
    float left = col <= row ? scale * pair[0] * decay_between(to, cum[col], power) : 0.0f;
    float right = col + 1 <= row ? scale * pair[1] * decay_between(to, cum[col + 1], power) : 0.0f;
    p[row * ldp + col] = left;
    p[row * ldp + col + 1] = right;
  }
}

// ---- Staging -------------------------------------------------------------------------------------

// dst (W rows of WIDTH, leading dimension ld) = rows 0..rows of src, zero outside rows x cols.
template <int W, int WIDTH, typename T, typename P>
FUNC void stage(IN_SHARED T* dst, int ld, P src, int row_step, int col_step, int rows, int cols, Launch launch) {
  for (int i = launch.index; i < W * WIDTH; i += launch.threads) {
    int r = i / WIDTH, c = i % WIDTH;
    dst[r * ld + c] = r < rows && c < cols ? src[r * row_step + c * col_step] : static_cast<T>(0.0f);
  }
}

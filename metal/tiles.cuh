// What stands in the place of sections of tiles.metal on an NVIDIA GPU: the words that the rest is written in, for
// warps of 32 lanes, and the tiles. What is staged comes by copies that wait for nobody. Compiled by NVRTC as
// `mx.fast.cuda_kernel` hands it over. Compute capability 8.0 or later.

// ---- What a GPU has of its own -----------------------------------------------------------------

#define FUNC __device__ __forceinline__
#define CONSTANT static constexpr
#define SHARED __shared__ __align__(16)
#define IN_SHARED
#define OWN

#ifndef HLA_UNROLL
#define HLA_UNROLL _Pragma("unroll")
#endif

// HLA_THREADS, HLA_BLOCKS: set where a core is to have room for so many threadgroups of so many threads, which bounds
// a thread's registers. MLX, which writes the kernel's first line, has no other word for it.
#ifdef HLA_THREADS
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(HLA_THREADS, HLA_BLOCKS)
#else
#define HLA_THREADS blockDim.x
#endif

// HLA_ROUNDED: set where a call's q, k and v are bfloat16, and products round to it.
#ifdef HLA_ROUNDED
typedef __nv_bfloat16 Score;
#else
typedef float Score;
#endif

struct alignas(8) Pair {
  float of[2];

  Pair() = default;
  FUNC Pair(float first, float second) : of{first, second} {}
  FUNC float& operator[](int i) { return of[i]; }
  FUNC float operator[](int i) const { return of[i]; }
};

FUNC Pair operator+(Pair x, Pair y) { return Pair(x[0] + y[0], x[1] + y[1]); }

FUNC void operator+=(Pair& x, Pair y) { x = x + y; }

struct Index {
  int x, y, z;
};

// Of the grid's axes only x may have more than 65,535 threadgroups: it is where z, the heads, go.
struct Launch {
  int index, threads;
  int simdgroup, lane;
  Index group, groups;
};

//# before each body
  const Launch launch = {
      int(threadIdx.x), int(HLA_THREADS), warp_of(threadIdx.x), int(threadIdx.x) % 32,
      {int(blockIdx.z), int(blockIdx.y), int(blockIdx.x)}, {int(gridDim.z), int(gridDim.y), int(gridDim.x)}};
  const Spot at = lane_spot(launch.lane);
//# end

template <typename T, int N>
struct alignas(N * sizeof(T)) Run {
  T of[N];

  FUNC T& operator[](int i) { return of[i]; }
  FUNC const T& operator[](int i) const { return of[i]; }
};

template <int N, typename T>
FUNC Run<T, N> run_read(const T* p) { return *reinterpret_cast<const Run<T, N>*>(p); }

template <typename T, int N>
FUNC void run_write(T* p, Run<T, N> run) {
  if (sizeof(run) == 4) {  // else two halves are two stores
    *reinterpret_cast<unsigned*>(p) = reinterpret_cast<const unsigned&>(run);
  } else {
    *reinterpret_cast<Run<T, N>*>(p) = run;
  }
}

FUNC bool at_multiple(const void* p, int bytes) { return (reinterpret_cast<unsigned long long>(p) & (bytes - 1)) == 0; }

// x, of which the compiler knows nothing: so that what seldom runs takes no registers of a loop around it.
FUNC int hidden(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// What lies `rows` rows below p.
template <typename T>
FUNC T* below(T* p, int rows, int row_step) { return p + static_cast<long>(row_step) * rows; }

// 16 bytes to shared memory, zeros if not `there`; to be read after the next sync_staged.
FUNC void copy_sixteen(void* to, const void* from, bool there) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to)), bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}

FUNC void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

FUNC void sync_threadgroup() { __syncthreads(); }

FUNC void sync_staged() {
  await_copies();
  __syncthreads();
}

CONSTANT int AHEAD_BYTES = 18 * 1024;  // four tiles of 32 rows of 64 halves

// Loads of what follows stay behind: else what two products read alike stays in registers from one to the other. Those
// of matrices (products.cuh) do so anyway.
FUNC void fence_loads() {
#ifndef HLA_ROUNDED
  __syncwarp();
#endif
}

// Of 8 rows a lane has two neighbours, at.col and the next, and of C groups of 8 columns those from C at.row on.
struct Spot {
  int row, col;
};

FUNC Spot lane_spot(int lane) {
  Spot at;
  at.row = lane / 4;
  at.col = lane % 4 * 2;
  return at;
}

FUNC float exp_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FUNC float log_two(float x) { return log2f(x); }

// Shuffles name all lanes: every one of them comes here, whatever it did before.
FUNC int warp_of(int thread) { return __shfl_sync(0xffffffffu, thread / 32, 0); }  // which the compiler knows for one

FUNC float lane_value(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

FUNC float lane_across(float x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }

FUNC float lanes_cumsum(float x) {
  const int lane = threadIdx.x % 32;
  HLA_UNROLL
  for (int distance = 1; distance < 32; distance *= 2) {
    const float before = __shfl_up_sync(0xffffffffu, x, distance);
    if (lane >= distance) x += before;
  }
  return x;
}

FUNC float lanes_sum(float x) {
  HLA_UNROLL
  for (int distance = 16; distance > 0; distance /= 2) x += lane_across(x, distance);
  return x;
}

FUNC float eight_sum(float x) {
  HLA_UNROLL
  for (int distance = 4; distance > 0; distance /= 2) x += lane_across(x, distance);
  return x;
}

// Over the lanes with the same at.row, and over those with the same at.col.
FUNC float row_sum(float x) {
  x += lane_across(x, 1);
  return x + lane_across(x, 2);
}

FUNC float col_sum(float x) {
  x += lane_across(x, 4);
  x += lane_across(x, 8);
  return x + lane_across(x, 16);
}

// ---- Tiles ---------------------------------------------------------------------------------------
//
// A tile lies turned: its 8C <= 16 columns are the rows of an instruction's result, and its rows that one's columns. So
// what a lane has of a tile, two neighbouring rows of C columns in each block of 8 rows, is what it is to have of a
// product's left operand in the next instruction: no tile ever moves between lanes.

// of[r][c][e]: row 8 r + at.col + e, column C at.row + c.
template <int R, int C>
struct Tile {
  float of[R][C][2];
};

template <int R, int C>
FUNC void tile_zero(Tile<R, C>& t) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    HLA_UNROLL
    for (int c = 0; c < C; c++) t.of[r][c][0] = t.of[r][c][1] = 0.0f;
  }
}

// What a lane has of row 8 r + at.col + e.
template <int R, int C>
FUNC Floats<C> part_get(const Tile<R, C>& t, int r, int e) {
  Floats<C> part;
  HLA_UNROLL
  for (int c = 0; c < C; c++) part.of[c] = t.of[r][c][e];
  return part;
}

template <int R, int C>
FUNC void part_set(Tile<R, C>& t, int r, int e, Floats<C> part) {
  HLA_UNROLL
  for (int c = 0; c < C; c++) t.of[r][c][e] = part.of[c];
}

// Whether a block at p is whole and its rows consist of runs.
template <int R, int C, typename P>
FUNC bool whole_runs(P p, int row_step, int col_step, int rows, int cols) {
  return rows >= 8 * R && cols >= 8 * C && in_runs<C>(p, row_step, col_step, 8 * C);
}

// t = the block at p, element (r, c) at p[r row_step + c col_step], zero from row `rows`, column `cols` on.
template <int R, int C, typename P>
FUNC void tile_read(Tile<R, C>& t, P p, int row_step, int col_step, int rows, int cols, Spot at) {
  const bool whole = whole_runs<R, C>(p, row_step, col_step, rows, cols);
  if (whole) {
    p = below(p, at.col, row_step) + C * at.row;
    HLA_UNROLL
    for (int i = 0; i < 2 * R; i++) part_set(t, i / 2, i % 2, Floats<C>::read(below(p, i / 2 * 8 + i % 2, row_step)));
  } else {
    const int first = at.col, col = C * at.row;
    p = below(p, first, row_step) + col * col_step;
    HLA_UNROLL
    for (int i = 0; i < 2 * R; i++) {
      const int row = i / 2 * 8 + i % 2;
      const int count = row + first < rows ? cols - col : 0;
      part_set(t, i / 2, i % 2, floats_read<C>(below(p, row, row_step), col_step, count, false));
    }
  }
}

// The inverse of tile_read.
template <typename T, int R, int C, typename P>
FUNC void tile_write(const Tile<R, C>& t, P p, int row_step, int col_step, int rows, int cols, Spot at) {
  const bool whole = whole_runs<R, C>(p, row_step, col_step, rows, cols);
  if (whole) {
    p = below(p, at.col, row_step) + C * at.row;
    HLA_UNROLL
    for (int i = 0; i < 2 * R; i++) {
      Floats<C>::template write<T>(below(p, i / 2 * 8 + i % 2, row_step), part_get(t, i / 2, i % 2));
    }
  } else {
    const int first = at.col, col = C * at.row;
    p = below(p, first, row_step) + col * col_step;
    HLA_UNROLL
    for (int i = 0; i < 2 * R; i++) {
      const int row = i / 2 * 8 + i % 2;
      const int count = row + first < rows ? cols - col : 0;
      floats_write<T>(below(p, row, row_step), col_step, count, false, part_get(t, i / 2, i % 2));
    }
  }
}

// The same in shared memory, where all rows count and `cols` and ld are multiples of 4: t += by (the block at p),
// nothing from column `cols` on.
template <int R, int C, typename P>
FUNC void tile_add(Tile<R, C>& t, P p, int ld, int cols, float by, Spot at) {
  if (C * at.row >= cols) return;
  p += at.col * ld + C * at.row;
  HLA_UNROLL
  for (int i = 0; i < 2 * R; i++) {
    const Floats<C> more = Floats<C>::read(p + (i / 2 * 8 + i % 2) * ld);
    HLA_UNROLL
    for (int c = 0; c < C; c++) t.of[i / 2][c][i % 2] += by * more.of[c];
  }
}

// t = that block.
template <int R, int C, typename P>
FUNC void tile_take(Tile<R, C>& t, P p, int ld, int cols, Spot at) {
  const int count = cols - C * at.row;
  p += at.col * ld + C * at.row;
  HLA_UNROLL
  for (int i = 0; i < 2 * R; i++) {
    part_set(t, i / 2, i % 2, floats_read<C>(p + (i / 2 * 8 + i % 2) * ld, 1, count, true));
  }
}

// That block = t.
template <int R, int C, typename S>
FUNC void tile_put(const Tile<R, C>& t, S* p, int ld, int cols, Spot at) {
  if (C * at.row >= cols) return;
  p += at.col * ld + C * at.row;
  HLA_UNROLL
  for (int i = 0; i < 2 * R; i++) {
    Floats<C>::template write<S>(p + (i / 2 * 8 + i % 2) * ld, part_get(t, i / 2, i % 2));
  }
}

template <int R, int C>
FUNC void tile_scale(Tile<R, C>& t, float by) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    HLA_UNROLL
    for (int c = 0; c < C; c++) {
      t.of[r][c][0] *= by;
      t.of[r][c][1] *= by;
    }
  }
}

template <int R, int C>
FUNC void tile_sum(Tile<R, C>& t, const Tile<R, C>& other) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    HLA_UNROLL
    for (int c = 0; c < C; c++) {
      t.of[r][c][0] += other.of[r][c][0];
      t.of[r][c][1] += other.of[r][c][1];
    }
  }
}

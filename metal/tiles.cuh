// What stands in the place of the first section of tiles.metal on an NVIDIA GPU: the words that the rest is written in,
// for warps of 32 lanes. What is staged comes by copies that wait for nobody. Compiled by NVRTC as
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
      int(threadIdx.x), int(blockDim.x), int(threadIdx.x) / 32, int(threadIdx.x) % 32,
      {int(blockIdx.z), int(blockIdx.y), int(blockIdx.x)}, {int(gridDim.z), int(gridDim.y), int(gridDim.x)}};
  const Spot at = lane_spot(launch.lane);
//# end

struct Frag {
  float of[2];
};

template <typename T, int N>
struct alignas(N * sizeof(T)) Run {
  T of[N];

  FUNC T& operator[](int i) { return of[i]; }
  FUNC const T& operator[](int i) const { return of[i]; }
};

template <int N, typename T>
FUNC Run<T, N> run_read(const T* p) { return *reinterpret_cast<const Run<T, N>*>(p); }

template <typename T, int N>
FUNC void run_write(T* p, Run<T, N> run) { *reinterpret_cast<Run<T, N>*>(p) = run; }

FUNC bool at_multiple(const void* p, int bytes) { return (reinterpret_cast<unsigned long long>(p) & (bytes - 1)) == 0; }

// 16 bytes to shared memory, zeros if not `there`; to be read after the next barrier.
FUNC void copy_sixteen(void* to, const void* from, bool there) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to)), bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}

FUNC void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

FUNC void sync_threadgroup() {
  await_copies();
  __syncthreads();
}

// Loads of what follows stay behind: else what two products read alike stays in registers from one to the other.
FUNC void fence_loads() { __syncwarp(); }

// A lane holds (row, col) and (row, col + 1) of a fragment: half of what it holds of an instruction's 16 x 8 result.
struct Spot {
  int row, col;
};

FUNC Spot lane_spot(int lane) {
  Spot at;
  at.row = lane / 4;
  at.col = lane % 4 * 2;
  return at;
}

FUNC void frag_set(Frag& f, float left, float right) {
  f.of[0] = left;
  f.of[1] = right;
}

FUNC Pair frag_get(const Frag& f) { return Pair(f.of[0], f.of[1]); }

FUNC Frag frag_zero() {
  Frag f;
  frag_set(f, 0.0f, 0.0f);
  return f;
}

FUNC void frag_scale(Frag& f, float by) {
  f.of[0] *= by;
  f.of[1] *= by;
}

// Shuffles name all lanes: every one of them comes here, whatever it did before.
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

FUNC float row_sum(float x) {
  x += lane_across(x, 1);
  return x + lane_across(x, 2);
}

FUNC float col_sum(float x) {
  x += lane_across(x, 4);
  x += lane_across(x, 8);
  return x + lane_across(x, 16);
}

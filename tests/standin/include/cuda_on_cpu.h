// CUDA's words on a CPU: a threadgroup's threads are fibers, which meet at barriers, shuffles and matrix products.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define global  // an attribute
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("cuda_shared")))
#define HLA_UNROLL

extern "C" char __start_cuda_shared[] __attribute__((weak));
extern "C" char __stop_cuda_shared[] __attribute__((weak));

struct dim3 {
  unsigned x, y, z;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }

// ---- types

template <typename T>
struct InTen {
  T of[10];
  T operator[](int i) const { return of[i]; }
};

namespace mlx::core::cu {
using Shape = InTen<int32_t>;
using Strides = InTen<int64_t>;
}  // namespace mlx::core::cu

static inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
static inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }

struct __half {
  _Float16 x;
  __half() = default;
  explicit __half(float value) : x((_Float16)value) {}
  explicit operator float() const { return (float)x; }
};

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    unsigned b = __float_as_uint(value);
    bits = value != value ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
  }
  explicit operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};

// ---- fibers

constexpr int MOST = 1024;
constexpr size_t STACK = 256 << 10;

struct Fiber {
  void* stack_pointer;
  bool done;
  long met;  // how many times its warp's lanes have met, as far as it is
};

struct Warp {
  long arrived;
  int kind[2];
  float slots[2][32][8];
};

static Fiber fibers[MOST];
static Warp warps[MOST / 32];
static void* scheduler;
static int current;
static long barrier_arrived, progress;
static long barriers_met[MOST];
static const char* fault;
static void (*entry)();

extern "C" void cuda_switch(void** save, void* load);
asm(R"(
.text
cuda_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

// Copies are made when they are asked for, or when they are waited for.
constexpr int MOST_COPIES = 512;

struct Copies {
  int count;
  struct {
    void* to;
    const void* from;
  } of[MOST_COPIES];
};

static Copies copies[MOST];
static bool late_copies;

static void yield() { cuda_switch(&fibers[current].stack_pointer, scheduler); }

static void fail(const char* why) {
  if (!fault) fault = why;
  for (;;) yield();
}

extern "C" void cuda_thread() {
  entry();
  if (copies[current].count) fail("a thread that is gone before its copies came");
  fibers[current].done = true;
  progress++;
  for (;;) yield();
}

// Wait until `count` has come to `least`: everybody who is waited for adds one.
static void wait(const long& count, long least) {
  while (count < least) yield();
  progress++;
}

static inline void __syncthreads() {
  barrier_arrived++;
  wait(barrier_arrived, long(blockDim.x) * ++barriers_met[current]);
}

// All lanes of a warp show what they have; each may then look at the others', until they meet once more.
enum Kind { SHUFFLE = 1, PRODUCT, LOAD, TURN, BARRIER };

static float (*meet(Kind kind, const float* shown, int count))[8] {
  Warp& w = warps[current / 32];
  const long turn = fibers[current].met++;
  if (w.arrived == 32 * turn) w.kind[turn % 2] = kind;
  if (w.kind[turn % 2] != kind) fail("lanes of a warp meet at different operations");
  for (int i = 0; i < count; i++) w.slots[turn % 2][current % 32][i] = shown[i];
  w.arrived++;
  wait(w.arrived, 32 * (turn + 1));
  return w.slots[turn % 2];
}

static inline void __syncwarp() { meet(BARRIER, nullptr, 0); }

static inline float __shfl_sync(unsigned mask, float x, int lane) {
  if (mask != 0xffffffffu) fail("a shuffle that does not name all lanes");
  if (lane < 0 || lane > 31) fail("a shuffle from no lane");
  return meet(SHUFFLE, &x, 1)[lane][0];
}

static inline int __shfl_sync(unsigned mask, int x, int lane) {
  return int(__float_as_uint(__shfl_sync(mask, __uint_as_float(unsigned(x)), lane)));
}

static inline float __shfl_xor_sync(unsigned mask, float x, int across) {
  return __shfl_sync(mask, x, current % 32 ^ across);
}

static inline float __shfl_up_sync(unsigned mask, float x, int distance) {
  const int lane = current % 32;
  return __shfl_sync(mask, x, lane >= distance ? lane - distance : lane);
}

// ---- what asm statements do

static inline unsigned tf32(float x) {
  const unsigned bits = __float_as_uint(x);
  return x - x == 0 ? (bits + 0x1000) & ~0x1fffu : bits;  // infinities and NaNs stay
}

static inline float first_bits(float x) { return __uint_as_float(__float_as_uint(x) & ~0x1fffu); }

// d (16 x 8) += a (16 x 8) b (8 x 8); the unit does not look at the last 13 bits.
static inline void mma_tf32(float* top, float* bottom, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                            unsigned b1) {
  const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
  float shown[6];
  memcpy(shown, mine, sizeof shown);
  float(*all)[8] = meet(PRODUCT, shown, 6);
  const int row = current % 32 / 4, col = current % 4 * 2;
  for (int half = 0; half < 2; half++) {
    for (int e = 0; e < 2; e++) {
      float sum = (half ? bottom : top)[e];
      for (int k = 0; k < 8; k++) {
        const float a = all[4 * row + k % 4][half + k / 4 * 2], b = all[4 * (col + e) + k % 4][4 + k / 4];
        sum = fmaf(first_bits(a), first_bits(b), sum);
      }
      (half ? bottom : top)[e] = sum;
    }
  }
}

static inline unsigned packed(float first, float second) {
  return __nv_bfloat16(first).bits | unsigned(__nv_bfloat16(second).bits) << 16;
}

static inline float unpacked(float both, int place) {
  const unsigned bits = __float_as_uint(both);
  return __uint_as_float(place ? bits & 0xffff0000u : bits << 16);
}

// d (16 x 8) += a (16 x TERMS) b (TERMS x 8), bfloat16. Of each 8 terms a lane has two neighbours: of a's rows g and
// g + 8, a register each, of b's column g.
template <int TERMS>
static inline void mma_of(float* top, float* bottom, const unsigned* mine) {
  constexpr int STEPS = TERMS / 8;
  float shown[3 * STEPS];
  memcpy(shown, mine, sizeof shown);
  float(*all)[8] = meet(PRODUCT, shown, 3 * STEPS);
  const int row = current % 32 / 4, col = current % 4 * 2;
  for (int half = 0; half < 2; half++) {
    for (int e = 0; e < 2; e++) {
      float sum = (half ? bottom : top)[e];
      for (int k = 0; k < TERMS; k++) {
        const int step = k / 8, lane = k % 8 / 2;
        const float a = unpacked(all[4 * row + lane][2 * step + half], k % 2);
        const float b = unpacked(all[4 * (col + e) + lane][2 * STEPS + step], k % 2);
        sum = fmaf(a, b, sum);
      }
      (half ? bottom : top)[e] = sum;
    }
  }
}

static inline void mma_bf16(float* top, float* bottom, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                            unsigned b1) {
  const unsigned mine[] = {a0, a1, a2, a3, b0, b1};
  mma_of<16>(top, bottom, mine);
}

static inline void mma_half_bf16(float* top, float* bottom, unsigned a0, unsigned a1, unsigned b0) {
  const unsigned mine[] = {a0, a1, b0};
  mma_of<8>(top, bottom, mine);
}

// `count` blocks of 8 x 8 halves: lane 8 n + i names row i of the n-th, which is read when all have met.
static inline void read_matrices(unsigned* of, const void* row, int count, bool turned) {
  if ((uintptr_t)row % 16) fail("a row of a matrix that is not aligned");
  float shown[2];
  memcpy(shown, &row, sizeof shown);
  float(*all)[8] = meet(turned ? TURN : LOAD, shown, 2);
  const int g = current % 32 / 4, col = current % 4 * 2;
  for (int n = 0; n < count; n++) {
    of[n] = 0;
    for (int e = 0; e < 2; e++) {
      const uint16_t* p;
      memcpy(&p, all[8 * n + (turned ? col + e : g)], sizeof p);
      of[n] |= unsigned(p[turned ? g : col + e]) << 16 * e;
    }
  }
}

static inline unsigned read_block(const void* row) {
  unsigned mine;
  read_matrices(&mine, row, 1, false);
  return mine;
}

static inline unsigned read_turned(const void* row) {
  unsigned mine;
  read_matrices(&mine, row, 1, true);
  return mine;
}

static inline void read_blocks(unsigned* of, const void* row) { read_matrices(of, row, 4, false); }

static inline void read_blocks_turned(unsigned* of, const void* row) { read_matrices(of, row, 4, true); }

static inline int hidden(int x) { return x; }

static inline float exp_two(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

static inline void await_copies();

static inline void copy_sixteen(void* to, const void* from, bool there) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16) fail("a copy of 16 bytes that is not aligned");
  Copies& mine = copies[current];
  if (mine.count == MOST_COPIES) fail("too many copies under way");
  mine.of[mine.count++] = {to, there ? from : nullptr};
  if (late_copies) memset(to, 0xff, 16);
  else await_copies();
}

static inline void await_copies() {
  Copies& mine = copies[current];
  for (int i = 0; i < mine.count; i++) {
    if (mine.of[i].from) memcpy(mine.of[i].to, mine.of[i].from, 16);
    else memset(mine.of[i].to, 0, 16);
  }
  mine.count = 0;
}

// ---- launches

static unsigned draw(unsigned& seed) {
  seed ^= seed << 13;
  seed ^= seed >> 17;
  return seed ^= seed << 5;
}

// order: 0 forward, 1 reverse, 2 random. Returns what went wrong, or null.
static const char* run_groups(void (*kernel)(), const int* groups, int threads, int order, unsigned seed) {
  static char* stacks = (char*)aligned_alloc(4096, STACK * MOST);
  gridDim = {unsigned(groups[0]), unsigned(groups[1]), unsigned(groups[2])};
  blockDim = {unsigned(threads), 1, 1};
  entry = kernel;
  fault = nullptr;
  late_copies = order != 0;
  for (int n = 0; n < groups[0] * groups[1] * groups[2]; n++) {
    blockIdx = {unsigned(n % groups[0]), unsigned(n / groups[0] % groups[1]), unsigned(n / groups[0] / groups[1])};
    if (__start_cuda_shared) memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
    memset(warps, 0, sizeof warps);
    for (int i = 0; i < threads; i++) copies[i].count = 0;
    memset(barriers_met, 0, sizeof barriers_met);
    barrier_arrived = 0;
    for (int i = 0; i < threads; i++) {
      void** top = (void**)(stacks + STACK * (i + 1)) - 2;  // a call leaves the stack at 16 n + 8
      *top = (void*)cuda_thread;
      fibers[i] = {top - 6, false, 0};
    }
    for (int left = threads; left;) {
      const long before = progress;
      // A step that is a prime beyond all counts of threads comes to each of them once.
      static const unsigned steps[] = {1, 1031, 1033, 1039};
      const unsigned start = order == 2 ? draw(seed) % threads : 0, step = steps[order == 2 ? draw(seed) % 4 : 0];
      left = 0;
      for (int i = 0; i < threads; i++) {
        const unsigned at = order == 1 ? threads - 1 - i : (start + i * step) % threads;
        if (fibers[at].done) continue;
        current = at;
        threadIdx = {at, 0, 0};
        cuda_switch(&scheduler, fibers[at].stack_pointer);
        if (fault) return fault;
        left += !fibers[at].done;
      }
      if (left && before == progress) return "threads wait for ever: some are at another barrier, or gone";
    }
  }
  return nullptr;
}

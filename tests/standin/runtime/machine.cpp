// The machine: fibers, thread schedules, barriers, and what the 32 lanes of a simdgroup do together.
//
// A fiber runs until it meets others (a barrier or a simdgroup operation), then control passes straight to the next
// one; the last lane to arrive carries out the simdgroup's operation for all. Whatever would hang or be undefined on a
// GPU (lanes at different operations, threads at different barriers) ends the launch with a message.
#include "runtime.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

Options options;
Counts counts;
Fiber fibers[MAX_THREADS];
u64 meeting[MAX_THREADS];
Fiber* cur;
u32 collective, epoch[2], group_epoch[2], group_number;
SimdGroup groups[MAX_THREADS / SIMD];
Buffer* buffers;
u32 buffer_count;
Decl decls[MAX_DECLS];
Decl* decl_of[ARENA / RED_ZONE];
u8* arena;

static Exchange exchanges[MAX_THREADS / SIMD][2];
static void* payloads[MAX_THREADS];
static const u64 STACK = 256 << 10, GUARD = 4096;
static u8* stacks;
Kernel kernel;
u64 addresses[MAX_BUFFERS];
char message[1024];
u32 message_site;
bool failed;
static void *main_sp, *sps[MAX_THREADS];
static u32 threads, group_count, current_group;
enum : u32 { NOBODY = MAX_THREADS };
u64 msl_scalar_macs;

// Only the registers that the calling convention preserves: no system call, unlike swapcontext.
extern "C" __attribute__((visibility("hidden"))) void msl_switch(void** save, void* to);
__asm__(R"(
.globl msl_switch
.hidden msl_switch
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void fail(u32 site, const char* format, ...) {
  va_list args;
  va_start(args, format);
  int n = vsnprintf(message, sizeof message, format, args);
  va_end(args);
  if (cur) {
    const Position& p = cur->at;
    snprintf(message + n, sizeof message - n, " [threadgroup (%u, %u, %u), thread (%u, %u, %u), simdgroup %u, lane %u]",
             p.threadgroup[0], p.threadgroup[1], p.threadgroup[2], p.in_threadgroup[0], p.in_threadgroup[1],
             p.in_threadgroup[2], p.simdgroup, p.lane);
  }
  message_site = site;
  failed = true;
  void* dead;
  for (;;) msl_switch(&dead, main_sp);
}

static u64 state_of(u64 m) { return m >> 56; }
static u32 op_of(u64 m) { return m >> 48 & 255; }
static u32 flags_of(u64 m) { return m >> 32 & 255; }
static u32 line_of(u64 m) { return (u32)m >> 10; }
const char* place_name(u64 m) {
  static const char* names[] = {"running", "at a simdgroup operation", "at simdgroup_barrier", "at threadgroup_barrier",
                                "finished"};
  return names[state_of(m)];
}

// The collective operations read and write the lanes' own registers (their stacks) through these.
struct MatrixMove {  // simdgroup_load, simdgroup_store
  u64 memory, row, x, y;
  u32 bytes, transpose, space, line;
  u64 registers;  // this lane's two elements
};
struct MatrixMultiply {
  float a[2], b[2], c[2];
  u64 result, sum;
};

// Which elements a lane holds: row and first of two columns, as MLX's own matrix kernels assume for Apple GPUs.
static inline u32 row_of(u32 lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
static inline u32 column_of(u32 lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }

static void move_matrix(void** lanes, bool store) {
  MatrixMove& m = *(MatrixMove*)lanes[0];
  for (u32 l = 1; l < SIMD; l++)
    if (memcmp(lanes[l], &m, sizeof m - sizeof m.registers))
      fail(m.line, "simdgroup_%s with arguments that differ between lanes 0 and %u", store ? "store" : "load", l);
  const u64 start = m.memory + (m.y * m.row + m.x) * m.bytes;
  if (options.checked)
    for (u32 r = 0; r < 8; r++) access(m.space, start + r * m.row * m.bytes, 8 * m.bytes, m.bytes, m.line, store);
  for (u32 l = 0; l < SIMD; l++) {
    u8* mine = (u8*)((MatrixMove*)lanes[l])->registers;
    const u32 r = row_of(l), c = column_of(l);
    for (u32 j = 0; j < 2; j++) {
      u8* theirs = (u8*)(start + (m.transpose ? (c + j) * m.row + r : r * m.row + c + j) * m.bytes);
      u8* held = mine + j * m.bytes;
      if (m.bytes == 4) *(u32*)(store ? theirs : held) = *(u32*)(store ? held : theirs);
      else *(u16*)(store ? theirs : held) = *(u16*)(store ? held : theirs);
    }
  }
}

// A product waits for the last one with its accumulator: how many products ago that was, at most APART.
static void count_product(SimdGroup& g, u64 sum) {
  u32 ago = 1;
  while (ago < APART && g.sums[(g.products - ago) % APART] != sum) ago++;
  g.sums[g.products++ % APART] = sum;
  counts.matrix_multiplies++;
  counts.apart += ago;
}

static void multiply_matrices(void** lanes) {
  typedef float Row __attribute__((vector_size(32)));
  alignas(32) float a[8][8], b[8][8], c[8][8];
  for (u32 l = 0; l < SIMD; l++) {
    const MatrixMultiply& m = *(MatrixMultiply*)lanes[l];
    const u32 r = row_of(l), k = column_of(l);
    memcpy(&a[r][k], m.a, 8), memcpy(&b[r][k], m.b, 8), memcpy(&c[r][k], m.c, 8);
  }
  for (u32 i = 0; i < 8; i++) {
    Row sum = *(Row*)c[i];
    for (u32 k = 0; k < 8; k++)
      sum = __builtin_elementwise_fma((Row)(a[i][k] - (Row){}), *(Row*)b[k], sum);
    *(Row*)c[i] = sum;
  }
  for (u32 l = 0; l < SIMD; l++)
    memcpy((void*)((MatrixMultiply*)lanes[l])->result, &c[row_of(l)][column_of(l)], 8);
  count_product(groups[cur->at.simdgroup], ((MatrixMultiply*)lanes[0])->sum);
}

static u32 random_state;
void seed_random(u32 seed) { random_state = seed; }
u32 random_below(u32 n) {
  random_state = random_state * 1664525u + 1013904223u;
  return (u64)(random_state >> 8) * n >> 24;
}
static void start_round(SimdGroup& g) {
  g.cursor = 0;
  if (options.schedule == RANDOM)
    for (u32 i = g.size; i > 1; i--) {
      const u32 j = random_below(i);
      const u8 t = g.order[i - 1];
      g.order[i - 1] = g.order[j], g.order[j] = t;
    }
}

[[noreturn]] static void divergent(u32 one, u32 other) {
  cur = fibers + one;
  const u64 a = meeting[one], b = meeting[other];
  fail((u32)a, "divergent simdgroup: lane %u is %s (line %u) while lane %u is %s (line %u)", one % SIMD, place_name(a),
       line_of(a), other % SIMD, place_name(b), line_of(b));
}

// All lanes of g have stopped. Carry out the operation that they meet at; false if they wait for other simdgroups.
static bool resolve_simdgroup(SimdGroup& g) {
  u64* lane = meeting + g.first;
  u64 meet = lane[0];
  u32 mask = g.size == SIMD ? ~0u : (1u << g.size) - 1;
  bool agreed = true;
  for (u32 i = 1; i < g.size; i++) agreed &= lane[i] == meet;
  if (!agreed) {
    u32 leader = SIMD;
    for (u32 i = 0; i < g.size; i++)
      if (state_of(lane[i]) == AT_SIMD || state_of(lane[i]) == AT_SIMD_BARRIER) leader = i;
    if (leader == SIMD) return false;  // some at a threadgroup barrier, some finished: resolve_barrier judges
    meet = lane[leader];
    for (u32 i = 0; i < g.size; i++)
      if (lane[i] != meet) {
        if (state_of(lane[i]) != DONE || !options.early_exit || op_of(meet) != EXCHANGE)
          divergent(g.first + leader, g.first + i);
        mask &= ~(1u << i);
      }
  }
  if (state_of(meet) > AT_SIMD_BARRIER) return false;
  Exchange& e = exchanges[g.first / SIMD][g.parity];
  e.mask = mask;
  if (state_of(meet) == AT_SIMD_BARRIER) {
    if (flags_of(meet) & MEM_DEVICE) g.sub[DEVICE]++;
    if (flags_of(meet) & MEM_THREADGROUP) g.sub[THREADGROUP]++;
    counts.simdgroup_barriers++;
  } else if (op_of(meet) == EXCHANGE) {
    counts.simd_ops++;
    g.parity ^= 1;
  } else {
    cur = fibers + g.first;
    if (g.size != SIMD) fail((u32)meet, "simdgroup_matrix operation in a simdgroup of %u lanes", g.size);
    collective = 1;
    if (op_of(meet) == MATRIX_MULTIPLY) multiply_matrices(payloads + g.first);
    else move_matrix(payloads + g.first, op_of(meet) == MATRIX_STORE);
    collective = 0;
  }
  for (u32 i = 0; i < g.size; i++)
    if (mask >> i & 1) lane[i] = READY;
  return true;
}

static bool resolve_barrier() {
  u32 waiting = NOBODY, finished = NOBODY;
  for (u32 i = 0; i < threads; i++) (state_of(meeting[i]) == DONE ? finished : waiting) = i;
  if (waiting == NOBODY) return false;
  const u64 meet = meeting[waiting];
  cur = fibers + waiting;
  if (finished != NOBODY)
    fail((u32)meet, "divergent barrier: thread %u waits while thread %u has returned", waiting, finished);
  for (u32 i = 0; i < threads; i++)
    if (meeting[i] != meet)
      fail((u32)meet, "divergent barrier: thread %u waits at line %u, thread %u at line %u", waiting, line_of(meet), i,
           line_of(meeting[i]));
  for (u32 space = 0; space < 2; space++)
    if (flags_of(meet) & (space == DEVICE ? MEM_DEVICE : MEM_THREADGROUP)) {
      epoch[space]++;
      for (u32 i = 0; i < group_count; i++) groups[i].sub[space] = 0;
    }
  counts.barriers++;
  memset(meeting, 0, threads * sizeof meeting[0]);
  for (u32 i = 0; i < group_count; i++) start_round(groups[i]);
  return true;
}

// The next lane of this simdgroup that can run; NOBODY once all have stopped.
static inline u32 next_lane(SimdGroup& g) {
  while (g.cursor < g.size) {
    const u32 i = g.first + g.order[g.cursor++];
    if (meeting[i] == READY) return i;
  }
  return NOBODY;
}

// The last lane has stopped: who runs next? NOBODY when the threadgroup is done.
static u32 next_fiber() {
  const u32 step = options.schedule == REVERSE ? group_count - 1 : 1;
  for (u32 blocked = 0;;) {
    SimdGroup& g = groups[current_group];
    const u32 i = next_lane(g);
    if (i != NOBODY) return i;
    if (resolve_simdgroup(g)) {
      start_round(g);
      blocked = 0;
      if (options.schedule == INTERLEAVE) current_group = (current_group + 1) % group_count;
      else if (options.schedule == RANDOM) current_group = random_below(group_count);
    } else {
      current_group = (current_group + step) % group_count;
      if (++blocked == group_count) {
        if (!resolve_barrier()) return NOBODY;
        blocked = 0;
      }
    }
  }
}

static void wait_at(u64 meet) {
  const u32 me = cur->at.index;
  meeting[me] = meet;
  cur->site = (u32)meet;
  u32 next = next_lane(groups[current_group]);
  if (next == NOBODY) next = next_fiber();
  cur = next == NOBODY ? nullptr : fibers + next;
  if (next != me) msl_switch(&sps[me], next == NOBODY ? main_sp : sps[next]);
}

static void run_fiber() {
  kernel(addresses, &cur->at);
  if (cur->pending) settle(*cur);
  for (;;) wait_at((u64)DONE << 56);
}

// ---- what the kernel calls
EXPORT u32 msl_lane() { return cur->at.lane; }

EXPORT void* msl_exchange(u32 name, u32 site, const void* payload, u32 size) {
  Fiber& f = *cur;
  if (f.pending) settle(f);
  Exchange& e = exchanges[f.at.simdgroup][groups[f.at.simdgroup].parity];
  memcpy(e.slot[f.at.lane], payload, size);
  wait_at((u64)AT_SIMD << 56 | (u64)name << 40 | site);
  return &e;
}

// The lanes' payloads stay where they are: nobody reads them after the meeting.
EXPORT void msl_matrix(u32 op, u32 site, void* payload) {
  Fiber& f = *cur;
  if (f.pending) settle(f);
  payloads[f.at.index] = payload;
  wait_at((u64)AT_SIMD << 56 | (u64)op << 48 | site);
}

EXPORT void msl_barrier(u32 flags, u32 simdgroup_only, u32 site) {
  if (cur->pending) settle(*cur);
  wait_at((u64)(simdgroup_only ? AT_SIMD_BARRIER : AT_BARRIER) << 56 | (u64)flags << 32 | site);
}

// The address of a threadgroup array: allocated by the first thread that comes by, the same for all launches' groups.
EXPORT void* msl_threadgroup(u32 id, u64 size, u32 align, u32 element, u32 line) {
  if (id >= MAX_DECLS) fail(line << 10, "more than %u threadgroup arrays", MAX_DECLS);
  Decl& d = decls[id];
  if (!d.used) {
    u64 end = 0, total = size;
    for (u32 i = 0; i < MAX_DECLS; i++)
      if (decls[i].used) {
        total += decls[i].size;
        if (decls[i].offset + decls[i].size > end) end = decls[i].offset + decls[i].size;
      }
    if (total > THREADGROUP_LIMIT)
      fail(line << 10, "%lu bytes of threadgroup memory; %lu are all there is", total, (u64)THREADGROUP_LIMIT);
    counts.threadgroup_bytes = total;
    // At a multiple of what it is aligned to, and of no more than that.
    const u64 a = 2 * align, offset = (end + RED_ZONE + a - 1) / a * a + align;
    d = Decl{offset, size, element < 4 ? element : 4, line, 1};
    for (u64 o = d.offset / RED_ZONE; o * RED_ZONE < d.offset + size; o++) decl_of[o] = &d;
    memset(arena + d.offset, 0xff, size);
  }
  return arena + d.offset;
}

EXPORT void msl_trap(u32 kind, u32 site) {
  const char* what = kind == 18   ? "index out of the bounds of a fixed-size array"
                     : kind == 3  ? "integer division by zero or overflow"
                                  : "undefined behaviour";
  fail(site, "%s", what);
}

// bfloat: clang calls this to round a float to the nearest bfloat, ties to even; the result travels in xmm0.
EXPORT __bf16 __truncsfbf2(float x) {
  u32 bits = __builtin_bit_cast(u32, x);
  if ((bits & 0x7fffffff) > 0x7f800000) bits |= 0x400000;
  else bits += 0x7fff + (bits >> 16 & 1);
  return __builtin_bit_cast(__bf16, (u16)(bits >> 16));
}

void run_group(const u32* group, const u32* count, const u32* size, const u32* full, const u32* grid) {
  threads = size[0] * size[1] * size[2];
  group_count = (threads + SIMD - 1) / SIMD;
  const u32 launch_groups = (full[0] * full[1] * full[2] + SIMD - 1) / SIMD;
  for (u32 t = 0; t < threads; t++) {
    Fiber& f = fibers[t];
    Position& p = f.at;
    const u32 in[3] = {t % size[0], t / size[0] % size[1], t / size[0] / size[1]};
    for (u32 i = 0; i < 3; i++) {
      p.in_grid[i] = group[i] * full[i] + in[i], p.in_threadgroup[i] = in[i], p.threadgroup[i] = group[i];
      p.groups_per_grid[i] = count[i], p.grid[i] = grid[i], p.group_size[i] = size[i], p.launch_group_size[i] = full[i];
    }
    p.index = t, p.lane = t % SIMD, p.simdgroup = t / SIMD, p.simdgroups = group_count;
    p.launch_simdgroups = launch_groups;
    f.pending = nullptr, f.site = 0;
    // Stacks start at scattered offsets in their pages: at equal ones they would evict each other from the cache.
    u64* sp = (u64*)(stacks + (t + 1) * (STACK + GUARD) - 64 - t * 832 % 4096 / 64 * 64);
    *--sp = 0;                // a return address: keeps the stack aligned as a call would
    *--sp = (u64)run_fiber;
    for (u32 i = 0; i < 6; i++) *--sp = 0;
    sps[t] = sp;
  }
  for (u32 s = 0; s < group_count; s++) {
    SimdGroup& g = groups[s];
    g.first = s * SIMD, g.size = threads - g.first < SIMD ? threads - g.first : SIMD;
    g.parity = 0, g.sub[0] = g.sub[1] = 0, g.products = 0;
    memset(g.sums, 0, sizeof g.sums);
    for (u32 i = 0; i < g.size; i++) g.order[i] = options.schedule == REVERSE ? g.size - 1 - i : i;
    start_round(g);
  }
  current_group = options.schedule == REVERSE ? group_count - 1 : 0;
  group_number++;
  for (u32 s = 0; s < 2; s++) group_epoch[s] = ++epoch[s];
  for (u32 i = 0; i < MAX_DECLS; i++)
    if (decls[i].used) memset(arena + decls[i].offset, 0xff, decls[i].size);
  counts.threadgroups++, counts.threads += threads;
  memset(meeting, 0, sizeof meeting);
  const u32 start = next_fiber();
  cur = fibers + start;
  msl_switch(&main_sp, sps[start]);
  cur = nullptr;
}

void create_machine() {
  if (stacks) return;
  const u64 each = STACK + GUARD;
  stacks = (u8*)mmap(0, MAX_THREADS * each, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (u32 i = 0; i < MAX_THREADS; i++) mprotect(stacks + i * each, GUARD, PROT_NONE);
  arena = (u8*)mmap(0, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

// Shared declarations of the stand-in's runtime: one operating-system thread plays one GPU.
//
// A GPU thread is a fiber; 32 consecutive fibers are a simdgroup. `machine.cpp` schedules fibers and carries out
// what a simdgroup does together; `checker.cpp` watches every access to device and threadgroup memory.
#pragma once
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

enum : u32 { MAX_THREADS = 1024, SIMD = 32, MAX_BUFFERS = 64, MAX_DECLS = 64 };
// The arena is larger than the limit: room for red zones between the arrays, wide enough that a block of one red
// zone's size meets one array at most.
enum : u64 { ARENA = 1u << 17, THREADGROUP_LIMIT = 32768, RED_ZONE = 256 };

// Where a thread stands. The kernel's wrapper (source.py) declares the same layout.
struct Position {
  u32 in_grid[3], in_threadgroup[3], threadgroup[3], groups_per_grid[3], grid[3], group_size[3], launch_group_size[3];
  u32 index, lane, simdgroup, simdgroups, launch_simdgroups;
};

// Where a fiber stands: 0 while it can run, else what it waits for, in one word that all lanes of a simdgroup must
// share: state << 56 | operation << 48 | name << 40 | memory flags << 32 | site (line << 10 | column).
enum State : u64 { READY = 0, AT_SIMD, AT_SIMD_BARRIER, AT_BARRIER, DONE };
enum Op : u32 { EXCHANGE, MATRIX_LOAD, MATRIX_STORE, MATRIX_MULTIPLY };  // what a simdgroup does at a meeting point
enum Space { DEVICE, THREADGROUP };
enum MemFlags : u32 { MEM_DEVICE = 1, MEM_THREADGROUP = 2 };

struct Fiber {
  Position at;
  u32 site;  // last seen at
  // A write that collided with another thread's: harmless if it stores the same bytes, which shows only afterwards.
  u8* pending;
  u32 pending_size, pending_site;
  u8 pending_old[16];
};

enum { APART = 8 };  // how far back a matrix product looks for the last one with its accumulator

struct SimdGroup {
  u32 first, size;     // its fibers
  u32 cursor, parity;  // next lane to look at; which of the two exchange buffers is in use
  u8 order[SIMD];
  u16 sub[2];          // simdgroup barriers since the last threadgroup barrier, per memory space
  u64 sums[APART];     // addresses of the accumulators of the last matrix products, in a ring
  u32 products;
};

// What the lanes bring to a meeting. Two of these suffice for a simdgroup: no lane can reach the meeting after next
// before every lane has read this one's.
struct Exchange {
  alignas(64) u8 slot[SIMD][64];
  u32 mask;
};

// One step of the history of a granule of memory: who wrote last, who has read since.
struct Cell {
  u32 w_epoch;  // 0 = never written, 1 = initialised before the launch
  u16 w_who, w_sub;
  u32 r_epoch;
  u16 r_who, r_sub;
};

struct Buffer {
  const void* data;  // initial bytes, or null
  u64 size;
  u32 output, initialised, granule;
  u32 misalign, lead, unused;  // address modulo 16, and byte offset of element 0, that the caller's array has
  // filled in by the launch
  u8* base;
  Cell* cells;
  u32* touched;  // per granule: last threadgroup that read it
};

struct Decl {
  u64 offset, size;
  u32 granule, line;
  u8 used;
};

struct Options {
  u32 checked, schedule, seed, strict_writes, early_exit;
};

struct Counts {
  u64 read[MAX_BUFFERS], written[MAX_BUFFERS];                      // bytes asked for by all threads
  u64 unique_read[MAX_BUFFERS], unique_written[MAX_BUFFERS];        // bytes, each counted once per threadgroup
  u64 threadgroup_read, threadgroup_written, threadgroup_bytes;
  u64 loads[2], stores[2];  // of all threads, by memory space; in checked mode
  u64 matrix_multiplies, apart, scalar_macs, barriers, simdgroup_barriers, simd_ops, same_value_writes;
  u64 threadgroups, threads;
  u64 unwritten[MAX_BUFFERS], first_unwritten[MAX_BUFFERS];
};

enum Schedule : u32 { FORWARD, REVERSE, INTERLEAVE, RANDOM };

extern Options options;
extern Counts counts;
extern Fiber fibers[MAX_THREADS];
extern u64 meeting[MAX_THREADS];
extern Fiber* cur;
extern u32 collective;  // 1 while a simdgroup acts as one
extern SimdGroup groups[MAX_THREADS / SIMD];
extern u32 epoch[2], group_epoch[2], group_number;
extern Buffer* buffers;
extern u32 buffer_count;
extern Decl decls[MAX_DECLS];
extern Decl* decl_of[ARENA / RED_ZONE];
extern u8* arena;

typedef void (*Kernel)(u64* buffers, const Position* at);
extern Kernel kernel;
extern u64 addresses[MAX_BUFFERS];
extern char message[1024];
extern u32 message_site;
extern bool failed;
// The instrumented kernel adds to this one, once per basic block.
extern "C" __attribute__((visibility("default"))) u64 msl_scalar_macs;

#define EXPORT extern "C" __attribute__((visibility("default")))

[[noreturn]] void fail(u32 site, const char* format, ...) __attribute__((format(printf, 2, 3)));
void access(int space, u64 address, u32 size, u32 align, u32 site, bool write);
void settle(Fiber& f);
void checker_begin_launch();
void checker_end_launch();
u8* place_buffer(u32 index, Buffer& b);
void release_buffers();
void create_machine();
void run_group(const u32* group, const u32* count, const u32* size, const u32* full, const u32* grid);
void seed_random(u32 seed);
u32 random_below(u32 n);
const char* place_name(u64 meeting);

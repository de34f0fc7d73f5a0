// The memory checker: bounds, alignment, uninitialised reads, data races, and traffic counts.
//
// Ordering in a Metal kernel comes from barriers alone, so a thread's clock is two numbers: the threadgroup barriers
// passed (`epoch`) and the simdgroup barriers since (`sub`), kept apart for device and threadgroup memory because a
// barrier orders only the spaces that its mem_flags name. Two accesses race when neither program order nor those
// numbers order them and one is a write. Threadgroups of one launch are never ordered.
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum : u16 {
  COLLECTIVE = 0x8000,   // | simdgroup: a simdgroup_load or simdgroup_store, whose lanes are nobody's business
  SEVERAL = 0x4000,      // | simdgroup: two or more lanes of one simdgroup
  EVERYWHERE = 0xffff,   // several simdgroups
  OTHER_GROUP = 0x8000,  // flag in r_sub: a thread of an earlier threadgroup has read it too
};
static const u64 REGION = 1ull << 32;  // address space for one buffer: buffer number = address / REGION
static u8* regions;
static Cell* arena_cells;
static u32 who, my_sub, my_simdgroup;

static inline u32 simdgroup_of(u16 w) { return w & (COLLECTIVE | SEVERAL) ? w & 0x3ff : w / SIMD; }
static const char* verb(bool write) { return write ? "write" : "read"; }

static void name_of(u16 w, char* out, u64 n) {
  if (w == EVERYWHERE) snprintf(out, n, "several simdgroups");
  else if (w & (COLLECTIVE | SEVERAL)) snprintf(out, n, "simdgroup %u", w & 0x3ff);
  else snprintf(out, n, "thread %u", w);
}

[[noreturn]] static void race(u32 site, int space, const char* kind, u16 other, bool other_group, u64 offset) {
  char name[40];
  name_of(other, name, sizeof name);
  fail(site, "data race on %s memory (byte offset %lu): %s by %s%s", space == DEVICE ? "device" : "threadgroup", offset,
       kind, name, other_group ? " of another threadgroup" : "");
}

// Is the access (w, e, sub) of this threadgroup ordered before the one being made?
static inline bool before_me(u16 w, u32 e, u16 sub, int space) {
  return e < epoch[space] || (w != EVERYWHERE && simdgroup_of(w) == my_simdgroup && sub < my_sub);
}

static void on_write(Cell& c, int space, u32 site, u64 offset, bool* collided) {
  const u32 start = group_epoch[space];
  if (c.w_epoch > 1) {
    if (c.w_epoch < start) {
      if (space == DEVICE) race(site, space, "write after write", c.w_who, true, offset);
    } else if (c.w_who != who && !before_me(c.w_who, c.w_epoch, c.w_sub, space)) {
      if (options.strict_writes || collective) race(site, space, "write after write", c.w_who, false, offset);
      *collided = true;
    }
  }
  if (c.r_epoch) {
    if (space == DEVICE && (c.r_epoch < start || (c.r_sub & OTHER_GROUP)))
      race(site, space, "write after read", c.r_who, true, offset);
    // A simdgroup's own collective read is over before its next collective write: both take all lanes.
    if (c.r_epoch >= start && c.r_who != who && !before_me(c.r_who, c.r_epoch, c.r_sub & 0x7fff, space))
      race(site, space, "write after read", c.r_who, false, offset);
  }
  c.w_epoch = epoch[space];
  c.w_who = who;
  c.w_sub = my_sub;
}

static void on_read(Cell& c, int space, u32 site, u64 offset) {
  const u32 start = group_epoch[space], now = epoch[space];
  if (c.w_epoch != 1) {
    if (c.w_epoch == 0 || (space == THREADGROUP && c.w_epoch < start))
      fail(site, "read of %s memory that nothing has written yet (byte offset %lu)",
           space == DEVICE ? "output" : "threadgroup", offset);
    if (c.w_epoch < start) race(site, space, "read after write", c.w_who, true, offset);
    // Lanes of a collective store and a collective load need not agree, so even one's own needs a barrier.
    if ((c.w_who != who || collective) && !before_me(c.w_who, c.w_epoch, c.w_sub, space))
      race(site, space, "read after write", c.w_who, false, offset);
  }
  const u16 other = c.r_epoch && (c.r_epoch < start || (c.r_sub & OTHER_GROUP)) && space == DEVICE ? OTHER_GROUP : 0;
  if (c.r_epoch != now || c.r_who == who) {
    c.r_who = who;
    c.r_sub = my_sub | other;
  } else if (c.r_who == EVERYWHERE || simdgroup_of(c.r_who) != my_simdgroup) {
    c.r_who = EVERYWHERE;
    c.r_sub = other;
  } else {
    c.r_who = (c.r_sub & 0x7fff) < my_sub ? who : SEVERAL | my_simdgroup;
    c.r_sub = my_sub | other;
  }
  c.r_epoch = now;
}

// A collided write is harmless when the bytes stay as they were; the access hook runs before the store, so look later.
void settle(Fiber& f) {
  u8* p = f.pending;
  f.pending = nullptr;
  if (memcmp(p, f.pending_old, f.pending_size))
    fail(f.pending_site, "data race: two unordered threads write different values");
  counts.same_value_writes++;
}

static void collided_write(u8* p, u32 size, u32 site) {
  cur->pending = p;
  cur->pending_size = size < sizeof cur->pending_old ? size : sizeof cur->pending_old;
  cur->pending_site = site;
  memcpy(cur->pending_old, p, cur->pending_size);
}

static void threadgroup_access(u64 offset, u32 size, u32 align, u32 site, bool write) {
  Decl* d = decl_of[offset / RED_ZONE];
  if (!d || offset < d->offset || offset + size > d->offset + d->size)
    fail(site, "out-of-bounds threadgroup %s of %u bytes", verb(write), size);
  if (offset & (align - 1)) fail(site, "misaligned threadgroup %s of %u bytes", verb(write), size);
  if (size < d->granule) {  // an array viewed with a narrower type: follow its bytes more closely from here on
    for (u64 o = d->offset; o < d->offset + d->size; o += d->granule)
      for (u32 k = size; k < d->granule; k += size) arena_cells[o + k] = arena_cells[o];
    d->granule = size;
  }
  (write ? counts.threadgroup_written : counts.threadgroup_read) += size;
  (write ? counts.stores : counts.loads)[THREADGROUP]++;
  bool collided = false;
  for (u32 k = 0; k < size; k += d->granule) {
    Cell& c = arena_cells[offset + k];
    if (write) on_write(c, THREADGROUP, site, offset + k - d->offset, &collided);
    else on_read(c, THREADGROUP, site, offset + k - d->offset);
  }
  if (collided) collided_write(arena + offset, size, site);
}

static void device_access(u64 address, u32 size, u32 align, u32 site, bool write) {
  const u32 i = (address - (u64)regions) / REGION;
  if (i >= buffer_count) fail(site, "device %s at an address that belongs to no buffer", verb(write));
  Buffer& b = buffers[i];
  const u64 offset = address - (u64)b.base;
  if (offset >= b.size || offset + size > b.size)
    fail(site, "out-of-bounds %s of %u bytes at byte offset %ld of buffer #%u# (%lu bytes)", verb(write), size,
         (long)offset, i, b.size);
  if (address & (align - 1)) 
    fail(site, "misaligned %s of %u bytes at byte offset %lu of buffer #%u#", verb(write), size, offset, i);
  (write ? counts.stores : counts.loads)[DEVICE]++;
  const u32 g = b.granule, shift = __builtin_ctz(g);  // (a division here would cost as much as all the rest)
  if (!b.output) {
    if (write) fail(site, "write to input buffer #%u#", i);
    counts.read[i] += size;
    for (u64 k = offset >> shift; k << shift < offset + size; k++)
      if (b.touched[k] != group_number) b.touched[k] = group_number, counts.unique_read[i] += g;
    return;
  }
  (write ? counts.written : counts.read)[i] += size;
  bool collided = false;
  for (u64 k = offset >> shift; k << shift < offset + size; k++) {
    Cell& c = b.cells[k];
    if (write) {
      if (c.w_epoch < group_epoch[DEVICE]) counts.unique_written[i] += g;
      on_write(c, DEVICE, site, k * g, &collided);
    } else {
      if (c.r_epoch < group_epoch[DEVICE]) counts.unique_read[i] += g;
      on_read(c, DEVICE, site, k * g);
    }
  }
  if (collided) collided_write((u8*)address, size, site);
}

// `space`: 1 device, 3 threadgroup, 2 constant, 4 unknown (clang's address-space numbers); 0 is private, never watched.
void access(int space, u64 address, u32 size, u32 align, u32 site, bool write) {
  if (!cur) return;
  if (cur->pending) settle(*cur);
  const bool in_arena = address - (u64)arena < ARENA, in_region = address - (u64)regions < REGION * MAX_BUFFERS;
  if (space == 2 && !in_region) return;                // a constant table inside the program
  if (space == 4 && !in_region && !in_arena) return;   // `this` of an object in private memory
  my_simdgroup = cur->at.simdgroup;
  who = collective ? COLLECTIVE | my_simdgroup : cur->at.index;
  cur->site = site;
  if (space == 3 || (space == 4 && in_arena)) {
    my_sub = groups[my_simdgroup].sub[THREADGROUP];
    if (!in_arena) fail(site, "%s through a wild threadgroup pointer", verb(write));
    threadgroup_access(address - (u64)arena, size, align, site, write);
  } else {
    my_sub = groups[my_simdgroup].sub[DEVICE];
    device_access(address, size, align, site, write);
  }
}

// Called by the instrumented kernel. `packed` = size << 8 | align; `site` indexes the kernel's table of sites.
EXPORT void msl_read(int space, u64 address, u32 packed, u32 site) {
  access(space, address, packed >> 8, packed & 255, site, false);
}
EXPORT void msl_write(int space, u64 address, u32 packed, u32 site) {
  access(space, address, packed >> 8, packed & 255, site, true);
}

u8* place_buffer(u32 index, Buffer& b) {
  if (!regions)
    regions = (u8*)mmap(0, REGION * MAX_BUFFERS, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (regions == MAP_FAILED) fail(0, "cannot reserve address space");
  // The data end at an unmapped page, so that even the unchecked mode faults on a far overrun.
  u8* middle = regions + index * REGION + REGION / 2;
  const u64 length = (b.size + 32 + 4095) & ~4095ull;
  mprotect(middle, length, PROT_READ | PROT_WRITE);
  b.base = middle + ((length - b.size - 16) & ~15ull) + b.misalign;
  memset(middle, 0xff, length);
  if (b.data) memcpy(b.base, b.data, b.size);
  if (options.checked) {
    const u64 n = b.size / b.granule + 1;
    if (b.output) {
      b.cells = (Cell*)calloc(n, sizeof(Cell));
      if (b.initialised) for (u64 i = 0; i < n; i++) b.cells[i].w_epoch = 1;
    } else b.touched = (u32*)calloc(n, sizeof(u32));
  }
  return b.base;
}

void checker_begin_launch() {
  if (!arena_cells) arena_cells = (Cell*)calloc(ARENA, sizeof(Cell));
  else memset(arena_cells, 0, ARENA * sizeof(Cell));
}

void checker_end_launch() {
  for (u32 i = 0; i < buffer_count; i++) {
    const Buffer& b = buffers[i];
    if (!b.cells) continue;
    for (u64 k = 0; k < b.size / b.granule; k++)
      if (!b.cells[k].w_epoch && !counts.unwritten[i]++) counts.first_unwritten[i] = k;
  }
}

void release_buffers() {
  for (u32 i = 0; i < buffer_count; i++) {
    Buffer& b = buffers[i];
    free(b.cells), free(b.touched);
    b.cells = nullptr, b.touched = nullptr;
    u8* middle = regions + i * REGION + REGION / 2;
    const u64 length = (b.size + 32 + 4095) & ~4095ull;
    madvise(middle, length, MADV_DONTNEED);
    mprotect(middle, length, PROT_NONE);
  }
}

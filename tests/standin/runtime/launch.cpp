// One launch: buffers in, threadgroups in the order of the schedule, buffers and counts out; and fatal signals.
#include "runtime.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool refuse(const char* format, u64 a = 0, u64 b = 0) {
  snprintf(message, sizeof message, format, a, b);
  return false;
}

static bool run_groups(const u32* grid, const u32* group_size) {
  u32 full[3], count[3];
  for (u32 i = 0; i < 3; i++) {
    full[i] = group_size[i] < grid[i] ? group_size[i] : grid[i];
    if (!full[i]) return refuse("grid and threadgroup sizes must be positive");
    count[i] = (grid[i] + full[i] - 1) / full[i];
  }
  const u64 threads = (u64)group_size[0] * group_size[1] * group_size[2];
  if (threads > MAX_THREADS) return refuse("%lu threads in a threadgroup; %lu is the most", threads, MAX_THREADS);
  const u64 total = (u64)count[0] * count[1] * count[2];
  u32* order = (u32*)malloc(total * sizeof(u32));
  for (u64 i = 0; i < total; i++) order[i] = options.schedule == REVERSE ? total - 1 - i : i;
  if (options.schedule == RANDOM)
    for (u64 i = total; i > 1; i--) {
      const u64 j = random_below(i);
      const u32 t = order[i - 1];
      order[i - 1] = order[j], order[j] = t;
    }
  for (u64 n = 0; n < total && !failed; n++) {
    const u32 i = order[n];
    const u32 group[3] = {i % count[0], i / count[0] % count[1], i / count[0] / count[1]};
    u32 size[3];  // the last threadgroup of an axis may be smaller
    for (u32 k = 0; k < 3; k++) {
      const u32 left = grid[k] - group[k] * full[k];
      size[k] = left < full[k] ? left : full[k];
    }
    run_group(group, count, size, full, grid);
  }
  free(order);
  return !failed;
}

// A fatal signal ends the process: the parent reads the last words from standard error and starts another.
static void last_words(int number) {
  char text[256];
  const char* what = number == SIGTERM                      ? "still running"
                     : number == SIGSEGV || number == SIGBUS ? "memory fault"
                                                             : "crash";
  const int n = snprintf(text, sizeof text, "%s (signal %d); last seen %s\n@%u\n", what, number,
                         cur ? place_name(meeting[cur - fibers]) : "outside a kernel", cur ? cur->site : 0);
  if (write(2, text, n) != n) _exit(71);
  _exit(70);
}

EXPORT void msl_catch_signals() {
  static u8 stack[1 << 16];
  stack_t alternate = {};
  alternate.ss_sp = stack, alternate.ss_size = sizeof stack;
  sigaltstack(&alternate, nullptr);
  struct sigaction action = {};
  action.sa_handler = last_words;
  action.sa_flags = SA_ONSTACK;
  const int fatal[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGTERM};
  for (int s : fatal) sigaction(s, &action, nullptr);
}

// Runs a kernel. `outputs[i]`, where not null, receives buffer i afterwards. Returns 0, or 1 with a message.
EXPORT int msl_launch(Kernel entry, const Options* chosen, Buffer* bound, u32 bound_count, const u32* grid,
                    const u32* group_size, void** outputs, Counts* counted, char* text, u32 text_size, u32* site) {
  create_machine();
  options = *chosen;
  kernel = entry;
  buffers = bound, buffer_count = bound_count;
  memset(&counts, 0, sizeof counts);
  memset(decls, 0, sizeof decls);
  memset(decl_of, 0, sizeof decl_of);
  message[0] = 0, message_site = 0, failed = false, cur = nullptr, collective = 0;
  msl_scalar_macs = 0;
  group_number = 0;
  epoch[0] = epoch[1] = 1;  // 1 stands for "before the launch"
  seed_random(options.seed);
  if (options.checked) checker_begin_launch();
  for (u32 i = 0; i < buffer_count; i++) addresses[i] = (u64)place_buffer(i, buffers[i]) + buffers[i].lead;
  const bool good = run_groups(grid, group_size);
  if (good && options.checked) checker_end_launch();
  for (u32 i = 0; i < buffer_count; i++)
    if (outputs[i]) memcpy(outputs[i], buffers[i].base, buffers[i].size);
  release_buffers();
  counts.scalar_macs = msl_scalar_macs;
  *counted = counts;
  snprintf(text, text_size, "%s", message);
  *site = message_site;
  return !good;
}

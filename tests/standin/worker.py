"""The child process: loads the runtime and runs launches, a pickled job on stdin, a pickled reply on stdout.

A script of its own with nothing but the standard library, so that it starts in a few milliseconds and a
kernel that kills it takes nothing else along.
"""

import ctypes
import pickle
import struct
import sys

BUFFERS = 64
# Must match runtime.h's Counts.
PER_BUFFER = ("read", "written", "unique_read", "unique_written")
TOTALS = (
    "threadgroup_read", "threadgroup_written", "threadgroup_bytes", "device_loads", "threadgroup_loads",
    "device_stores", "threadgroup_stores", "matrix_multiplies", "apart", "scalar_macs",
    "barriers", "simdgroup_barriers", "simd_ops", "same_value_writes", "threadgroups", "threads",
)  # fmt: skip


BUFFER_FLAGS = ("output", "initialised", "granule", "misalign", "lead", "unused")


class Buffer(ctypes.Structure):
    _fields_ = (
        [("data", ctypes.c_char_p), ("size", ctypes.c_uint64)]
        + [(n, ctypes.c_uint32) for n in BUFFER_FLAGS]
        + [(n, ctypes.c_void_p) for n in ("base", "cells", "touched")]
    )


class Counts(ctypes.Structure):
    _fields_ = (
        [(n, ctypes.c_uint64 * BUFFERS) for n in PER_BUFFER]
        + [(n, ctypes.c_uint64) for n in TOTALS]
        + [(n, ctypes.c_uint64 * BUFFERS) for n in ("unwritten", "first_unwritten")]
    )


class Machine:
    def __init__(self, runtime):
        # The kernels' libm calls are resolved here, not linked: lld needs no system libraries then.
        self.libm = ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
        self.runtime = ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        self.runtime.msl_catch_signals()
        self.kernels = {}

    def launch(self, job):
        path = job["path"]
        if path not in self.kernels:
            self.kernels[path] = ctypes.CDLL(path).msl_entry
        specs = job["buffers"]
        buffers = (Buffer * len(specs))()
        outputs = (ctypes.c_void_p * len(specs))()
        results = []
        for i, b in enumerate(specs):
            flags = b["output"], b["data"] is not None, b["granule"], b["misalign"], b["lead"]
            buffers[i] = Buffer(b["data"], b["size"], *flags)
            if b["output"]:
                results.append(ctypes.create_string_buffer(max(b["size"], 1)))
                outputs[i] = ctypes.addressof(results[-1])
        options = (ctypes.c_uint32 * 5)(*job["options"])
        counts, message, site = Counts(), ctypes.create_string_buffer(2048), ctypes.c_uint32()
        sizes = [(ctypes.c_uint32 * 3)(*job[k]) for k in ("grid", "threadgroup")]
        failed = self.runtime.msl_launch(
            self.kernels[path], options, buffers, len(specs), *sizes, outputs, ctypes.byref(counts),
            message, len(message), ctypes.byref(site),
        )  # fmt: skip
        counted = {
            n: list(getattr(counts, n))[: len(specs)] for n in (*PER_BUFFER, "unwritten", "first_unwritten")
        }
        counted |= {n: getattr(counts, n) for n in TOTALS}
        sizes = [b["size"] for b in specs if b["output"]]
        return {
            "message": message.value.decode() if failed else None,
            "site": site.value,
            "outputs": [r.raw[:n] for r, n in zip(results, sizes, strict=True)],
            "counts": counted,
        }


def main():
    machine = Machine(sys.argv[1])
    take, give = sys.stdin.buffer, sys.stdout.buffer
    while header := take.read(8):
        reply = machine.launch(pickle.loads(take.read(struct.unpack("<Q", header)[0])))
        data = pickle.dumps(reply, protocol=5)
        give.write(struct.pack("<Q", len(data)) + data)
        give.flush()


if __name__ == "__main__":
    main()

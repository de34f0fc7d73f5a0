"""Every kernel in CUDA by NVIDIA's compiler, for two generations of GPUs, and whether a GPU has room for it.

What is compiled is the text that MLX hands to the run-time compiler, less MLX's own utilities.
"""

import re
import shutil
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from standin import cuda

import mlx_hla
from mlx_hla import kernels
from mlx_hla.ops import cases
from mlx_hla.ops.cases import Case, Shape
from mlx_hla.ops.operator import choices, find

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of the CUDA toolkit")

CAPABILITIES = (80, 90)
# Widths of heads: each in one dtype, and all of them in all.
SOME = {"float32": [(128, 128)], "bfloat16": [(96, 96)], "float16": [(64, 64)]}
ALL = {dtype: [(40, 24), (64, 64), (96, 96), (128, 128)] for dtype in SOME}
REGISTERS = 65536  # of a group of 32 lanes that one core holds
SHARED_BYTES = 48 * 1024  # that a kernel may declare
LENGTHS = (70, 600)  # one walk, and blocks
GROUPS = (1, kernels.plan.MAX_GROUP)

# Of what the compiler keeps in memory for want of registers, bytes of a thread. The walks back are bounded to
# 128 in bfloat16 (plan.resident), and have two parts of every operand in float32: some of what a chunk wants
# once lies there.
SPILLED = {"linear_out": 128, "back_keys": 128, "back_queries": 16, "routed_walk": 64}


def run(case):
    arrays, given = cases.inputs(case)
    if case.kind == "packed":
        arrays[4] = kernels.pack(arrays[4])
    cases.with_gradients(case, cases.through(case, "kernels"), given)(*arrays)


def run_all(widths_of):
    """Every kernel that the library ever launches, for these widths of heads by dtype."""
    for T in LENGTHS:
        run(Case("hla2", "forward", "float32", Shape(1, T, 2, 1, 40, 24)))  # 128 columns are not fused
    for dtype, widths in widths_of.items():
        for D, DV in widths:
            for family in choices():
                for T in LENGTHS:
                    run(Case(family, "backward", dtype, Shape(1, T, 2, 1, D, DV)))
            for family in ("first", "hla2", "ahla", "hla3"):
                for G in GROUPS:
                    packed = any(slot.symmetric for slot in find(family).slots)
                    for kind in ("step", "packed") if packed else ("step",):
                        run(Case(family, kind, dtype, Shape(1, 1, G, 1, D, DV)))
                    step = getattr(mlx_hla, f"{find(family).name}_step")
                    q, k, v = (mx.zeros((1, *s), getattr(mx, dtype)) for s in ((G, D), (1, D), (1, DV)))
                    step(q, k, v, None, normalize=True, backend="cuda")


def compiled(programs, folder):
    """(the compiler's words, those of the assembler for every capability)."""
    by_header = defaultdict(list)
    for p in programs:
        by_header[p.header].append(p.function)
    # The longest first, so that none is left to the last.
    texts = sorted((functions, header) for header, functions in by_header.items())
    texts.sort(key=lambda text: -sum(map(len, text[0])))

    def one(numbered):
        n, (functions, header) = numbered
        source, ptx = folder / f"{n}.cu", folder / f"{n}.ptx"
        text = cuda.PRELUDE + header + "namespace mlx::core::cu {\n" + "".join(functions) + "}\n"
        source.write_text(text)
        first, later = CAPABILITIES[0], ["ptxas", "-v", "-o", "/dev/null", str(ptx)]
        front = ["nvcc", "-std=c++17", "-ptx", f"-arch=compute_{first}", "-o", str(ptx), str(source)]
        words = [ran(front)]
        return words + [ran([*later, f"-arch=sm_{sm}"]) for sm in CAPABILITIES]

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, enumerate(texts)))


def ran(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]}: {done.stderr[:3000]}"
    return done.stderr + done.stdout


USED = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<gpu>sm_\d+)'.*?(?P<spilled>\d+) bytes spill stores"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


@pytest.mark.parametrize("widths", [SOME, pytest.param(ALL, marks=pytest.mark.fuzz)], ids=["some", "all"])
def test_every_kernel_compiles_and_fits(monkeypatch, tmp_path, widths):
    programs = cuda.recorded(monkeypatch)
    run_all(widths)
    families = {p.name.split("_hla_")[1] for p in programs}
    for name in ("linear_sums", "linear_scan", "linear_out", "hla2_walk", "hla2_middle", "back_queries"):
        assert any(f.startswith(name) for f in families), name
    threads = {p.name: n for p, n in programs.items()}
    names = sorted(threads, key=len, reverse=True)
    seen, wrong = set(), []
    for front, *assembled in compiled(programs, tmp_path):
        assert "error" not in front
        for words in assembled:
            for m in USED.finditer(words):
                name = next(n for n in names if n in m["name"])
                seen.add((name, m["gpu"]))
                shared = re.search(r"(\d+) bytes smem", m["rest"])
                registers = -(-int(m["registers"]) // 8) * 8  # they are dealt out by eights
                allowed = max((n for k, n in SPILLED.items() if f"_hla_{k}_" in name), default=0)
                fits = registers * threads[name] <= REGISTERS and int(m["spilled"]) <= allowed
                if not fits or int(shared[1] if shared else 0) > SHARED_BYTES:
                    wrong.append(f"{name}, {threads[name]} threads: {m[0]}")
    assert len(seen) == len(CAPABILITIES) * len(threads)
    assert not wrong, "\n".join(wrong)

"""`mlx-hla selftest`: sound kernels pass on the stand-in, broken ones fail, no device is said plainly."""

import argparse
import contextlib
import json

import mlx.core as mx
import numpy as np
import pytest
from standin import metal

from mlx_hla import cli, kernels, selftest
from mlx_hla.ops import cases
from mlx_hla.ops.operator import choices
from mlx_hla.selftest import Case, Shape

needs_standin = pytest.mark.skipif(metal.why_not() is not None, reason=str(metal.why_not()))

SEQUENCE, TOKEN = Shape(1, 40, 2, 1, 16, 8), Shape(2, 1, 2, 1, 16, 8)
TINY = tuple(selftest.all_cases(sequences=(SEQUENCE,), steps=(TOKEN,), long=None))
BROKEN = ("query = x[h * DY + row]", "query = x[h * DY]")  # the step reads one element of q for all


def arguments(**changes):
    return argparse.Namespace(**{"family": None, "dtype": None, "repeats": 1, "json": False} | changes)


def install(monkeypatch, *edit):
    """The stand-in, with every kernel's header edited on its way."""
    metal.install(monkeypatch, checked=False)
    if not edit:
        return

    def make(**options):
        assert "header" in options
        return metal.metal_kernel(**options | {"header": options["header"].replace(*edit)})

    monkeypatch.setattr(mx.fast, "metal_kernel", make)


def test_cases_cover_every_kernel():
    cases = list(selftest.all_cases())
    want = {(f, k) for f in choices() for k in ("forward", "backward", "step")}
    want |= {("hla2", "packed"), ("hla3", "packed")}
    for dtype in selftest.DTYPES:
        assert {(c.family, c.kind) for c in cases if c.dtype == dtype} == want
    assert len(set(cases)) == len(cases)
    for c in cases:
        s = c.shape
        q, k, v = (mx.zeros((s.B, s.T, *x)) for x in ((s.Hq, s.D), (s.Hkv, s.D), (s.Hkv, s.DV)))
        assert kernels.why_not(q, k, v) is None
    assert str(Shape(2, 70, 4, 2, 40, 24)) == "B2-T70-H4x2-D40x24"
    assert str(Shape(1, 1, 16, 16, 64, 64)) == "B1-T1-H16-D64"


@needs_standin
def test_passes(monkeypatch, capsys):
    install(monkeypatch)
    assert selftest.run(arguments(dtype=["float32"]), TINY, ()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first, head, *rows, last = out.splitlines()
    assert f"MLX {mx.__version__}" in first
    assert " ".join(head.split()) == "kernel dtype shape error allowed ops error kernel ms ops ms ratio"
    cases = [c for c in TINY if c.dtype == "float32"]
    assert len(rows) == len(cases)
    assert all(r.endswith("pass") for r in rows)
    assert rows[0].startswith("first forward     float32   B1-T40-H2x1-D16x8  ")
    assert any(r.startswith("hla2 packed step  float32   B2-T1-H2x1-D16x8   ") for r in rows)
    assert last == f"{len(cases)} passed, 0 failed"


@needs_standin
def test_json(monkeypatch, capsys):
    install(monkeypatch)
    assert selftest.run(arguments(family=["hla2"], dtype=["bfloat16"], json=True), TINY, ()) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"chip", "system", "mlx", "mlx_hla", "python", "failed", "results", "verdicts"} == set(result)
    assert result["failed"] == 0
    assert [r["kernel"] for r in result["results"]] == [
        "hla2 forward",
        "hla2 backward",
        "hla2 step",
        "hla2 packed step",
    ]
    for r in result["results"]:
        assert r["passed"]
        assert 0 < r["error"] <= r["tolerance"]
        assert r["kernel_ms"] > 0
        assert r["ops_ms"] > 0
        assert (r["dtype"], r["shape"][:2]) in (("bfloat16", "B1"), ("bfloat16", "B2"))


@needs_standin
def test_a_broken_kernel_fails(monkeypatch, capsys):
    install(monkeypatch, *BROKEN)
    assert selftest.run(arguments(family=["first"], dtype=["float32"]), TINY, ()) == 1
    out = capsys.readouterr().out
    assert "first forward" in out
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert lines["first forward"].endswith("pass")
    assert lines["first step"].endswith("FAIL  (o)")
    assert out.endswith("2 passed, 1 failed\n")


@needs_standin
def test_a_kernel_that_does_not_compile_fails(monkeypatch, capsys):
    install(monkeypatch, "FUNC Place place_of", "FUNC Nothing place_of")
    cases = [Case("first", kind, "float32", TOKEN) for kind in ("step", "forward")]
    assert selftest.run(arguments(json=True), cases, ()) == 1
    step, forward = json.loads(capsys.readouterr().out)["results"]
    assert step["error"] is None
    assert step["kernel_ms"] is None
    assert step["worst"].startswith("MetalCompileError: ")
    assert forward["passed"]


@needs_standin
def test_ops_in_float32_are_the_measure_of_large_cases(monkeypatch):
    install(monkeypatch)
    case = Case("hla2", "backward", "bfloat16", SEQUENCE)
    exact = selftest.run_case(case, 1)
    monkeypatch.setattr(selftest, "REFERENCE_WORK", 0)
    result = selftest.run_case(case, 1)
    assert result.passed
    assert result.error == pytest.approx(exact.error, rel=1e-2)
    assert result.ops_error == pytest.approx(exact.ops_error, rel=1e-2)


def test_errors():
    one = [np.ones((2, 3)), np.ones(4)]
    arrays = [mx.ones((2, 3)), mx.ones(4)]
    assert cases.error_of(arrays, one, "ab") == (0.0, "a")
    assert cases.error_of([arrays[0], arrays[1] * 1.5], one, "ab") == (0.5, "b")
    error, worst = cases.error_of([arrays[0] * mx.nan, arrays[1] * 9], one, "ab")
    assert np.isnan(error)
    assert worst == "a"
    assert not selftest.Result(TINY[0], error <= 1, error, 1, 0, worst, 1, 1).passed
    with pytest.raises(ValueError, match=r"b is \(5,\), expected \(4,\)"):
        cases.error_of([arrays[0], mx.ones(5)], one, "ab")


def test_the_measure_is_a_cpu(monkeypatch):
    """A GPU's products of float32 may be TF32: kernels that are better would differ from them."""
    entered, where = [], []

    @contextlib.contextmanager
    def stream(device):
        entered.append(device)
        yield
        entered.pop()

    def through(case, name):
        where.append((name, list(entered)))
        return lambda *arrays: [mx.ones(3)]

    monkeypatch.setattr(mx, "stream", stream)
    monkeypatch.setattr(cases, "through", through)
    monkeypatch.setattr(cases, "names_of", lambda case: ["o"])
    assert cases.compare(Case("first", "forward", "float32", SEQUENCE)).passed
    assert where == [("mlx", [mx.cpu]), ("mlx", []), ("kernels", [])]


@pytest.mark.skipif(kernels.gpu.here() is not None, reason="there is a GPU here")
def test_no_gpu(capsys):
    assert cli.main(["selftest"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mlx-hla: error: no GPU here; ")
    assert err.count("\n") == 1
    assert cli.main(["selftest", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"].startswith("no GPU here; ")


def test_flags(monkeypatch, capsys):
    assert cli.main(["selftest", "--repeats", "0"]) == 1
    assert capsys.readouterr().err == "mlx-hla: error: repeats must be at least 1, got 0\n"
    with pytest.raises(SystemExit):
        cli.main(["selftest", "--family", "hla4"])
    monkeypatch.setattr(selftest, "run", lambda args: [args.family, args.dtype, args.repeats, args.json])
    got = cli.main(["selftest", "--family", "hla2", "--family", "ahla", "--dtype", "float16", "--json"])
    assert got == [["hla2", "ahla"], ["float16"], 5, True]

"""Kernels are tried before they are trusted: sound, broken, slow and deadly ones, on the stand-in."""

import json
import os
import subprocess
import sys
import warnings

import mlx.core as mx
import pytest
from conftest import assert_close
from standin import cuda, metal

import mlx_hla
from mlx_hla import kernels, selftest, verdicts
from mlx_hla.errors import InputError
from mlx_hla.ops import proof
from mlx_hla.ops.cases import Case, Shape
from mlx_hla.ops.operator import choices, find
from mlx_hla.ops.proof import Subject
from mlx_hla.verdicts import Verdict

needs_standin = pytest.mark.skipif(metal.why_not() is not None, reason=str(metal.why_not()))
SEQUENCE = Subject("first", "sequence", "float32", 64)
STEP = Subject("first", "step", "float32", 64)
BROKEN = ("query = x[h * DY + row]", "query = x[h * DY]")  # the step reads one element of q for all
SLOW, FAST = (3.0, 1.0), (1.0, 3.0)


@pytest.fixture(autouse=True)
def a_new_machine(monkeypatch, tmp_path):
    """Kernels asked to prove themselves, nothing known, a cache folder of its own, and small cases."""
    monkeypatch.setenv("MLX_HLA_PROOF", "1")
    monkeypatch.setenv("MLX_HLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLX_HLA_BACKEND", raising=False)
    monkeypatch.setattr(proof, "_known", {})
    monkeypatch.setattr(proof, "cases_of", small)
    monkeypatch.setattr(proof, "times", lambda case, repeats: FAST)  # the stand-in is no measure of time


def small(subject):
    family, kind, dtype, _ = subject
    if kind == "step":
        return [Case(family, "step", dtype, Shape(2, 1, 2, 1, 16, 8))]
    return [Case(family, part, dtype, Shape(1, 20, 2, 1, 16, 8)) for part in ("forward", "backward")]


def install(monkeypatch, *edit):
    metal.install(monkeypatch, checked=False)
    if not edit:
        return

    def make(**options):
        assert edit[0] in options["header"] or "step" not in options["name"]
        return metal.metal_kernel(**options | {"header": options["header"].replace(*edit)})

    monkeypatch.setattr(mx.fast, "metal_kernel", make)


def token(seed=0):
    keys = mx.random.split(mx.random.key(seed), 3)
    return [mx.random.normal((1, 2, 8), key=key) for key in keys]


def launched(call):
    """(the result, the kernels that were launched for it and for the proof)."""
    with metal.counters() as c:
        result = call()
        mx.eval(result)
    return result, c.kernels


def kept():
    return json.loads(verdicts.cache_file().read_text())["machines"][proof.machine()]


def forget(monkeypatch):
    """Another process on this machine."""
    monkeypatch.setattr(proof, "_known", {})


@needs_standin
def test_sound_kernels_are_tried_once_and_taken(monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(proof, "compare", counted := Counted(proof.compare))
    q, k, v = token()
    for _ in range(2):
        _, names = launched(lambda: mlx_hla.linear_attention_step(q, k, v, None))
        assert names[-1] == "hla_linear_step"
    assert counted.calls == 1
    entry = kept()[str(STEP)]
    assert entry["trusted"]
    assert entry["error"] <= entry["allowed"]
    assert entry["seconds"] >= 0
    forget(monkeypatch)
    _, names = launched(lambda: mlx_hla.linear_attention_step(q, k, v, None))
    assert names == ["hla_linear_step"]
    assert counted.calls == 1
    # A sequence is another matter, and so is another dtype.
    launched(lambda: mlx_hla.linear_attention(*(x[:, None] for x in (q, k, v))))
    launched(lambda: mlx_hla.linear_attention_step(*(x.astype(mx.bfloat16) for x in (q, k, v)), None))
    assert set(kept()) == {str(s) for s in (STEP, SEQUENCE, STEP._replace(dtype="bfloat16"))}


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


@needs_standin
def test_a_wrong_kernel_is_not_taken_and_one_warning_says_so(monkeypatch):
    install(monkeypatch, *BROKEN)
    q, k, v = token()
    want, _ = mlx_hla.linear_attention_step(q, k, v, None, backend="mlx")
    match = r"kernels of first for a step in float32, heads up to 64, are not used .*: first step differs"
    with pytest.warns(RuntimeWarning, match=match) as caught:
        o, _ = mlx_hla.linear_attention_step(q, k, v, None)
    again, names = launched(lambda: mlx_hla.linear_attention_step(q, k, v, None)[0])
    assert len(caught) == 1
    assert "mlx-hla selftest" in str(caught[0].message)
    assert names == []
    assert_close("o", o, want, 0)
    assert_close("again", again, want, 0)
    # Who asks for the kernel gets the kernel.
    _, names = launched(lambda: mlx_hla.linear_attention_step(q, k, v, None, backend="metal"))
    assert names == ["hla_linear_step"]
    forget(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said once
        assert launched(lambda: mlx_hla.linear_attention_step(q, k, v, None))[1] == []


@needs_standin
@pytest.mark.parametrize("sound", [True, False], ids=["sound", "broken"])
def test_on_cuda_too(monkeypatch, sound):
    def make(**options):
        assert BROKEN[0] in options["header"]
        header = options["header"] if sound else options["header"].replace(*BROKEN)
        return cuda.cuda_kernel(**options | {"header": header})

    cuda.install(monkeypatch, make)
    monkeypatch.setenv("MLX_HLA_BACKEND", "cuda")
    cuda.launched.clear()
    q, k, v = token()
    want, _ = mlx_hla.linear_attention_step(q, k, v, None, backend="mlx")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        o, _ = mlx_hla.linear_attention_step(q, k, v, None)
    assert_close("o", o, want, 1e-6)
    assert kept()[str(STEP)]["trusted"] is sound
    assert cuda.launched == ["hla_linear_step"] * (2 if sound else 1)
    assert len(caught) == (not sound)
    if caught:
        assert "mlx-hla's CUDA kernels of first for a step in float32" in str(caught[0].message)


@needs_standin
def test_a_kernel_that_does_not_compile_is_not_taken(monkeypatch):
    install(monkeypatch, "FUNC Place place_of", "FUNC Nothing place_of")
    q, k, v = token()
    with pytest.warns(RuntimeWarning, match="first step does not run \\(MetalCompileError: "):
        o, _ = mlx_hla.linear_attention_step(q, k, v, None)
    assert_close("o", o, mlx_hla.linear_attention_step(q, k, v, None, backend="mlx")[0], 0)
    with pytest.raises(metal.MetalCompileError):
        mx.eval(mlx_hla.linear_attention_step(q, k, v, None, backend="metal"))


@needs_standin
def test_a_slow_kernel_is_not_taken(monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(proof, "times", lambda case, repeats: SLOW)
    with pytest.warns(RuntimeWarning, match=r"they are slower \(6 ms, the ops 2\)"):
        verdict = proof.verdict_of(SEQUENCE)
    assert not verdict.trusted
    assert kept()[str(SEQUENCE)]["kernel_ms"] == 6


@needs_standin
@pytest.mark.parametrize("family", choices())
def test_every_operator_has_something_to_prove(monkeypatch, family):
    install(monkeypatch)
    for kind in ("sequence", "step"):
        assert proof.prove(Subject(family, kind, "float32", 64)).trusted


ORIGINAL = proof.cases_of


def test_the_real_cases_are_awkward():
    for subject in proof.subjects():
        for case in (*ORIGINAL(subject), *proof.timed(subject)):
            s = case.shape
            q, k, v = (mx.zeros((s.B, s.T, *x)) for x in ((s.Hq, s.D), (s.Hkv, s.D), (s.Hkv, s.DV)))
            assert kernels.why_not(q, k, v) is None
        assert {c.shape.Hq > c.shape.Hkv for c in ORIGINAL(subject)} == {True, False}
        assert any(c.shape.D % 16 for c in ORIGINAL(subject))


def test_what_nobody_can_keep_lasts_as_long_as_the_process(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file in the place of the folder")
    monkeypatch.setattr(proof, "prove", counted := Counted(lambda subject: Verdict(True)))
    for _ in range(2):
        assert proof.verdict_of(SEQUENCE).trusted
    assert counted.calls == 1
    forget(monkeypatch)
    proof.verdict_of(SEQUENCE)
    assert counted.calls == 2


CRASH = """
import os
from mlx_hla.ops import proof
proof.compare = lambda case: os._exit(9)
proof.verdict_of(proof.Subject("first", "sequence", "float32", 64))
"""


def test_a_crash_is_remembered_and_not_tried_again(monkeypatch):
    died = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    monkeypatch.setattr(proof, "prove", counted := Counted(lambda subject: Verdict(True)))
    for said in (True, False):  # by the first process after it alone
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            verdict = proof.verdict_of(SEQUENCE)
        assert not verdict.trusted
        assert verdict.why == "the process that tried them first did not live to tell"
        assert len(caught) == said
        forget(monkeypatch)
    assert counted.calls == 0
    # But a process that lives and is trying is no crash, and the user may try again.
    forget(monkeypatch)
    verdicts.keep(proof.machine(), {str(SEQUENCE): Verdict(False, "it was being tried", pid=os.getppid())})
    assert proof.verdict_of(SEQUENCE).trusted
    verdicts.keep(proof.machine(), {str(STEP): Verdict(False, "it was being tried", pid=2**22 + 1)})
    assert proof.verdict_of(STEP, renew=True).trusted


def test_an_interrupted_proof_leaves_no_word(monkeypatch):
    def interrupted(subject):
        assert kept()[str(subject)]["pid"] == os.getpid()
        raise KeyboardInterrupt

    monkeypatch.setattr(proof, "prove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        proof.verdict_of(SEQUENCE)
    assert kept() == {}
    monkeypatch.setattr(proof, "prove", lambda subject: Verdict(True))
    assert proof.verdict_of(SEQUENCE).trusted


def test_a_proof_within_a_transformation(monkeypatch):
    """The first call may be a traced one: what is tried does not depend on what is traced."""

    def prove(subject):
        x = mx.ones((4, 4))
        _, (g,) = mx.vjp(lambda x: (x @ x).sum(), [x], [mx.array(1.0)])
        return Verdict(g[0, 0].item() == 8)

    monkeypatch.setattr(proof, "prove", prove)

    def f(x):
        return x.sum() * proof.verdict_of(SEQUENCE, renew=True).trusted

    x = mx.ones((3, 2))
    for transformed in (mx.grad(f), mx.compile(mx.grad(f)), mx.vmap(f), mx.grad(mx.checkpoint(f))):
        assert transformed(x).sum().item() == 6


DAMAGE = {
    "garbage": b"\xff{",
    "list": b"[]",
    "version": json.dumps({"version": 9, "machines": {}}).encode(),
    "machines": b'{"version": 1, "machines": {"x": 3}}',
    "large": b" " * (verdicts.MAX_BYTES + 1),
}


@pytest.mark.parametrize("data", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_as_if_it_were_not_there(monkeypatch, data):
    path = verdicts.cache_file()
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    assert verdicts.read("x") == {}
    assert verdicts.keep("x", {"a": Verdict(True)})
    assert verdicts.read("x") == {"a": Verdict(True)}


def test_a_verdict_that_makes_no_sense_is_none():
    good = Verdict(False, "slow", 1e-6, 1e-5, 2.0, 1.0, 0.5)._asdict()
    bad = [{**good, "trusted": 1}, {**good, "why": None}, {**good, "error": "x"}, {**good, "pid": 1.5}]
    bad += [{**good, "more": 1}, {k: v for k, v in good.items() if k != "pid"}, 3]
    entries = {str(i): entry for i, entry in enumerate(bad)} | {"good": good}
    path = verdicts.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"version": 1, "machines": {"x": entries}}))
    assert set(verdicts.read("x")) == {"good"}


def test_machines_do_not_share_and_the_last_ones_stay(monkeypatch):
    for i in range(verdicts.MAX_MACHINES + 2):
        assert verdicts.keep(f"m{i}", {"a": Verdict(True)})
    assert verdicts.read("m1") == {}
    assert verdicts.read("m2") == {"a": Verdict(True)}
    monkeypatch.setattr(proof, "machine", lambda: "another")
    monkeypatch.setattr(proof, "prove", counted := Counted(lambda subject: Verdict(True)))
    proof.verdict_of(SEQUENCE)
    assert counted.calls == 1


def test_where_the_file_is(monkeypatch, tmp_path):
    assert verdicts.cache_file() == tmp_path / "cache" / "kernels.json"
    monkeypatch.delenv("MLX_HLA_CACHE")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert verdicts.cache_file() == tmp_path / "Library" / "Caches" / "mlx-hla" / "kernels.json"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert verdicts.cache_file() == tmp_path / "xdg" / "mlx-hla" / "kernels.json"


def test_the_environment_decides(monkeypatch):
    monkeypatch.setenv("MLX_HLA_PROOF", "0")
    assert not proof.asked_for()
    monkeypatch.setenv("MLX_HLA_PROOF", "")
    assert proof.asked_for()
    monkeypatch.setenv("MLX_HLA_PROOF", "yes")
    with pytest.raises(InputError, match="MLX_HLA_PROOF must be 0, 1 or unset, got 'yes'"):
        proof.asked_for()


def test_what_a_call_is_about():
    from mlx_hla.ops.checks import canonical, canonical_step

    q, v = mx.zeros((1, 3, 2, 72), mx.float16), mx.zeros((1, 3, 2, 8), mx.float16)
    call = canonical("hla2", q, q, v, find("hla2").options)
    assert proof.subject_of(find("hla2"), call) == Subject("hla2", "sequence", "float16", 128)
    one = canonical_step("hla2_step", q[:, 0, :, :64], q[:, 0, :, :64], v[:, 0], find("hla2").options)
    assert proof.subject_of(find("hla2"), one) == Subject("hla2", "step", "float16", 64)
    assert {s.family for s in proof.subjects()} == set(choices())


@needs_standin
def test_selftest_renews_and_shows_verdicts(monkeypatch, capsys):
    import argparse

    install(monkeypatch, *BROKEN)
    verdicts.keep(proof.machine(), {str(STEP): Verdict(True)})
    args = argparse.Namespace(family=["first"], dtype=["float32"], repeats=1, json=False)
    case = Case("first", "forward", "float32", Shape(1, 20, 2, 1, 16, 8))
    assert selftest.run(args, [case], [SEQUENCE, STEP, STEP._replace(dtype="bfloat16")]) == 0
    *_, title, sequence, step = capsys.readouterr().out.splitlines()
    assert title == f"What backend=None takes here from now on ({verdicts.cache_file()}):"
    assert sequence == "first sequence float32 D64: taken, 2 ms where the ops need 6"
    assert step.startswith(
        "first step float32 D64: not taken, first step differs on B2-T1-H2x1-D16x8 (o: error"
    )
    assert kept()[str(STEP)]["trusted"] is False

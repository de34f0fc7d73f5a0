"""The operators' records: complete, and all that it takes to add an operator."""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_hla
from mlx_hla import ops, reference
from mlx_hla.ops.arguments import SharedOptions, StepOptions
from mlx_hla.ops.operator import OPERATORS, choices, find
from mlx_hla.ops.order import of_order

RECORDS = [*OPERATORS.values(), of_order(4), of_order(7)]
PACKAGE = Path(mlx_hla.__file__).parent
each_record = pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.key)


@each_record
def test_a_record_has_its_functions_and_its_reference(record):
    for name in (record.name, f"{record.name}_step"):
        assert name in mlx_hla.__all__
        assert inspect.getdoc(getattr(mlx_hla, name))
    for kind in ("serial", "dense", "vjp"):
        assert hasattr(reference, f"{kind}_{record.name}")
    state = record.state
    assert getattr(mlx_hla, state.__name__) is state
    assert getattr(reference, state.__name__)._fields == state._fields
    fields = {name for slot in record.slots for name in (slot.name, slot.normaliser) if name}
    assert fields <= set(state._fields)
    assert len({slot.key for slot in record.slots}) == len(record.slots)


def test_labels_and_keys():
    assert [find(name).label for name in choices()] == list(choices())
    assert all(key == record.key for key, record in OPERATORS.items())
    assert find("first") is of_order(1)
    for name in ("linear_attention", "hla2-unmasked", "hla", ""):
        with pytest.raises(
            ValueError, match=r"operator must be one of first, .* or an order from 1 to 16, got"
        ):
            find(name)


@each_record
def test_every_shared_argument_is_typed_and_shown(record):
    """What a type checker reads, what `help` shows and what the checks take are one list."""
    if record.name == "hla":
        pytest.skip("takes the arguments of the operator of its order")
    for name, kind in ((record.name, SharedOptions), (f"{record.name}_step", StepOptions)):
        parameters = inspect.signature(getattr(mlx_hla, name)).parameters
        keywords = {n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
        own = {o.name for o in record.options} | {"masked", "convention", "initial_state"}
        assert keywords - own == set(kind.__annotations__)


def test_type_checkers_see_every_operator():
    text = (PACKAGE / "ops" / "__init__.py").read_text(encoding="utf-8")
    seen = set(re.findall(r"from \.(\w+) import \*", text))
    files = {
        p.stem for p in (PACKAGE / "ops").glob("*.py") if "\n__all__ = [" in p.read_text(encoding="utf-8")
    }
    assert seen == files - {"__init__"}


@pytest.mark.parametrize("name", ["mixed", "readout"])
def test_options_per_token_are_checked(name):
    B, T, Hq, Hkv, D = 2, 5, 4, 2, 8
    q, k, v = (mx.ones((B, T, h, D)) for h in (Hq, Hkv, Hkv))
    f, step = getattr(mlx_hla, name), getattr(mlx_hla, f"{name}_step")
    token = [x[:, 0] for x in (q, k, v)]
    for option in ("alpha", "beta"):
        number = rf"\[{name}\] {option} must be a finite number, got "
        for bad in (float("nan"), float("inf"), "1", True, [1.0]):
            with pytest.raises(ValueError, match=number):
                f(q, k, v, **{option: bad})
        shape = rf"\[{name}\] {option} must be a number, \[4\] or \[2, 5, 4\], got "
        for bad in (mx.ones((Hkv,)), mx.ones((B, T)), mx.ones((B, T, Hkv)), mx.ones((T, Hq)), mx.array(1.0)):
            with pytest.raises(ValueError, match=shape):
                f(q, k, v, **{option: bad})
        with pytest.raises(ValueError, match=rf"{option} must be float16, bfloat16 or float32"):
            f(q, k, v, **{option: mx.ones((Hq,), mx.int32)})
        with pytest.raises(
            ValueError, match=rf"\[{name}_step\] {option} must be a number, \[4\] or \[2, 4\], got "
        ):
            step(*token, None, **{option: mx.ones((B, T, Hq))})
        for fine in (-2.5, 0, mx.ones((Hq,)), mx.ones((B, Hq), mx.bfloat16)):
            step(*token, None, **{option: fine})


NEW = '''
"""Read twice as much."""
from typing import NamedTuple
from .backend import sequence, step
from .operator import Operator, Slot, register

__all__ = ["DoubleState", "double", "double_step"]


class DoubleState(NamedTuple):
    P: object
    m: object = None


def _compose(p):
    return 2 * p.la("P", p.q, p.k, p.v, last=True)


DOUBLE = register(
    Operator("double", 1, DoubleState, (Slot("P", normaliser="m"),), _compose, degree=1)
)


def double(q, k, v, *, initial_state=None, **shared):
    return sequence(DOUBLE, q, k, v, initial_state, **shared)


def double_step(q, k, v, state, **shared):
    return step(DOUBLE, q, k, v, state, **shared)
'''
USE = """
import mlx.core as mx, mlx_hla
from mlx_hla.models import LanguageModel, ModelConfig
from mlx_hla.nn import HLAttention
from mlx_hla.selftest import all_cases

q, k, v = (mx.random.normal((1, 9, h, 8)) for h in (2, 1, 1))
o, state = mlx_hla.double(q, k, v)
assert mx.allclose(o, 2 * mlx_hla.linear_attention(q, k, v)[0])
o, state = mlx_hla.double_step(q[:, 0], k[:, 0], v[:, 0], None, decay=0.9, normalize=True)
assert type(state) is mlx_hla.DoubleState and state.m.shape == (1, 1, 8)
layer = HLAttention(16, 2, operator="double")
cache = layer.make_cache()
x = mx.random.normal((1, 6, 16))
y = mx.concatenate([layer(x[:, t : t + 1], cache=cache) for t in range(6)], axis=1)
assert mx.allclose(y, layer(x), atol=1e-4)
config = ModelConfig(vocab_size=20, dims=16, num_layers=1, num_heads=2, hidden_dims=16, operator="double")
assert LanguageModel(config)(mx.array([[1, 2]])).shape == (1, 2, 20)
assert any(c.family == "double" for c in all_cases())
"""


def test_a_new_operator_is_one_file(tmp_path):
    """Dropped into ops/ of a copy of the package, it is everywhere: functions, layer, model, self-test."""
    shutil.copytree(PACKAGE, tmp_path / "mlx_hla", ignore=shutil.ignore_patterns("pretrained", "__pycache__"))
    (tmp_path / "mlx_hla" / "ops" / "double.py").write_text(NEW, encoding="utf-8")
    run = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not hasattr(ops, "double")

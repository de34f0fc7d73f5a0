"""Bad input: a ValueError that names the operator, what it expected, and what came."""

import re

import mlx.core as mx
import numpy as np
import pytest
from ops_reference import OPERATORS, Case, Problem, each_operator, function, leaves, mlx_state

import mlx_hla
from mlx_hla import kernels
from mlx_hla.ops.checks import decay_array

B, T, HQ, HKV, D, V = 2, 8, 4, 2, 6, 5
Q, K, VALUE = mx.zeros((B, T, HQ, D)), mx.zeros((B, T, HKV, D)), mx.zeros((B, T, HKV, V))
RIGHT = {"q": Q, "k": K, "v": VALUE}

CALLS = {
    # changes to a right call, then the message after "[hla2] "
    "q-list": ({"q": [1.0]}, "q must be an mlx array, got list"),
    "k-numpy": ({"k": np.zeros((2, 8, 2, 6))}, "k must be an mlx array, got ndarray"),
    "v-int": (
        {"v": VALUE.astype(mx.int32)},
        "v must be float16, bfloat16 or float32, got mlx.core.int32",
    ),
    "q-rank3": ({"q": Q[0]}, "q must be [B, T, heads, dim], got (8, 4, 6)"),
    "v-rank5": ({"v": VALUE[None]}, "v must be [B, T, heads, dim], got (1, 2, 8, 2, 5)"),
    "no-tokens": (
        {"q": Q[:, :0], "k": K[:, :0], "v": VALUE[:, :0]},
        "q must not be empty, got (2, 0, 4, 6)",
    ),
    "no-values": ({"v": VALUE[..., :0]}, "v must not be empty, got (2, 8, 2, 0)"),
    "mixed-dtypes": (
        {"k": K.astype(mx.float16)},
        "q, k and v must have one dtype, got ['mlx.core.float32', 'mlx.core.float16', 'mlx.core.float32']",
    ),
    "k-heads": (
        {"k": mx.zeros((B, T, 3, D))},
        "k must be [2, 8, Hkv, 6] with Hkv dividing 4, like q (2, 8, 4, 6), got (2, 8, 3, 6)",
    ),
    "k-dim": (
        {"k": K[..., :5]},
        "k must be [2, 8, Hkv, 6] with Hkv dividing 4, like q (2, 8, 4, 6), got (2, 8, 2, 5)",
    ),
    "k-batch-of-one": (
        {"k": K[:1]},
        "k must be [2, 8, Hkv, 6] with Hkv dividing 4, like q (2, 8, 4, 6), got (1, 8, 2, 6)",
    ),
    "v-length": ({"v": VALUE[:, 1:]}, "v must be [2, 8, 2, Dv], like k (2, 8, 2, 6), got (2, 7, 2, 5)"),
    "v-heads": ({"v": VALUE[:, :, :1]}, "v must be [2, 8, 2, Dv], like k (2, 8, 2, 6), got (2, 8, 1, 5)"),
    "scale-0": ({"scale": 0}, "scale must not be 0, got 0"),
    "scale-nan": ({"scale": float("nan")}, "scale must be a finite number, got nan"),
    "scale-bool": ({"scale": True}, "scale must be a finite number, got True"),
    "scale-array": ({"scale": mx.array(1.0)}, "scale must be a finite number, got array(1"),
    "eps-negative": ({"eps": -1e-3, "normalize": True}, "eps must be a finite number ≥ 0, got -0.001"),
    "decay-above-1": ({"decay": 1.01}, "decay must be None, a number in [0, 1] or an array, got 1.01"),
    "decay-negative": ({"decay": -0.1}, "decay must be None, a number in [0, 1] or an array, got -0.1"),
    "decay-nan": ({"decay": float("nan")}, "decay must be None, a number in [0, 1] or an array, got nan"),
    "decay-bool": ({"decay": True}, "decay must be None, a number in [0, 1] or an array, got True"),
    "decay-list": ({"decay": [0.9]}, "decay must be None, a number in [0, 1] or an array, got [0.9]"),
    "decay-int": (
        {"decay": mx.ones((2,), mx.int32)},
        "decay must be float16, bfloat16 or float32, got mlx.core.int32",
    ),
    "decay-query-heads": (
        {"decay": mx.ones((4,))},
        "decay must be a number, [2] or [2, 8, 2], got (4,)",
    ),
    "decay-no-batch": ({"decay": mx.ones((8, 2))}, "decay must be a number, [2] or [2, 8, 2], got (8, 2)"),
    "mask-shape": (
        {"mask": mx.ones((8,), mx.bool_)},
        "mask must be an mlx array [2, 8], got (8,)",
    ),
    "mask-numpy": ({"mask": np.ones((2, 8), bool)}, "mask must be an mlx array [2, 8], got ndarray"),
    "mask-float": (
        {"mask": mx.ones((2, 8))},
        "mask must be boolean, True for a real token, got mlx.core.float32",
    ),
    "segments-shape": (
        {"segment_ids": mx.zeros((2, 7), mx.int32)},
        "segment_ids must be an mlx array [2, 8], got (2, 7)",
    ),
    "segments-float": (
        {"segment_ids": mx.zeros((2, 8))},
        "segment_ids must be integers, got mlx.core.float32",
    ),
    "scale-huge": ({"scale": 10**400}, "scale must be a finite number, got 1000"),
    "normalize-string": ({"normalize": "false"}, "normalize must be True or False, got 'false'"),
    "backend": ({"backend": "rocm"}, "backend must be None, 'mlx', 'metal' or 'cuda', got 'rocm'"),
    "backend-array": (
        {"backend": mx.array(1)},
        "backend must be None, 'mlx', 'metal' or 'cuda', got array(1",
    ),
    "state-numpy": (
        {"initial_state": mlx_hla.HLA2State(np.zeros((2, 2, 6, 6)), VALUE)},
        "state.S must be float32 [2, 2, 6, 6], got array([[[[0., 0., 0., 0., 0., 0.], [0.",
    ),
}


def refuses(name, message, call):
    with pytest.raises(ValueError, match=re.escape(f"[{name}] {message}")):
        call()


@pytest.mark.parametrize("case", CALLS)
def test_calls(case):
    change, message = CALLS[case]
    refuses("hla2", message, lambda: mlx_hla.hla2(**RIGHT | change))


@pytest.mark.parametrize("case", ["k-heads", "decay-above-1", "mask-float", "backend", "no-tokens"])
@each_operator
def test_every_operator_names_itself(op, case):
    change, message = CALLS[case]
    given = RIGHT | change
    qkv = [given.pop(name) for name in "qkv"]
    refuses(OPERATORS[op].name, message, lambda: function(op)(*qkv, **given))


@pytest.mark.parametrize("name", ["sclae", "own", "operator", "state"])
@pytest.mark.parametrize("step", [False, True], ids=["sequence", "step"])
@each_operator
def test_an_unknown_option_is_refused_by_the_function_that_was_called(op, step, name):
    given = [x[:, 0] for x in RIGHT.values()] + [None] if step else list(RIGHT.values())
    who = OPERATORS[op].name + ("_step" if step else "")
    want = re.escape(f"[{who}] has no option {name!r}; it takes ") + ".*scale, decay, normalize, eps.*backend"
    if step and name == "state":
        name, want = "mask", re.escape(f"[{who}] has no option 'mask'; it takes ")
    with pytest.raises(TypeError, match=want):
        function(op, step=step)(*given, **{name: 1.0})


STEPS = {
    "a-time-axis": ({"q": Q, "k": K, "v": VALUE}, "q must be [B, heads, dim], got (2, 8, 4, 6)"),
    "heads": (
        {"k": mx.zeros((B, 3, D))},
        "k must be [2, Hkv, 6] with Hkv dividing 4, like q (2, 4, 6), got (2, 3, 6)",
    ),
    "values": ({"v": VALUE[:1, 0]}, "v must be [2, 2, Dv], like k (2, 2, 6), got (1, 2, 5)"),
    "decay": ({"decay": mx.ones((2, 8, 2))}, "decay must be a number, [2] or [2, 2], got (2, 8, 2)"),
    "scale": ({"scale": float("inf")}, "scale must be a finite number, got inf"),
    "backend": ({"backend": "gpu"}, "backend must be None, 'mlx', 'metal' or 'cuda', got 'gpu'"),
}


@pytest.mark.parametrize("case", STEPS)
@each_operator
def test_steps(op, case):
    change, message = STEPS[case]
    given = {"q": Q[:, 0], "k": K[:, 0], "v": VALUE[:, 0]} | change

    def call():
        return function(op, step=True)(given.pop("q"), given.pop("k"), given.pop("v"), None, **given)

    refuses(OPERATORS[op].name + "_step", message, call)


@pytest.mark.parametrize("step", [False, True], ids=["sequence", "step"])
@each_operator
def test_states(op, step):
    """A state of another operator, batch, dtype or use is not taken."""
    name = OPERATORS[op].name + ("_step" if step else "")
    given = [x[:, 0] for x in RIGHT.values()] if step else list(RIGHT.values())
    plain, ratio = (Problem(op, Case(T=1, B=B, Hq=HQ, Hkv=HKV, D=D, V=V, normalize=n)) for n in (0, 1))
    arrays = {n: mx.zeros(x.shape) for n, x in leaves(plain.shape).items()}
    more = {n: mx.zeros(x.shape) for n, x in leaves(ratio.shape).items()}

    def call(state, normalize=False):
        if step:
            return function(op, step=True)(*given, state, normalize=normalize)
        return function(op)(*given, normalize=normalize, initial_state=state)

    call(mlx_state(plain.shape, arrays.values()))
    call(mlx_state(ratio.shape, more.values()), normalize=True)
    kind = type(plain.shape).__name__
    other = mlx_hla.LinearState if kind != "LinearState" else mlx_hla.AHLAState
    wrong = {
        "a tuple": tuple(arrays.values()),
        "another kind": other(*([Q] * 2)),
    }
    for state in wrong.values():
        with pytest.raises(
            ValueError, match=rf"\[{name}\] the state must be an? {kind}.*, got {type(state).__name__}"
        ):
            call(state)
    for field, x in arrays.items():
        half, batch = arrays | {field: x.astype(mx.float16)}, arrays | {field: x[:1]}
        for bad, got in ((half, f"mlx.core.float16 {x.shape}"), (batch, f"mlx.core.float32 {x[:1].shape}")):
            # a member of a tuple goes by the name of its tuple
            message = rf"state.{field.rstrip('01')}\d? must be float32 {re.escape(str(list(x.shape)))}"
            with pytest.raises(ValueError, match=message + re.escape(f", got {got}")):
                call(mlx_state(plain.shape, bad.values()))
    with pytest.raises(
        ValueError, match=rf"\[{name}\] state\.\w+ must be None: it belongs to normalize=True"
    ):
        call(mlx_state(ratio.shape, more.values()))
    with pytest.raises(ValueError, match=rf"\[{name}\] state\.\w+ must be .*, got None"):
        call(mlx_state(plain.shape, arrays.values()), normalize=True)


def test_the_state_of_another_order():
    _, state = mlx_hla.hla(Q, K, VALUE, order=6)
    want = "the state must be an HLAState with a tuple of 2 F"
    refuses("hla", f"{want}, got 3 F", lambda: mlx_hla.hla(Q, K, VALUE, order=4, initial_state=state))
    _, state = mlx_hla.hla(Q, K, VALUE, order=4)
    refuses("hla", "state.P must be float32", lambda: mlx_hla.hla(Q, K, VALUE, order=5, initial_state=state))
    bare = state._replace(F=None)
    refuses("hla", want, lambda: mlx_hla.hla(Q, K, VALUE, order=4, initial_state=bare))


@pytest.mark.parametrize("order", [0, -1, 17, 2.0, True, None, "2"], ids=repr)
def test_orders(order):
    message = f"order must be an integer from 1 to 16, got {order!r}"
    refuses("hla", message, lambda: mlx_hla.hla(Q, K, VALUE, order=order))
    step = [x[:, 0] for x in (Q, K, VALUE)]
    refuses("hla_step", message, lambda: mlx_hla.hla_step(*step, None, order=order))


def test_options_of_one_operator():
    refuses("hla2", "ridge must be a finite number ≥ 0, got -1", lambda: mlx_hla.hla2(Q, K, VALUE, ridge=-1))
    refuses(
        "hla3",
        "convention must be 'exact' or 'paper', got 'exakt'",
        lambda: mlx_hla.hla3(Q, K, VALUE, convention="exakt"),
    )
    message = "masked must be left out: it is an argument of orders 2 and 3, got order 4"
    refuses("hla", message, lambda: mlx_hla.hla(Q, K, VALUE, order=4, masked=False))
    message = "convention 'paper' is Algorithm 3, which needs masked=True, got masked=False"
    refuses("hla3", message, lambda: mlx_hla.hla3(Q, K, VALUE, masked=False, convention="paper"))
    message = "masked must be True or False, got 'false'"
    refuses("hla2", message, lambda: mlx_hla.hla2(Q, K, VALUE, masked="false"))
    refuses("hla3", message, lambda: mlx_hla.hla3(Q, K, VALUE, masked="false"))


@pytest.mark.parametrize("device", kernels.GPUS, ids=lambda device: device.name)
def test_a_gpu_is_never_a_silent_choice(device):
    if kernels.gpu.here() is device:
        pytest.skip(f"{device.chip} serves the call")
    with pytest.raises(
        ValueError, match=rf"\[hla2\] backend '{device.name}' cannot serve .*is not {device.chip}"
    ):
        mlx_hla.hla2(Q, K, VALUE, backend=device.name)


def test_decays_of_any_float_dtype_become_float32():
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        g = decay_array("op", mx.array([0.5, 0.25], dtype), (3,), 2)
        assert (g.dtype, g.shape) == (mx.float32, (3, 2))

"""How a process that `mlx.launch` started joins the others, and makes sure that they are alike."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from mlx_hla import __version__
from mlx_hla.errors import InputError
from mlx_hla.patience import PATIENCE, VARIABLE, seconds_of
from mlx_hla.ranks import agree

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # one of them is set where ranks are started


def join(what: str) -> mx.distributed.Group | None:
    """The group that this process was started to be part of, or None where it is alone.

    The ranks then know that they run the same versions, and the clock of `patience` is there.
    """
    if not any(name in os.environ for name in LAUNCHED) or _is_lone():
        return None
    PATIENCE.start(seconds_of(os.environ.get(VARIABLE)))
    rank = next(os.environ[name] for name in LAUNCHED if name in os.environ)
    PATIENCE.expect(
        f"rank {ascii(rank)[1:-1][:9]}: the other ranks have not all come within {PATIENCE.seconds:g} s; "
        f"{VARIABLE} sets how long to wait"
    )
    try:
        with _ended_by_ctrl_c():
            group = mx.distributed.init(strict=True)
    except RuntimeError as e:
        raise InputError(f"rank {ascii(rank)[1:-1][:9]} cannot join the others: {e}") from None
    PATIENCE.expect("")
    if group.size() == 1:
        return None
    _greet(group, what)
    return group


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """MLX waits for all to come with Python's lock held, so that no handler of Python's would be heard."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _greet(group: mx.distributed.Group, what: str) -> None:
    """The first exchange of all. Its form is that of every version, or ranks of two would not understand."""
    about = {"the version of mlx-hla": __version__, "the version of MLX": version("mlx"), "the command": what}
    agree(group, "the first exchange", about)


def _is_lone() -> bool:
    """Whether `mlx.launch -n 1` has started it, which names no hosts."""
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts is None or "MLX_WORLD_SIZE" in os.environ or "MLX_IBV_DEVICES" in os.environ:
        return False
    with contextlib.suppress(OSError):
        return os.environ.get("MLX_RANK") == "0" and not Path(hosts).read_bytes()[:64].strip()
    return False

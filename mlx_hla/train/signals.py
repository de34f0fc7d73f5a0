"""Ctrl-C, termination and hang-up: heard at once, answered between two passes: no step is cut in two.

A rank on another machine hears a Ctrl-C of `mlx.launch` as the hang-up of its terminal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator


class Stopped(Exception):
    """Work that was left off because a signal came."""


class Stop:
    """Whether a signal came, and what the run is busy with, for the answer to it."""

    def __init__(self) -> None:
        self.busy_with = "the first step"
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def __bool__(self) -> bool:
        return self._event.is_set()


@contextlib.contextmanager
def stop_on_signals(say: Callable[[str], None]) -> Iterator[Stop]:
    """A `Stop` that Ctrl-C, termination and hang-up set; a second of the first two ends the process at once.

    Python runs its handlers between two steps of the main thread, which may spend minutes inside one call of
    MLX. So the signal is also written to a pipe, and a thread that waits there answers.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    terminals = _terminals()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        came = 0
        while number := os.read(reader, 1):
            if number[0] not in watched:
                continue
            if number[0] == signal.SIGHUP:
                _forget(terminals)
                stop.set()
                continue
            came += 1
            if came > 1:
                os._exit(128 + number[0])  # what is on the disk is whole at any moment
            stop.set()
            say(f"stopping after {stop.busy_with}, which is under way; once more ends at once")

    # What is ignored (by nohup, or behind a script's back) stays so; None is not Python's to restore.
    all_three = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    watched = [s for s in all_three if signal.getsignal(s) not in (signal.SIG_IGN, None)]

    def handle(number: int, _: object) -> None:
        if number == signal.SIGHUP:
            _forget(terminals)  # the thread may come too late for what is said next
        stop.set()

    before = {s: signal.signal(s, handle) for s in watched}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for s, old in before.items():
            if signal.getsignal(s) is not signal.SIG_IGN:  # which `patience` has set since
                signal.signal(s, old)
        os.close(writer)  # the listener reads the end of the pipe, and ends
        thread.join()
        os.close(reader)


def _terminals() -> list[int]:
    """The files of stdout and stderr, as far as they are terminals."""
    found = []
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or no file
            found += [stream.fileno()] if stream.isatty() else []
    return found


def _forget(terminals: list[int]) -> None:
    """Whoever writes to a terminal that has gone fails; the run is to be saved first."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in terminals:
        os.dup2(null, number)
    os.close(null)

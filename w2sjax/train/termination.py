"""SIGTERM or Ctrl-C during a run: noted at once, acted upon between two updates."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

_interrupted = False  # whether Ctrl-C came inside `remembered_interrupts`


@contextlib.contextmanager
def remembered_interrupts() -> Iterator[None]:
    """Inside, `raise_lost_interrupt` raises any Ctrl-C that did not get through.

    Python raises KeyboardInterrupt wherever the main thread happens to be. In a finalizer, in a
    callback of the garbage collector (JAX has one) or below C++ that clears errors it is lost, and
    a job that was told to stop would run for hours more. Where Python allows no handler (another
    thread) or SIGINT is ignored or not Python's, nothing changes.
    """
    global _interrupted
    previous = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not callable(previous):
        yield
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        global _interrupted
        _interrupted = True
        previous(signum, frame)

    _interrupted = False
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        _interrupted = False


def raise_lost_interrupt() -> None:
    """Call between two pieces of work inside `remembered_interrupts`.

    Raises:
      KeyboardInterrupt: one came before and was lost.
    """
    global _interrupted
    if _interrupted and threading.current_thread() is threading.main_thread():
        _interrupted = False
        raise KeyboardInterrupt


class TrainingInterrupted(Exception):
    """A signal stopped a run; its state was saved, and the same call goes on from there."""

    def __init__(self, step: int, total_steps: int, directory: str | os.PathLike[str], signum: int):
        name = signal.Signals(signum).name
        super().__init__(
            f"{name} stopped training after update {step} of {total_steps}; the state is in "
            f"{directory}, and the same run, started again, goes on from it."
        )
        self.signum = signum
        self.step = step  # updates made and saved
        self.total_steps = total_steps


class Termination:
    """Whether the process was asked to end; use as a context manager around the updates.

    A single process notes SIGTERM and SIGINT with a handler of its own, in the main thread alone
    (Python allows no other) and only inside the context; the previous handlers are back afterwards,
    that of SIGINT as soon as one was noted, so that a second Ctrl-C ends at once.
    With several processes the handler of `jax.distributed` notes SIGTERM, and all of them learn at
    the same step that one of them got it.
    """

    def __init__(self, *, active: bool):
        self.noted: int | None = None  # the signal
        self._active = active
        self._several = jax.process_count() > 1
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Termination:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if self._active and not self._several and in_main_thread:
            for signum in (signal.SIGTERM, signal.SIGINT):
                previous = signal.getsignal(signum)
                # None: a handler that Python did not install, and so cannot put back. An ignored
                # SIGINT (of a job in the background) stays ignored.
                if previous not in (None, signal.SIG_IGN):
                    self._previous[signum] = previous
                    signal.signal(signum, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def after(self, step: int) -> bool:
        """Whether to stop after this update; with several processes all get the same answer."""
        if (
            self._active
            and self._several
            and self.noted is None
            and multihost_utils.reached_preemption_sync_point(step)
        ):
            self.noted = signal.SIGTERM
        return self.noted is not None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.noted = signum
        if signum == signal.SIGINT:  # a second one is for whoever handled it before
            signal.signal(signum, self._previous.pop(signum))

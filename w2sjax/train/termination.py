"""SIGTERM during a run: noted at once, acted upon between two updates."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class TrainingInterrupted(Exception):
    """SIGTERM stopped a run; its state was saved, and the same call goes on from there."""

    def __init__(self, step: int, total_steps: int, directory: str | os.PathLike[str]):
        super().__init__(
            f"SIGTERM stopped training after update {step} of {total_steps}; the state is in "
            f"{directory}, and the same run, started again, goes on from it."
        )
        self.step = step  # updates made and saved
        self.total_steps = total_steps


class Termination:
    """Whether the process was asked to end; use as a context manager around the updates.

    A single process notes SIGTERM with a handler of its own, in the main thread alone (Python
    allows no other) and only inside the context; the previous handler is back afterwards. With
    several processes the handler of `jax.distributed` notes it, and all of them learn at the same
    step that one of them got it.
    """

    def __init__(self, *, active: bool):
        self.noted = False
        self._active = active
        self._several = jax.process_count() > 1
        self._previous = None

    def __enter__(self) -> Termination:
        in_main_thread = threading.current_thread() is threading.main_thread()
        # None: a handler that Python did not install, and so cannot put back.
        if self._active and not self._several and in_main_thread:
            self._previous = signal.getsignal(signal.SIGTERM)
            if self._previous is not None:
                signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def after(self, step: int) -> bool:
        """Whether to stop after this update; with several processes all get the same answer."""
        if self._active and self._several:
            self.noted = self.noted or multihost_utils.reached_preemption_sync_point(step)
        return self.noted

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.noted = True

"""What the processes of one job tell each other: who failed, and what each has done.

They talk through files that all of them see, since a process may wait for hours for another one's
episodes, which collectives would not let it. Only at the start, where all arrive together, do they
use a collective.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from w2sjax.pipeline.storage import in_bucket, read_json, write_json

T = TypeVar("T")
FAILED = "failed.json"  # in the workdir, which process failed
_MESSAGE_BYTES = 2000


class OtherProcessFailed(RuntimeError):
    """Another process of the job failed; the message says which one, where and why."""


class Processes:
    """This process among those of its job.

    Attributes:
      index: which one it is, from 0.
      count: how many there are.
      job: a number that they have in common, and the processes of no other job.
      stage: what this process works on; named where it fails.

    Args:
      directory: one that all processes see; used where there are several.
    """

    def __init__(self, directory: os.PathLike[str]):
        self.index, self.count = jax.process_index(), jax.process_count()
        self.job = _job()
        self.stage = "start"
        self._failed = epath.Path(directory) / FAILED
        self._poll_s = 2.0 if in_bucket(directory) else 0.2

    def check(self) -> None:
        """Raises `OtherProcessFailed` if one did."""
        if self.count > 1 and (failed := self._failure()) is not None:
            raise OtherProcessFailed(
                f"process {failed['process']} failed in stage {failed['stage']}: {failed['error']}"
            )

    def wait(self, find: Callable[[], T | None]) -> T:
        """What `find` returns once it returns something; for as long as no process fails."""
        while (found := find()) is None:
            self.check()
            time.sleep(self._poll_s)
        return found

    def told(self, error: Exception) -> Exception:
        """What to say about an error here: another process's failure, where that came first and
        may well be its cause.
        """
        try:
            self.check()
        except OtherProcessFailed as failed:
            return failed
        self.report_failure(error)
        return error

    def report_failure(self, error: BaseException) -> None:
        """Lets the other processes know that this one ends; the first failure is the one told."""
        if self.count > 1 and self._failure() is None:
            record = {"job": self.job, "process": self.index, "stage": self.stage}
            with contextlib.suppress(OSError):  # nor can it be told then
                write_json(self._failed, record | {"error": f"{type(error).__name__}: {error}"})

    def _failure(self) -> dict | None:
        try:
            found = read_json(self._failed)
        except FileNotFoundError:
            return None
        return found if found["job"] == self.job else None


def agree(problem: Exception | None) -> None:
    """Goes on only if no process has a problem; all call this at about the same time.

    Raises:
      Exception: this process's own problem.
      OtherProcessFailed: another one's.
    """
    texts = [b""]
    if jax.process_count() > 1:
        own = np.zeros(_MESSAGE_BYTES, np.uint8)
        text = (f"{type(problem).__name__}: {problem}" if problem else "").encode()[:_MESSAGE_BYTES]
        own[: len(text)] = np.frombuffer(text, np.uint8)
        texts = [bytes(row).rstrip(b"\0") for row in multihost_utils.process_allgather(own)]
    if problem is not None:
        raise problem
    for process, text in enumerate(texts):
        if text:
            said = text.decode(errors="replace")
            raise OtherProcessFailed(f"process {process} was refused: {said}")


@functools.cache
def _job() -> int:
    number = random.SystemRandom().getrandbits(31)
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))

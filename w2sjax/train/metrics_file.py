"""Metrics of a run as JSON Lines, in a file or in an object of a bucket."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from etils import epath

from w2sjax.checkpoints import absolute_path


class MetricsFile:
    """One object per update with `step` and the metrics; goes on after the lines up to `step`.

    A file gets each line when `flush` is called. An object in a bucket (`gs://…`) can only be
    written whole, which happens in `publish` and `close`.

    Args:
      path: where to; its directory is made.
      step: lines past this update, and one that a kill cut short, are dropped.

    Raises:
      ValueError: if a line is not one of metrics.
    """

    def __init__(self, path: str | os.PathLike[str], step: int):
        self._path = absolute_path(path)
        self._in_bucket = "://" in os.fspath(self._path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = _lines_up_to(self._path, step)  # of a bucket's object: all; else none
        self._file = None
        if self._in_bucket:
            self.publish()
        else:
            rewritten = self._path.with_name(self._path.name + ".tmp")
            rewritten.write_text("".join(self._lines), encoding="utf-8")
            rewritten.replace(self._path)
            self._lines = []
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the line of an update."""
        line = json.dumps({"step": step, **metrics}) + "\n"
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(line)

    def flush(self) -> None:
        """Hands the lines of a file on to the system."""
        if self._file is not None:
            self._file.flush()

    def publish(self) -> None:
        """Makes all lines readable, in a bucket too."""
        if self._file is None:
            self._path.write_text("".join(self._lines), encoding="utf-8")
        else:
            self._file.flush()

    def close(self) -> None:
        """Publishes, and lets go of the file."""
        self.publish()
        if self._file is not None:
            self._file.close()


def _lines_up_to(path: epath.Path, step: int) -> list[str]:
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n") or _step_of(line, path, len(kept) + 1) > step:
                break
            kept.append(line)
    return kept


def _step_of(line: str, path: epath.Path, number: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number}: not a line of metrics with a step ({error}); "
            "remove the file to train without its history."
        ) from error

"""A training run: batches in, updates, checkpoints and metrics out, going on where it was cut."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from w2sjax.batches import Loader
from w2sjax.checkpoints import TrainCheckpoints
from w2sjax.train.metrics_file import MetricsFile
from w2sjax.train.state import TrainState
from w2sjax.train.step import TrainStep
from w2sjax.train.termination import Termination, TrainingInterrupted, raise_lost_interrupt

# (updates made, updates in all, that update's metrics)
OnStep = Callable[[int, int, dict[str, float]], None]

_MUST_BE_FINITE = ("loss", "grad_norm")
_IDS_SHOWN = 64


class FitResult(NamedTuple):
    """How a run ended."""

    state: TrainState  # after the last update
    start_step: int  # updates that had been made before, by the run this one continues
    metrics: dict[str, float]  # of the last update; empty if there was none left to make


def fit(
    state: TrainState,
    train_step: TrainStep,
    loader: Loader,
    *,
    total_steps: int,
    frozen: Mapping[str, Any] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 0,
    keep: int = 2,
    best_metric: str | None = None,
    best_mode: Literal["min", "max"] = "min",
    metrics_path: str | os.PathLike[str] | None = None,
    log_every: int = 20,
    on_step: OnStep | None = None,
) -> FitResult:
    """Trains up to `total_steps` updates, from the newest checkpoint if there is one.

    Update t (from 1) is made on `loader.batch(t − 1)` and nothing else, so an interrupted run that
    is started again ends with the bits of an uninterrupted one. The host does not wait for the
    device at every update: metrics are fetched every `log_every` updates, all but the newest, and
    before each checkpoint.

    With checkpoints, SIGTERM or SIGINT ends a run in good order: the running update is finished and
    saved, and `TrainingInterrupted` raised. Several processes (`jax.distributed`) each make the
    same call, with a mesh over all devices and directories that all of them see; the state is
    written by all, the metrics by process 0.

    Args:
      state: the start, from `init_state`; consumed. Also says structure and shardings of what is
        restored.
      train_step: the update.
      loader: the data.
      total_steps: updates in all.
      frozen: parameters that are not trained (see `TrainStep`); in no checkpoint.
      checkpoint_dir: where states are kept, a cloud path or not; None: nowhere, and nothing is
        resumed.
      checkpoint_every: updates between checkpoints; above 0 exactly where `checkpoint_dir` is
        given. The last update is always followed by one.
      keep: how many of them stay: the newest, or with `best_metric` the best and the newest one.
      best_metric: name of the metric of the saved updates that says which are best.
      best_mode: whether lower ("min") or higher ("max") is better.
      metrics_path: JSON Lines, one object per update with `step` and the metrics. Lines past the
        restored step are dropped on resume; the same run writes the same bytes, interrupted or not.
        A cloud path is written at each checkpoint and at the end.
      log_every: updates between fetches of the metrics.
      on_step: called for every update, in order, when its metrics have been fetched.

    Returns:
      FitResult.

    Raises:
      TrainingInterrupted: after such a signal, when the state is saved.
      FloatingPointError: if loss or gradient norm is NaN or infinite; step and the batch's ids are
        named, and no checkpoint holds anything of it.
      ValueError: on arguments that do not go together, or a checkpoint past `total_steps`.
      CheckpointMismatchError: if the checkpoints are of another model or optimizer.
    """
    if total_steps < 1 or log_every < 1 or checkpoint_every < 0:
        raise ValueError(
            "total_steps and log_every must be at least 1 and checkpoint_every not negative; "
            f"got {total_steps}, {log_every} and {checkpoint_every}."
        )
    if (checkpoint_dir is not None) != (checkpoint_every > 0):
        raise ValueError(
            "checkpoint_dir and checkpoint_every go together; "
            f"got {checkpoint_dir} and {checkpoint_every}."
        )
    if best_metric is not None and checkpoint_dir is None:
        raise ValueError(f"best_metric {best_metric!r} chooses checkpoints: give checkpoint_dir.")
    with Termination(active=checkpoint_dir is not None) as termination:
        raise_lost_interrupt()
        checkpoints, log = None, None
        try:
            if checkpoint_dir is not None:
                checkpoints = TrainCheckpoints(
                    checkpoint_dir, keep=keep, best_metric=best_metric, best_mode=best_mode
                )
            latest = checkpoints.latest_step() if checkpoints else None
            if latest is not None:
                if latest > total_steps:
                    raise ValueError(
                        f"{checkpoint_dir} holds step {latest}, past total_steps = {total_steps}: "
                        "this is another run's directory, or total_steps was lowered."
                    )
                state = checkpoints.restore(latest, state)
            done = start_step = int(state.step)
            log = _MetricsLog(metrics_path, start_step, total_steps, on_step, loader, checkpoints)
            while done < total_steps:
                loaded = loader.batch(done)
                state, metrics = train_step(state, loaded.batch, loaded.extras, frozen)
                done += 1
                if best_metric is not None and best_metric not in metrics:
                    raise ValueError(
                        f"best_metric {best_metric!r} is not measured; there are {sorted(metrics)}."
                    )
                log.add(done, metrics)
                ends = termination.after(done) or done == total_steps
                saves = checkpoints is not None and (ends or done % checkpoint_every == 0)
                if saves or ends:
                    log.fetch(leave=0)
                elif done % log_every == 0:
                    log.fetch(leave=1)
                if saves:
                    log.publish()
                    checkpoints.save(done, state, log.last)
                if ends:
                    break
        finally:
            if log is not None:
                log.close()
            if checkpoints is not None:
                checkpoints.close()
    if termination.noted is not None:
        raise TrainingInterrupted(done, total_steps, checkpoints.directory, termination.noted)
    return FitResult(state=state, start_step=start_step, metrics=log.last)


class _MetricsLog:
    """Metrics on their way from the device to the file, the callback and the check for NaN."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        start_step: int,
        total_steps: int,
        on_step: OnStep | None,
        loader: Loader,
        checkpoints: TrainCheckpoints | None,
    ):
        self._total_steps = total_steps
        self._on_step = on_step
        self._loader = loader
        self._checkpoints = checkpoints
        self._waiting: list[tuple[int, dict[str, jax.Array]]] = []
        self._file = None
        self.last: dict[str, float] = {}
        if path is not None and jax.process_index() == 0:
            self._file = MetricsFile(path, start_step)

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self._waiting.append((step, metrics))

    def fetch(self, *, leave: int) -> None:
        """Takes in all but the newest `leave` updates, waiting for the device if need be."""
        count = len(self._waiting) - leave
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        for step, values in jax.device_get(ready):
            metrics = {name: float(value) for name, value in sorted(values.items())}
            self._check_finite(step, metrics)
            self.last = metrics
            if self._file is not None:
                self._file.write(step, metrics)
            if self._on_step is not None:
                self._on_step(step, self._total_steps, metrics)
        if self._file is not None:
            self._file.flush()

    def publish(self) -> None:
        if self._file is not None:
            self._file.publish()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _check_finite(self, step: int, metrics: dict[str, float]) -> None:
        broken = [name for name in _MUST_BE_FINITE if not math.isfinite(metrics[name])]
        if not broken:
            return
        values = ", ".join(f"{name} is {metrics[name]}" for name in broken)
        ids = self._loader.batch(step - 1).ids
        shown = ", ".join(str(index) for index in ids[:_IDS_SHOWN])
        more = f" and {len(ids) - _IDS_SHOWN} more" if len(ids) > _IDS_SHOWN else ""
        kept = self._checkpoints.latest_step() if self._checkpoints else None
        raise FloatingPointError(
            f"step {step}: {values}, on the batch of data ids {shown}{more}. "
            + (
                f"The checkpoint of step {kept} in {self._checkpoints.directory} is good. "
                if kept is not None
                else "There is no earlier checkpoint. "
            )
            + "Lower the learning rate, clip the gradients, or look at these ids."
        )

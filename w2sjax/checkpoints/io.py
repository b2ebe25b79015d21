"""Parameters and training states on disk, through orbax: no other file touches it."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath


class CheckpointMismatchError(ValueError):
    """A checkpoint of another model: parameters are missing, left over, or of other shapes."""


def save_params(
    directory: str | os.PathLike[str],
    params: Any,
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes parameters; the directory appears complete or not at all.

    Args:
      directory: where to; its parents are made.
      params: pytree of arrays, sharded or not.
      metadata: JSON values to keep beside them, such as the model's configuration.
      overwrite: remove what is there first.

    Raises:
      FileExistsError: if the directory exists and is not to be overwritten.
    """
    path = absolute_path(directory)
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists already; choose another directory, or overwrite=True."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with _checkpointer() as checkpointer:
        checkpointer.save(
            path,
            args=ocp.args.StandardSave(params),
            custom_metadata=dict(metadata or {}),
            force=overwrite,
        )


def load_params(directory: str | os.PathLike[str], like: Any, *, alone: bool = False) -> Any:
    """Reads parameters into a known structure, each array straight to its place.

    Args:
      directory: from `save_params`.
      like: pytree of arrays or `jax.ShapeDtypeStruct` (as from `jax.eval_shape`) with the shapes
        that are expected. Arrays come back in its dtypes, and in its shardings where it has some,
        else on this process's first device.
      alone: where there are several processes, all of them make this call together, unless it is
        made by one that loads for itself, onto its own devices.

    Returns:
      The same tree of arrays.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      CheckpointMismatchError: if it is of another model; the message names parameter paths and both
        shapes.
    """
    path = _existing(directory)
    with _checkpointer(alone) as checkpointer:
        stored = checkpointer.metadata(path).item_metadata
        _check_match(stored, like, path)
        return checkpointer.restore(path, args=ocp.args.StandardRestore(_abstract(like)))


def load_metadata(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save_params` kept beside the parameters.

    Args:
      directory: from `save_params`.

    Returns:
      The metadata.

    Raises:
      FileNotFoundError: if there is no checkpoint.
    """
    path = _existing(directory)
    with _checkpointer() as checkpointer:
        return dict(checkpointer.metadata(path).custom_metadata or {})


def absolute_path(path: str | os.PathLike[str]) -> epath.Path:
    """A path that does not depend on the working directory; a cloud path (`gs://…`) is one.

    Args:
      path: text, `pathlib.Path` or `etils.epath.Path`.

    Returns:
      The path, whose methods work on files and on cloud storage (with fsspec's package for it, such
      as gcsfs, or TensorFlow installed).

    Raises:
      ValueError: on a cloud path that went through `pathlib`, which cuts a slash from it.
    """
    text = os.fspath(path)
    if re.match(r"[a-z][a-z0-9]+:/(?!/)", text):
        raise ValueError(
            f"{text} looks like a cloud path that pathlib has cut a slash from; "
            "pass text or an etils.epath.Path."
        )
    return epath.Path(text if "://" in text else os.path.abspath(text))


class TrainCheckpoints:
    """The last few states of a training run, or its best few, by step; use as a context manager.

    Writing goes on in the background after `save` returns; the state may be donated at once. A
    checkpoint that a kill cut short is not seen again. `close` (or leaving the context) waits for
    what is being written. With several processes each of them makes the same calls; the directory
    must be one that all of them see.

    Args:
      directory: where to; made with its parents. May be a cloud path such as `gs://bucket/run`.
      keep: how many states stay: the newest ones, or with `best_metric` the best ones, and the
        newest besides, so that training can always go on from it.
      best_metric: name of the metric that says which are best. NaN, and a state that an earlier run
        saved without the metric, is worse than any number; of equals the later one is better.
      best_mode: whether lower ("min") or higher ("max") is better.

    Raises:
      ValueError: on a `keep` below 1 or another `best_mode`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
    ):
        if keep < 1:
            raise ValueError(f"keep must be at least 1; got {keep}.")
        if best_mode not in ("min", "max"):
            raise ValueError(f'best_mode must be "min" or "max"; got {best_mode!r}.')
        _quiet()
        self.directory = absolute_path(directory)
        self.best_metric = best_metric
        self._sign = 1 if best_mode == "max" else -1
        policy = ocp.checkpoint_managers.LatestN(keep)
        if best_metric is not None:
            best = ocp.checkpoint_managers.BestN(
                get_metric_fn=self._quality, n=keep, keep_checkpoints_without_metrics=False
            )
            newest = ocp.checkpoint_managers.LatestN(1)
            policy = ocp.checkpoint_managers.AnyPreservationPolicy([best, newest])
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=None if best_metric is None else self._quality,
                create=True,
                cleanup_tmp_directories=True,
            ),
            item_handlers=ocp.StandardCheckpointHandler(),
        )

    def __enter__(self) -> TrainCheckpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step; None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The best checkpoint's step; None if there is none with the metric.

        Raises:
          ValueError: if no `best_metric` was given.
        """
        if self.best_metric is None:
            raise ValueError(f"{self.directory}: give best_metric to ask for the best step.")
        return self._manager.best_step()

    def steps(self) -> list[int]:
        """The steps that are kept, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Starts writing a state; waits for an earlier one that is still being written.

        Args:
          step: its number, above all earlier ones.
          state: pytree of arrays.
          metrics: what was measured; must have `best_metric` where one was given, else unused.

        Raises:
          ValueError: if `best_metric` is not among the metrics.
        """
        kept = None
        if self.best_metric is not None:
            if self.best_metric not in (metrics or {}):
                raise ValueError(
                    f"the metrics of step {step} have no {self.best_metric!r}, by which "
                    f"{self.directory} keeps the best; they have {sorted(metrics or {})}."
                )
            kept = {self.best_metric: float(metrics[self.best_metric])}
        args = ocp.args.StandardSave(state)
        self._manager.save(step, args=args, metrics=kept, force=True)

    def restore(self, step: int, like: Any) -> Any:
        """Reads a state.

        Args:
          step: one of `steps()`.
          like: a state of the same structure, shapes, dtypes and shardings: arrays or
            `jax.ShapeDtypeStruct`.

        Returns:
          The state.

        Raises:
          FileNotFoundError: if there is no such step.
          CheckpointMismatchError: if it is of another model or optimizer.
        """
        self._manager.wait_until_finished()
        if step not in self._manager.all_steps():
            raise FileNotFoundError(
                f"{self.directory} has no checkpoint of step {step}; it has {self.steps()}."
            )
        _check_match(self._manager.item_metadata(step), like, self.directory / str(step))
        return self._manager.restore(step, args=ocp.args.StandardRestore(_abstract(like)))

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written and lets go of the directory."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _quality(self, metrics: Mapping[str, float]) -> float:
        value = self._sign * metrics.get(self.best_metric, math.nan)
        return -math.inf if math.isnan(value) else value


def _checkpointer(alone: bool = False) -> ocp.Checkpointer:
    _quiet()
    options = ocp.options.MultiprocessingOptions()
    if alone:
        me = jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
        )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _existing(directory: str | os.PathLike[str]) -> epath.Path:
    path = absolute_path(directory)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: the directory does not exist.")
    if not (path / "_METADATA").exists():
        raise FileNotFoundError(
            f"no checkpoint at {path}: the directory holds no parameters "
            "(was it written by save_params, and by a run that ended?)."
        )
    return path


def _abstract(like: Any) -> Any:
    """The tree with ShapeDtypeStructs that say where each array shall live."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def describe(leaf):
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding or here)

    return jax.tree.map(describe, like)


def _check_match(stored: Any, like: Any, path: epath.Path) -> None:
    shapes = {name: tuple(leaf.shape) for name, leaf in _leaves(stored) if hasattr(leaf, "shape")}
    wanted = {name: tuple(np.shape(leaf)) for name, leaf in _leaves(like)}
    problems = []
    for name in sorted(shapes.keys() | wanted.keys()):
        if name not in shapes:
            problems.append(
                f"{name}: missing in the checkpoint, the model has {list(wanted[name])}"
            )
        elif name not in wanted:
            problems.append(
                f"{name}: {list(shapes[name])} in the checkpoint, the model has no such parameter"
            )
        elif shapes[name] != wanted[name]:
            problems.append(
                f"{name}: {list(shapes[name])} in the checkpoint, {list(wanted[name])} in the model"
            )
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise CheckpointMismatchError(
            f"{path} is a checkpoint of another model:\n  " + "\n  ".join(shown)
        )


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _from_orbax_below_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or "orbax" not in record.pathname


def _quiet() -> None:
    """orbax reports each call at INFO through absl's one logger: filters its lines, not others."""
    logger = absl_logging.get_absl_logger()
    if _from_orbax_below_warning not in logger.filters:
        logger.addFilter(_from_orbax_below_warning)

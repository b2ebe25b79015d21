"""Parameters and training states on disk, through orbax: no other file touches it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

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
    path = _absolute(directory)
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


def load_params(directory: str | os.PathLike[str], like: Any) -> Any:
    """Reads parameters into a known structure, each array straight to its place.

    Args:
      directory: from `save_params`.
      like: pytree of arrays or `jax.ShapeDtypeStruct` (as from `jax.eval_shape`) with the shapes
        that are expected. Arrays come back in its dtypes, and in its shardings where it has some,
        else on the first device.

    Returns:
      The same tree of arrays.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      CheckpointMismatchError: if it is of another model; the message names parameter paths and both
        shapes.
    """
    path = _existing(directory)
    with _checkpointer() as checkpointer:
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


class TrainCheckpoints:
    """The last few states of a training run, by step; use as a context manager.

    Writing goes on in the background after `save` returns; the state may be donated at once. A
    checkpoint that a kill cut short is not seen again. `close` (or leaving the context) waits for
    what is being written.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int):
        if keep < 1:
            raise ValueError(f"keep must be at least 1; got {keep}.")
        _quiet()
        self.directory = _absolute(directory)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, cleanup_tmp_directories=True
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

    def steps(self) -> list[int]:
        """The steps that are kept, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any) -> None:
        """Starts writing a state; waits for an earlier one that is still being written.

        Args:
          step: its number, above all earlier ones.
          state: pytree of arrays.
        """
        self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

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


def _checkpointer() -> ocp.Checkpointer:
    _quiet()
    return ocp.Checkpointer(ocp.StandardCheckpointHandler())


def _absolute(directory: str | os.PathLike[str]) -> epath.Path:
    path = epath.Path(directory)
    return path if "://" in os.fspath(directory) else epath.Path(os.path.abspath(path))


def _existing(directory: str | os.PathLike[str]) -> epath.Path:
    path = _absolute(directory)
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
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

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

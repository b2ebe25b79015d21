"""Plans kept between runs: a long one takes half a minute to find."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from w2sjax.envs.scienceworld_expert import PLANNER_VERSION, PlanStep

Plan = tuple[PlanStep, ...]

_log = logging.getLogger(__name__)


def kept_plan(
    cache: Path | None, task: str, variation: int, simplification: str, make: Callable[[], Plan]
) -> Plan:
    """A plan as it was kept, or as `make` finds it; then it is kept.

    Plans of other versions of the planner or of the package scienceworld are left alone. A file
    that cannot be read is made again; a folder that cannot be written is warned of once.

    Args:
      cache: the folder of all plans; None for nowhere.
      task: official task name.
      variation: its index.
      simplification: as for loading.
      make: finds the plan.
    """
    if cache is None:
        return make()
    release = f"{importlib.metadata.version('scienceworld')}-{PLANNER_VERSION}"
    path = cache / release / (simplification or "none") / f"{task}-{variation}.json"
    plan = _read(path)
    if plan is None:
        plan = make()
        _keep(path, plan)
    return plan


def _read(path: Path) -> Plan | None:
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    match steps:
        case [_, *_] if all(map(_is_step, steps)):
            return tuple(PlanStep(*step) for step in steps)
    return None


def _is_step(value: object) -> bool:
    match value:
        case [str(), str()]:
            return True
    return False


def _keep(path: Path, plan: Plan) -> None:
    text = json.dumps([[step.action, step.location] for step in plan], indent=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, written = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(written, path)
        except BaseException:
            os.unlink(written)
            raise
    except OSError as error:
        _warn(str(path.parent), str(error))


@functools.cache
def _warn(folder: str, error: str) -> None:
    _log.warning(
        "scienceworld: plans cannot be kept in %s (%s) and will be made again; set "
        "env.options.cache_dir to another folder, or to '' to keep none",
        folder,
        error,
    )

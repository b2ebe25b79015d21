"""Game files of ALFWorld: the official ones, found and read; procedural ones, written.

A game is a folder <task type>-<thing>-None-<receptacle>-<scene>/trial_<...> with game.tw-pddl (all
that the engine needs), traj_data.json (the goal as data) and initial_state.pddl.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from w2sjax.envs.alfworld_games import FAMILIES, VERSION, Game

DATA_VARIABLE = "ALFWORLD_DATA"  # the package's own
FOLDERS: Mapping[str, str] = {"seen": "valid_seen", "unseen": "valid_unseen"}  # others: train
_SHARES: Mapping[str, tuple[float, float]] = {  # of the official training games, shuffled
    "pretrain": (0.0, 0.5),
    "demos": (0.5, 0.6),
    "dev": (0.6, 0.65),
    "train": (0.65, 1.0),
}
_DATA_FOLDER = "json_2.1.1"
_PART = re.compile(r"[A-Za-z0-9][\w.+-]*")
_GAME, _TRAJ, _PROBLEM = "game.tw-pddl", "traj_data.json", "initial_state.pddl"


def find_official(data_dir: str | None) -> Path:
    """The folder that holds train, valid_seen and valid_unseen.

    Args:
      data_dir: it or the folder above; None for $ALFWORLD_DATA, or else where `alfworld-download`
        puts them.

    Raises:
      FileNotFoundError: there are no games; the message says what to do.
    """
    chosen = data_dir or os.environ.get(DATA_VARIABLE) or "~/.cache/alfworld"
    for folder in (Path(chosen).expanduser(), Path(chosen).expanduser() / _DATA_FOLDER):
        if any((folder / name).is_dir() for name in ("train", *FOLDERS.values())):
            return folder
    raise FileNotFoundError(
        f"env.options.data_dir: no official ALFWorld games in {chosen}: download them with "
        f"`alfworld-download`, name their folder here or in ${DATA_VARIABLE}, or play "
        "games='procedural'"
    )


@functools.lru_cache(4)
def _official_games(folder: Path) -> tuple[tuple[str, str], ...]:
    """(task folder, trial folder) of every solvable game of the six task types, sorted."""
    found = []
    for path in sorted(folder.glob(f"*/*/{_GAME}")):
        task, trial = path.parent.parent.name, path.parent.name
        family = task.partition("-")[0] in FAMILIES.values()
        if family and "movable" not in task and "Sliced" not in task and _solvable(path):
            found.append((task, trial))
    return tuple(found)


def _solvable(path: Path) -> bool:
    return _read_json(path).get("solvable") is True


def official_ids(folder: Path, split: str, families: tuple[str, ...]) -> list[str]:
    """The ids of a split's official games, shuffled once and for all."""
    name = FOLDERS.get(split, "train")
    games = list(_official_games(folder / name))
    random.Random(len(games)).shuffle(games)
    if split in _SHARES:
        low, high = (round(share * len(games)) for share in _SHARES[split])
        games = games[low:high]
    kinds = {FAMILIES[family] for family in families}
    return [
        f"alfworld/official/{name}/{task}/{trial}"
        for task, trial in games
        if task.partition("-")[0] in kinds
    ]


def read_official(folder: Path, name: str, task: str, trial: str) -> tuple[dict, dict]:
    """(game.tw-pddl, traj_data.json) of an official game.

    Raises:
      ValueError: it is not there, or not readable.
    """
    if name not in ("train", *FOLDERS.values()) or not all(map(_PART.fullmatch, (task, trial))):
        raise ValueError(f"task_id: alfworld/official/{name}/{task}/{trial} names no game")
    game = folder / name / task / trial
    if not (game / _GAME).is_file():
        raise ValueError(f"task_id: there is no official game {game / _GAME}")
    return _read_json(game / _GAME), _read_json(game / _TRAJ)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return data


# ------------------------------------------------------------------------------------- procedural


def traj_data(game: Game, name: str) -> dict[str, Any]:
    """The goal as data, in the fields of the official traj_data.json that the package reads."""
    return {
        "task_id": name,
        "task_type": FAMILIES[game.family],
        "pddl_params": dict(game.params),
        "scene": {"scene_num": game.scene, "floor_plan": f"FloorPlan{game.scene}"},
        "turk_annotations": {"anns": [{"task_desc": f"{game.goal}."}]},
        "generator": f"w2sjax procedural ALFWorld {VERSION}",
    }


def keep_game(cache: Path, split: str, trial: str, game: Game) -> Path:
    """Writes a game's files, unless they are there already; returns their folder.

    The folder appears at once and complete, whoever else writes the same game.

    Args:
      cache: the folder of all procedural games.
      split: the game's split.
      trial: what makes its name unique.
      game: the game.

    Raises:
      OSError: it cannot be written; the message says what to do.
    """
    target = game.params["parent_target"] or game.params["toggle_target"]
    task = f"{FAMILIES[game.family]}-{game.params['object_target']}-None-{target}-{game.scene}"
    folder = cache / f"version_{VERSION}" / split / task / f"trial_{trial}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        written = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OSError(
            f"env.options.cache_dir: {cache} cannot be written ({error}); name another folder, or "
            "'' to keep no files"
        ) from error
    try:
        (written / _GAME).write_text(json.dumps(game.data()))
        (written / _TRAJ).write_text(json.dumps(traj_data(game, folder.name), indent=1))
        (written / _PROBLEM).write_text(game.problem)
        written.chmod(0o755)
        written.rename(folder)
    except OSError:
        if not folder.is_dir():  # not another process that was faster
            raise
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return folder

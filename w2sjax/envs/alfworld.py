"""ALFWorld (arXiv 2010.03768): household tasks in text, on the real engine.

Needs the extra `alfworld`: the PyPI packages alfworld (domain, grammar, floor plans) and textworld
(the engine). Two kinds of games:

- `games="procedural"`, the default: drawn from the package's floor plans (see
  `alfworld_games.py`). They are of ALFWorld's kind, but results on them are not results on
  ALFWorld's own games: say "procedural ALFWorld".
- `games="official"`: json_2.1.1, which the package's `alfworld-download` fetches.

Splits: `seen` and `unseen` are ALFWorld's valid_seen and valid_unseen, or procedural games in
scenes that training has and has not; `test` is another name of `seen`. `pretrain`, `demos`, `train`
and `dev` share the training scenes, each with games of its own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from w2sjax.envs import alfworld_files, alfworld_games
from w2sjax.envs.alfworld_engine import NOTHING, Engine, check_packages
from w2sjax.envs.alfworld_expert import Expert, Explorer, Oracle, Searcher, Task
from w2sjax.envs.alfworld_games import FAMILIES
from w2sjax.envs.base import Outcome
from w2sjax.envs.cache import default_cache

SPLITS = (*alfworld_games.SPLITS, "test")
GAMES = ("procedural", "official")
EXPERTS = ("oracle", "searcher", "explorer")
_MAX_ACTION_CHARS = 200  # the longest that means something has about 70
_PUT = re.compile(r"(?:put|move) (.+?) (?:in/on|into|onto|in|on|to) (.+)")
_HELP = "help"

INSTRUCTION = """You act in a room to finish a household task. Say one action per turn:
go to RECEPTACLE
open RECEPTACLE
close RECEPTACLE
take OBJECT from RECEPTACLE
move OBJECT to RECEPTACLE
examine OBJECT or RECEPTACLE
use OBJECT (a lamp)
clean OBJECT with RECEPTACLE (a sinkbasin)
heat OBJECT with RECEPTACLE (a microwave)
cool OBJECT with RECEPTACLE (a fridge)
slice OBJECT with OBJECT
look
inventory
Objects and receptacles have numbers, as in "go to cabinet 2". You can carry one object."""


class ALFWorld:
    """One ALFWorld game at a time. Follows `w2sjax.envs.base.Env`.

    Task ids read `alfworld/procedural/<split>/<family>/<scene>/<receptacles>-<clutter>/<number>` or
    `alfworld/official/<folder>/<task>/<trial>`; either can be played whatever the options are, and
    says all that the game depends on. Score and success: 1 where the goal is reached, which ends
    the episode, else 0. `put X in/on Y` and `move X to Y` mean the same, whichever a game has; case
    and extra spaces do not matter.

    Example:
      env = make_env("alfworld", families=("cool",), receptacles=8, clutter=4)
      print(env.reset(env.task_ids("train", 1)[0]))
      print(env.step("go to fridge 1").observation)

    Args:
      games: "procedural" or "official": what `task_ids` lists.
      data_dir: the official games' folder (json_2.1.1, or the one above); None for $ALFWORLD_DATA.
      families: task families, some of put, look, clean, heat, cool, two.
      floor_plans: the scenes of procedural games, by number; None for all 120.
      receptacles: how many of a scene's receptacles procedural games have at most; None for all.
      clutter: how many things that the goal does not need procedural games have.
      expert: "oracle" (knows where everything is), "searcher" (the same, but knows only what it has
        seen) or "explorer" (the package's own, which searches, and now and then gives up). The
        first two play on from any state.
      max_steps: step limit, counted by whoever plays.
      instruction: another system message; None for the built-in one, which lists the actions.
      cache_dir: where procedural games are kept as files, in the official layout, when they are
        first played; None for a folder in $W2SJAX_CACHE or the user's cache folder, "" for nowhere.

    Raises:
      ImportError: the packages are missing. FileNotFoundError: no official games. ValueError: an
        option that cannot be. Each says what to do.
    """

    name = "alfworld"

    def __init__(
        self,
        *,
        games: str = "procedural",
        data_dir: str | None = None,
        families: Sequence[str] = tuple(FAMILIES),
        floor_plans: Sequence[int] | None = None,
        receptacles: int | None = None,
        clutter: int = 12,
        expert: str = "oracle",
        max_steps: int = 40,
        instruction: str | None = None,
        cache_dir: str | None = None,
    ):
        _check_choice("games", games, GAMES)
        _check_choice("expert", expert, EXPERTS)
        self.max_steps = _check_int("max_steps", max_steps, 1, 10_000)
        self._clutter = _check_int("clutter", clutter, 0, 100)
        if receptacles is not None:
            _check_int("receptacles", receptacles, 4, 100)
        self._receptacles = receptacles
        if isinstance(families, str) or not families or any(f not in FAMILIES for f in families):
            raise ValueError(
                f"env.options.families: expected some of {', '.join(FAMILIES)}, got {families!r}"
            )
        if instruction is not None and (not isinstance(instruction, str) or not instruction):
            raise ValueError(
                f"env.options.instruction: expected a text or None, got {instruction!r}"
            )
        for option, folder in (("data_dir", data_dir), ("cache_dir", cache_dir)):
            if folder is not None and not isinstance(folder, str):
                raise ValueError(f"env.options.{option}: expected a text or None, got {folder!r}")
        self.instruction = INSTRUCTION if instruction is None else instruction
        self._families = tuple(family for family in FAMILIES if family in families)
        check_packages()
        self._floor_plans = _check_floor_plans(floor_plans)
        self._official = games == "official"
        self._data_dir = data_dir
        if self._official:
            alfworld_files.find_official(data_dir)
        self._cache = default_cache("procedural_alfworld") if cache_dir is None else None
        if cache_dir:
            self._cache = Path(cache_dir).expanduser()
        self._expert_kind = expert
        self._expert: Expert | None = None
        self._engine: Engine | None = None
        self._won = False

    # -------------------------------------------------------------------------------------- tasks

    def task_ids(self, split: str, count: int | None = None) -> list[str]:
        """The first `count` task ids of a split.

        Procedural splits are endless, and every prefix is balanced over the families.

        Raises:
          ValueError: unknown split; fewer than `count` official games; no count where a split is
            endless; no floor plan that has games of a family.
        """
        if split not in SPLITS:
            raise ValueError(f"split: unknown split {split!r} of alfworld; known: {SPLITS}")
        split = "seen" if split == "test" else split
        if count is not None and count < 0:
            raise ValueError(f"count: expected 0 or more, got {count}")
        if self._official:
            folder = alfworld_files.find_official(self._data_dir)
            ids = alfworld_files.official_ids(folder, split, self._families)
            if count is not None and count > len(ids):
                raise ValueError(
                    f"count: {count} tasks of split {split!r} asked for, but {folder} has "
                    f"{len(ids)} there of the families {', '.join(self._families)}"
                )
            return ids[:count]
        if count is None:
            raise ValueError(f"count: split {split!r} of procedural games is endless: give a count")
        return [self._procedural_id(split, number) for number in range(count)]

    def _procedural_id(self, split: str, number: int) -> str:
        family = self._families[number % len(self._families)]
        scenes = [
            scene
            for scene in alfworld_games.scenes(split, family)
            if self._floor_plans is None or scene in self._floor_plans
        ]
        if not scenes:
            raise ValueError(
                f"env.options.floor_plans: split {split!r} has no games of the family {family!r} "
                f"in {sorted(self._floor_plans)}; it has some in "
                f"{alfworld_games.scenes(split, family)}"
            )
        scene = scenes[int(random.Random(f"{split}/{number}").random() * len(scenes))]
        receptacles = "all" if self._receptacles is None else self._receptacles
        return (
            f"alfworld/procedural/{split}/{family}/{scene}/{receptacles}-{self._clutter}/{number}"
        )

    def _load(self, task_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """(game.tw-pddl, traj_data.json) of a task."""
        match task_id.split("/"):
            case ["alfworld", "official", name, task, trial]:
                folder = alfworld_files.find_official(self._data_dir)
                return alfworld_files.read_official(folder, name, task, trial)
            case ["alfworld", "procedural", split, family, scene, shape, number] if (
                split in alfworld_games.SPLITS
                and family in FAMILIES
                and re.fullmatch(r"[1-9]\d{0,2}", scene)
                and int(scene) in alfworld_games.scenes(split, family)
                and re.fullmatch(r"(all|[4-9]|[1-9]\d|100)-(\d|[1-9]\d|100)", shape)
                and re.fullmatch(r"0|[1-9]\d{0,17}", number)
            ):
                limit, _, clutter = shape.partition("-")
                game = alfworld_games.draw_game(
                    split,
                    family,
                    int(scene),
                    None if limit == "all" else int(limit),
                    int(clutter),
                    int(number),
                )
                trial = f"{shape}-{number}"
                if self._cache is not None:
                    alfworld_files.keep_game(self._cache, split, trial, game)
                return game.data(), alfworld_files.traj_data(game, trial)
        raise ValueError(
            f"task_id: {task_id[:200]!r} is no task of alfworld; they read alfworld/procedural/"
            "<split>/<family>/<scene>/<receptacles>-<clutter>/<number> or "
            "alfworld/official/<folder>/<task>/<trial>"
        )

    # ------------------------------------------------------------------------------------ episode

    def reset(self, task_id: str) -> str:
        """Starts a task; returns what is to be seen, and the goal.

        Raises:
          ValueError: not a task id, or a game file that cannot be played.
        """
        game, data = self._load(task_id)
        if self._engine is None:
            self._engine = Engine.take()
        self._expert = None
        try:
            task = Task.from_traj_data(data)
            observation = self._engine.start(game)
        except ValueError as error:
            raise ValueError(f"{task_id}: {error}") from error
        self._won = False
        if self._expert_kind == "explorer":
            self._expert = Explorer(data, self._engine, observation, task_id)
        else:
            cls = Oracle if self._expert_kind == "oracle" else Searcher
            self._expert = cls(task, self._engine)
        return observation

    def step(self, action: str) -> Outcome:
        """Performs one action, any text; what means nothing now gets "Nothing happens."

        Raises:
          RuntimeError: no task was started.
        """
        engine = self._playing()
        if self._won:
            return Outcome(NOTHING, 1.0, True, True)
        command = self._command(action)
        observation = NOTHING if command is None else engine.step(command)
        self._won = engine.won
        self._expert.heard(command or _readable(action), observation)
        return Outcome(observation, float(self._won), self._won, self._won)

    def _command(self, action: str) -> str | None:
        """An action in the words that the engine knows it by; None where it means nothing now."""
        known = self._engine.commands
        action = _readable(action)
        if action in known:
            return action
        if put := _PUT.fullmatch(action):
            thing, place = put.groups()
            same = (f"move {thing} to {place}", f"put {thing} in/on {place}")
            return next((command for command in same if command in known), None)
        return None

    def admissible_actions(self) -> list[str]:
        """What the engine says can be done now, sorted; without `help`, whose answer is a page.

        Empty after the end.

        Raises:
          RuntimeError: no task was started.
        """
        engine = self._playing()
        return [] if self._won else [c for c in engine.commands if c != _HELP]

    def expert_action(self) -> str:
        """The expert's next action.

        Raises:
          RuntimeError: no task was started.
        """
        self._playing()
        if self._won:
            return "look"
        return self._command(self._expert.act()) or "look"

    def close(self) -> None:
        """Gives the engine to whoever needs one next in this process."""
        if self._engine is not None:
            self._engine.give()
        self._engine = self._expert = None

    def _playing(self) -> Engine:
        if self._engine is None or self._expert is None:
            raise RuntimeError("alfworld: no task is under way; call reset(task_id) first")
        return self._engine


def _readable(action: str) -> str:
    """An action in lower case with single spaces; nothing where it is endless."""
    return "" if len(action) > _MAX_ACTION_CHARS else " ".join(action.lower().split())


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"env.options.{name}: expected one of {choices}, got {value!r}")


def _check_int(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"env.options.{name}: expected an integer from {low} to {high}, got {value!r}"
        )
    return value


def _check_floor_plans(numbers: Sequence[int] | None) -> frozenset[int] | None:
    if numbers is None:
        return None
    if isinstance(numbers, (str, int)) or not all(isinstance(n, int) for n in numbers):
        raise ValueError(f"env.options.floor_plans: expected scene numbers, got {numbers!r}")
    known = {
        scene
        for split in ("seen", "unseen")
        for family in FAMILIES
        for scene in alfworld_games.scenes(split, family)
    }
    unknown = [number for number in numbers if number not in known]
    if unknown or not numbers:
        raise ValueError(
            f"env.options.floor_plans: expected some of {sorted(known)}, got {list(numbers)!r}"
        )
    return frozenset(numbers)

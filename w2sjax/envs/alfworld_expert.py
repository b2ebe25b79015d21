"""Experts for ALFWorld: one that knows everything, one that searches, and the package's own."""

from __future__ import annotations

import dataclasses
import importlib
import random
import re
from collections.abc import Mapping
from typing import Any, Protocol

from w2sjax.envs.alfworld_engine import Engine
from w2sjax.envs.alfworld_games import APPLIANCES, FAMILIES

_DONE = {"clean": "isclean", "heat": "ishot", "cool": "iscool"}  # family → the fact it brings about
_IDLE = "look"
_PUT = re.compile(r"^put (.+) in/on (.+)$")  # as official games say it
_GIVES_UP = 200  # steps after which the package's expert stops


@dataclasses.dataclass(frozen=True)
class Task:
    """What a game asks for; types are in lower case, as in the facts, without their "type".

    Attributes:
      family: a key of `alfworld_games.FAMILIES`.
      thing: the type of the thing asked for.
      target: the type of receptacle it has to come to, or of the lamp.
    """

    family: str
    thing: str
    target: str

    @classmethod
    def from_traj_data(cls, data: Mapping[str, Any]) -> Task:
        """Reads traj_data.json.

        Raises:
          ValueError: a field is missing or says what is not known here; the message names it.
        """
        family = next((f for f, kind in FAMILIES.items() if kind == data.get("task_type")), None)
        if family is None:
            raise ValueError(f"task_type: {data.get('task_type')!r} is none of the six known")
        params = data.get("pddl_params")
        names = ("object_target", "toggle_target" if family == "look" else "parent_target")
        for name in names:
            if not isinstance(params, Mapping) or not isinstance(params.get(name), str):
                raise ValueError(f"pddl_params: there is no text {name!r}")
        thing, target = (params[name].lower() for name in names)
        if not thing or not target:
            raise ValueError(f"pddl_params: {names[0]} and {names[1]} must not be empty")
        return cls(family, thing, target)


class Expert(Protocol):
    """What plays a game that an engine holds."""

    def heard(self, action: str, observation: str) -> None:
        """Tells it what was done and seen."""

    def act(self) -> str:
        """The next action."""


class Oracle:
    """Knows where everything is; its next action is a function of the state alone.

    It takes what the goal asks for (a thing at hand first, then one that is already treated), has
    it cleaned, heated or cooled, and brings it to where it belongs; other things in hand are put
    down. It does not search: its episodes are short, 4 to 12 actions.

    Args:
      task: what the game asks for.
      engine: the engine, at the start of the game.
    """

    def __init__(self, task: Task, engine: Engine):
        self._task = task
        self._engine = engine

    def heard(self, action: str, observation: str) -> None:
        """Nothing to remember."""

    def _view(self) -> _View:
        return _View(self._engine)

    def _search(self, view: _View, kind: str) -> str:
        """What to do where no thing of a type is known: none is left."""
        del view, kind
        return _IDLE

    def act(self) -> str:
        """The next action; "look" where nothing serves any more."""
        view = self._view()
        task, held = self._task, view.held
        if held is not None and view.type_of(held) != task.thing:
            return self._put(view, held, view.homes(held))
        if task.family == "look":
            return self._fetch(view, set()) if held is None else self._light(view)
        targets = view.receptacles_of(task.target)
        if task.family == "two":
            targets = sorted(targets, key=lambda r: (-self._count(view, r), r))[:1]
        if held is None:
            return self._fetch(view, set(targets))
        if task.family in APPLIANCES and not view.has(_DONE[task.family], held):
            places = view.receptacles_of(APPLIANCES[task.family].lower())
            return self._use(view, places, f"{task.family} {{thing}} with {{place}}", held)
        return self._put(view, held, targets)

    def _count(self, view: _View, receptacle: str) -> int:
        inside = (thing for thing, place in view.inside.items() if place == receptacle)
        return sum(view.type_of(thing) == self._task.thing for thing in inside)

    def _fetch(self, view: _View, settled: set[str]) -> str:
        """Takes a thing that the goal asks for, unless it is where and as it should be."""
        done = _DONE.get(self._task.family)
        wanted = []
        for thing, place in view.inside.items():
            if view.type_of(thing) != self._task.thing or not view.has("pickupable", thing):
                continue
            treated = done is None or view.has(done, thing)
            if not (treated and place in settled):
                wanted.append((place not in view.here, not treated, thing))
        if not wanted:
            return self._search(view, self._task.thing)
        thing = min(wanted)[2]
        place = view.inside[thing]
        return self._reach(view, place) or f"take {view.name(thing)} from {view.name(place)}"

    def _light(self, view: _View) -> str:
        lamps = [
            thing
            for thing in view.inside
            if view.type_of(thing) == self._task.target and view.has("toggleable", thing)
        ]
        if not lamps:
            return self._search(view, self._task.target)
        lamp = min(lamps, key=lambda lamp: (view.inside[lamp] not in view.here, lamp))
        at = view.inside[lamp] in view.here
        return f"use {view.name(lamp)}" if at else f"go to {view.name(view.inside[lamp])}"

    def _use(self, view: _View, places: list[str], command: str, thing: str) -> str:
        if not places:
            return _IDLE
        place = next((place for place in places if place in view.here), places[0])
        if place not in view.here:
            return f"go to {view.name(place)}"
        return command.format(thing=view.name(thing), place=view.name(place))

    def _put(self, view: _View, thing: str, places: list[str]) -> str:
        if not places:
            return _IDLE
        place = next((place for place in places if place in view.here), places[0])
        return self._reach(view, place) or f"move {view.name(thing)} to {view.name(place)}"

    def _reach(self, view: _View, place: str) -> str | None:
        """The way to a receptacle and into it; None once there and open."""
        if place not in view.here:
            return f"go to {view.name(place)}"
        return f"open {view.name(place)}" if view.closed(place) else None


class Searcher(Oracle):
    """Plays like the oracle, but knows only what it has seen, like a careful person.

    Where it knows no thing that it wants, it looks into the next receptacle as the room lists them:
    first those that may hold such a thing.
    """

    def __init__(self, task: Task, engine: Engine):
        super().__init__(task, engine)
        self._seen: set[str] = set()

    def heard(self, action: str, observation: str) -> None:
        """Remembers which receptacles it has looked into."""
        view = _View(self._engine)
        self._seen.update(place for place in view.here if not view.closed(place))

    def _view(self) -> _View:
        view = _View(self._engine)
        view.inside = {thing: at for thing, at in view.inside.items() if at in self._seen}
        return view

    def _search(self, view: _View, kind: str) -> str:
        likely = view.homes_of(kind)
        left = [place for place in view.places if place not in self._seen]
        if not left:
            return _IDLE
        place = min(left, key=lambda p: (p not in view.here, p not in likely))
        return self._reach(view, place) or f"examine {view.name(place)}"


class _View:
    """The engine's facts, looked up by what they are about."""

    def __init__(self, engine: Engine):
        self.name = engine.name
        self._facts = engine.facts()
        self._types: dict[str, str] = {}
        self.inside: dict[str, str] = {}  # thing → receptacle
        self.held: str | None = None
        self._contains: dict[str, set[str]] = {}  # type of receptacle → types of things
        agent_at, at = None, []
        for fact in self._facts:
            match fact:
                case ("objecttype" | "receptacletype", thing, kind):
                    self._types[thing] = kind.removesuffix("type")
                case ("inreceptacle", thing, place):
                    self.inside[thing] = place
                case ("holds", _, thing):
                    self.held = thing
                case ("atlocation", _, location):
                    agent_at = location
                case ("receptacleatlocation", place, location):
                    at.append((place, location))
                case ("cancontain", place_type, thing_type):
                    kinds = self._contains.setdefault(place_type.removesuffix("type"), set())
                    kinds.add(thing_type.removesuffix("type"))
        self.places = sorted(place for place, _ in at)
        self.here = {place for place, location in at if location == agent_at}

    def has(self, predicate: str, thing: str) -> bool:
        return (predicate, thing) in self._facts

    def closed(self, place: str) -> bool:
        return self.has("openable", place) and not self.has("opened", place)

    def type_of(self, thing: str) -> str:
        return self._types.get(thing, "")

    def receptacles_of(self, kind: str) -> list[str]:
        """The receptacles of a type, sorted."""
        return [place for place in self.places if self.type_of(place) == kind]

    def homes_of(self, kind: str) -> list[str]:
        """The receptacles that may hold things of a type, sorted."""
        return [p for p in self.places if kind in self._contains.get(self.type_of(p), ())]

    def homes(self, thing: str) -> list[str]:
        """The receptacles that may hold a thing: open ones first, then sorted."""
        places = self.homes_of(self.type_of(thing))
        return sorted(places, key=lambda place: (self.has("openable", place), place))


class Explorer:
    """The expert that the alfworld package ships: it searches, like a person who sees the text.

    Made to work with the package's own grammar (it still waits for `put` where that says `move`),
    and repeatable: it draws from `random`, which is seeded for it and left as it was.
    It wins most games, some only after a search of every receptacle, and gives up after 200 steps.

    Args:
      data: the game's traj_data.json.
      engine: the engine, at the start of the game.
      first_observation: what was to be seen there.
      seed: what it draws depends on it.
    """

    def __init__(self, data: Mapping[str, Any], engine: Engine, first_observation: str, seed: str):
        package = importlib.import_module("alfworld.agents.expert")
        self._gave_up = (package.HandCodedAgentTimeout, package.HandCodedAgentFailed)
        known = importlib.import_module("alfworld.gen.constants").OBJECTS
        params = {
            key: value.lower() if value in known else value
            for key, value in data["pddl_params"].items()
        }
        params["task_type"] = data["task_type"]
        self._agent = package.HandCodedTWAgent(max_steps=_GIVES_UP)
        self._agent.policy = self._agent.get_task_policy(params)(params, max_steps=_GIVES_UP)
        self._random = random.Random(seed).getstate()
        self._agent.observe(f"Welcome {first_observation}")
        self._action = _IDLE
        self._engine = engine

    def heard(self, action: str, observation: str) -> None:
        """Tells it what was done and seen; it decides at once what it would do next."""
        verb, _, rest = action.partition(" ")
        if verb == "move":  # the package's expert waits for the older wording
            thing, _, place = rest.rpartition(" to ")
            action = f"put {thing} in/on {place}"
        state = {
            "feedback": observation,
            "facts": self._engine.named_facts(),
            "admissible_commands": [_PUT.sub(r"move \1 to \2", c) for c in self._engine.commands],
        }
        before = random.getstate()
        random.setstate(self._random)
        try:
            self._action = self._agent.act(state, 0, False, action)
        except (*self._gave_up, IndexError, KeyError):  # it is at its wits' end, or confused
            self._action = _IDLE
        finally:
            self._random = random.getstate()
            random.setstate(before)
        if self._action not in state["admissible_commands"]:
            self._action = _IDLE

    def act(self) -> str:
        """The action decided on last; "look" at the start, as in the package."""
        return self._action

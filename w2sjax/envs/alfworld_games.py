"""Procedural ALFWorld: games drawn from the floor plans that the alfworld package ships.

The package holds, for each of 120 scenes, which receptacles it has and which types of objects, and
the domain, grammar and goal templates of its games; the official games themselves (json_2.1.1) are
a download. A procedural game is drawn from the former: receptacles of a scene, things placed where
the package says that such things may lie, and a goal of one of the six task types. It has the
format of an official game and is played by the same engine, but it is none: results on such games
are results on "procedural ALFWorld".

A task id says all that a game depends on:

    alfworld/procedural/<split>/<family>/<scene>/<receptacles>-<clutter>/<number>

Splits are disjoint by construction: `unseen` has the package's test scenes to itself; in the other
scenes every game's fingerprint (a hash of its PDDL problem) says which split may have it, and
drawing goes on until it fits.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

_Item = TypeVar("_Item")

VERSION = 1  # of what is drawn from a task id
FAMILIES: Mapping[str, str] = {  # name → ALFWorld's task type
    "put": "pick_and_place_simple",
    "look": "look_at_obj_in_light",
    "clean": "pick_clean_then_place_in_recep",
    "heat": "pick_heat_then_place_in_recep",
    "cool": "pick_cool_then_place_in_recep",
    "two": "pick_two_obj_and_place",
}
SPLITS = ("pretrain", "demos", "train", "dev", "seen", "unseen")
APPLIANCES: Mapping[str, str] = {"clean": "SinkBasin", "heat": "Microwave", "cool": "Fridge"}
_SHARES: Mapping[str, range] = {  # split → the fingerprints, modulo 16, that are its own
    "pretrain": range(0, 6),
    "demos": range(6, 8),
    "train": range(8, 12),
    "dev": range(12, 14),
    "seen": range(14, 16),
    "unseen": range(0, 16),
}
_ABILITIES: Mapping[str, str] = {"clean": "Cleanable", "heat": "Heatable", "cool": "Coolable"}
_LAMP = "DeskLamp"
_LAMP_STANDS = ("Desk", "SideTable", "Dresser", "Shelf", "CoffeeTable", "DiningTable")
_UNPLACED: Mapping[str, int] = {  # receptacles that the layouts leave out → how many a scene has
    "CoffeeMachine": 1,
    "GarbageCan": 1,
    "StoveBurner": 4,
    "Toaster": 1,
}
_NO_GOAL = frozenset(("TeddyBear",))  # unknown to the package's own expert
_MAX_SAME = 3  # things of one type in a game, as in the package's own settings
_ESCAPES = (("|", "_bar_"), ("-", "_minus_"), ("+", "_plus_"), (".", "_dot_"), (",", "_comma_"))


def package_folder() -> Path:
    """Where the alfworld package is, without importing it.

    Raises:
      ImportError: it is not installed.
    """
    spec = importlib.util.find_spec("alfworld")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "alfworld needs the packages alfworld and textworld: pip install -e '.[alfworld]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


@functools.cache
def _module(name: str) -> ModuleType:
    """A module of alfworld.gen by its file: importing the package makes folders."""
    path = package_folder() / "gen" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"_alfworld_gen_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def logic() -> dict[str, str]:
    """The package's PDDL domain and grammar, as game files name them."""
    data = package_folder() / "data"
    return {
        "pddl_domain": (data / "alfred.pddl").read_text(),
        "grammar": (data / "alfred.twl2").read_text(),
    }


@functools.cache
def scenes(split: str, family: str) -> tuple[int, ...]:
    """The scenes in which a split has games of a family, ascending."""
    constants = _module("constants")
    numbers = constants.TEST_SCENE_NUMBERS if split == "unseen" else constants.TRAIN_SCENE_NUMBERS
    kinds = constants.GOALS_VALID[FAMILIES[family]]
    found = []
    for scene in sorted(numbers):
        kind = next(kind for kind, members in constants.SCENE_TYPE.items() if scene in members)
        if kind in kinds and _goals(scene, family):
            found.append(scene)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Game:
    """What `draw_game` draws."""

    family: str
    scene: int
    goal: str  # the sentence of the task
    params: Mapping[str, Any]  # as "pddl_params" of the official traj_data.json
    problem: str  # the PDDL problem

    def data(self) -> dict[str, Any]:
        """The game file's content, game.tw-pddl."""
        known = logic()
        return {
            "pddl_domain": known["pddl_domain"],
            "grammar": known["grammar"].replace("UNKNOWN GOAL", self.goal),
            "pddl_problem": self.problem,
            "solvable": True,
        }


def draw_game(
    split: str, family: str, scene: int, receptacles: int | None, clutter: int, number: int
) -> Game:
    """Draws a game, a function of its arguments.

    Args:
      split: one of `SPLITS`.
      family: a key of `FAMILIES`.
      scene: one of `scenes(split, family)`.
      receptacles: how many of the scene's receptacles there are at most; None for all.
      clutter: how many things the goal does not need.
      number: which game of these.
    """
    key = f"{VERSION}/{split}/{family}/{scene}/{receptacles}/{clutter}/{number}"
    rng = random.Random(key)
    for attempt in itertools.count():
        # Where so few things make too few games, one more of them is put there.
        game = _draw(rng, family, scene, receptacles, clutter + attempt // 50)
        fingerprint = hashlib.blake2b(game.problem.encode(), digest_size=8).digest()
        if int.from_bytes(fingerprint, "big") % 16 in _SHARES[split]:
            return game


@functools.cache
def floor_plan(scene: int) -> tuple[dict[str, str], tuple[str, ...]]:
    """A scene's receptacles (id → type) and the types of things in it, sorted."""
    folder = package_folder() / "gen" / "layouts"
    placed = json.loads((folder / f"FloorPlan{scene}-openable.json").read_text())
    types = set(json.loads((folder / f"FloorPlan{scene}-objects.json").read_text()))
    found = {name: re.split(r"\|", name)[-1 if name.count("|") > 3 else 0] for name in placed}
    for kind, count in _UNPLACED.items():
        if kind in types and kind not in found.values():
            found |= {f"{kind}|{index:02}": kind for index in range(1, count + 1)}
    return dict(sorted(found.items())), tuple(sorted(types))


@functools.cache
def _goals(scene: int, family: str) -> tuple[tuple[str, str], ...]:
    """The goals (type of the thing, type of the receptacle or lamp) that a scene allows, sorted."""
    constants = _module("constants")
    contains = constants.VAL_RECEPTACLE_OBJECTS
    receptacles, types = floor_plan(scene)
    kinds = set(receptacles.values())
    things = [kind for kind in types if kind not in _NO_GOAL and _homes(kind, kinds)]
    if family == "look":
        lit = _LAMP in types and kinds.intersection(_LAMP_STANDS)
        return tuple((thing, _LAMP) for thing in things) if lit else ()
    if family in APPLIANCES:
        if APPLIANCES[family] not in kinds:
            return ()
        able = constants.VAL_ACTION_OBJECTS[_ABILITIES[family]]
        things = [thing for thing in things if thing in able]
        kinds = kinds - {APPLIANCES[family]}
    return tuple(
        (thing, kind)
        for thing in things
        for kind in sorted(kinds)
        if thing in contains.get(kind, ()) and _homes(thing, set(receptacles.values()) - {kind})
    )


def _homes(thing: str, kinds: set[str]) -> list[str]:
    """The types of receptacles, of some, that a thing may lie in."""
    contains = _module("constants").VAL_RECEPTACLE_OBJECTS
    return sorted(kind for kind in kinds if thing in contains.get(kind, ()))


def _pick(rng: random.Random, items: Sequence[_Item]) -> _Item:
    return items[int(rng.random() * len(items))]


def _shuffled(rng: random.Random, items: Sequence[_Item]) -> list[_Item]:
    return [item for _, _, item in sorted((rng.random(), i, item) for i, item in enumerate(items))]


def _draw(rng: random.Random, family: str, scene: int, limit: int | None, clutter: int) -> Game:
    plan, types = floor_plan(scene)
    thing, target = _pick(rng, _goals(scene, family))
    needed = [APPLIANCES[family]] if family in APPLIANCES else []
    if family != "look":
        needed.append(target)
    rest = _shuffled(rng, list(plan))
    kept = [next(name for name in rest if plan[name] == kind) for kind in needed]
    lamp_stand = None
    if family == "look":
        lamp_stand = next(name for name in rest if plan[name] in _LAMP_STANDS)
        kept.append(lamp_stand)
    sources = [n for n in rest if plan[n] in _homes(thing, set(plan.values()) - {target})]
    kept += [source for source in sources[:1] if source not in kept]
    kept += [name for name in rest if name not in kept][: max(0, (limit or len(rest)) - len(kept))]
    places = {name: plan[name] for name in sorted(kept)}
    things: list[tuple[str, str]] = []  # (type, receptacle)

    def place(kind: str, forbidden: str | None = None) -> None:
        allowed = _homes(kind, set(places.values()) - {forbidden})
        things.append((kind, _pick(rng, [n for n, type_ in places.items() if type_ in allowed])))

    if lamp_stand is not None:
        things.append((_LAMP, lamp_stand))
    for _ in range((2 if family == "two" else 1) + (rng.random() < 0.25)):
        place(thing, forbidden=target)  # in what `sources` gave, at least
    others = [kind for kind in types if kind != thing and _homes(kind, set(places.values()))]
    for _ in range(clutter if others else 0):
        kind = _pick(rng, others)
        if sum(kind == other for other, _ in things) < _MAX_SAME:
            place(kind)
    goals = _module("goal_library").gdict[FAMILIES[family]]
    words = {"obj": thing, "recep": "" if family == "look" else target, "toggle": ""}
    if family == "look":
        words["toggle"] = target
    template = _pick(rng, goals["templates"])
    return Game(
        family=family,
        scene=scene,
        goal=template.format(**{key: word.lower() for key, word in words.items()}),
        params={
            "object_target": words["obj"],
            "parent_target": words["recep"],
            "toggle_target": words["toggle"],
            "mrecep_target": "",
            "object_sliced": False,
        },
        problem=_problem(places, things, goals["pddl"].format(**words).replace("#", "-")),
    )


def _problem(places: Mapping[str, str], things: Sequence[tuple[str, str]], goal: str) -> str:
    """The PDDL problem of a game; the goal ends it."""
    constants = _module("constants")
    contains = constants.VAL_RECEPTACLE_OBJECTS
    counts: dict[str, int] = {}
    objects, facts = ["agent1 - agent", "loc_bar_0 - location"], ["(atLocation agent1 loc_bar_0)"]
    for index, (name, kind) in enumerate(places.items(), 1):
        receptacle = pddl_name(name)
        objects += [f"{receptacle} - receptacle", f"loc_bar_{index} - location"]
        facts.append(f"(receptacleType {receptacle} {kind}Type)")
        facts.append(f"(receptacleAtLocation {receptacle} loc_bar_{index})")
        if kind in constants.OPENABLE_CLASS_SET:
            facts.append(f"(openable {receptacle})")
    locations = {name: f"loc_bar_{index}" for index, name in enumerate(places, 1)}
    abilities = {f"{verb.lower()}": kinds for verb, kinds in constants.VAL_ACTION_OBJECTS.items()}
    for kind, name in sorted(things):
        counts[kind] = counts.get(kind, 0) + 1
        thing = pddl_name(f"{kind}|{counts[kind]:02}")
        objects.append(f"{thing} - object")
        facts.append(f"(objectType {thing} {kind}Type)")
        facts.append(f"(inReceptacle {thing} {pddl_name(name)})")
        facts.append(f"(objectAtLocation {thing} {locations[name]})")
        if kind != _LAMP:
            facts.append(f"(pickupable {thing})")
        if kind in constants.MOVABLE_RECEPTACLES_SET:
            facts.append(f"(isReceptacleObject {thing})")
        facts += [f"({ability} {thing})" for ability, kinds in abilities.items() if kind in kinds]
    receptacle_types = sorted(set(places.values()))
    object_types = sorted({kind for kind, _ in things})
    objects += [f"{kind}Type - rtype" for kind in receptacle_types]
    objects += [f"{kind}Type - otype" for kind in object_types]
    for kind in receptacle_types:
        facts += [
            f"(canContain {kind}Type {thing}Type)"
            for thing in object_types
            if thing in contains.get(kind, ())
        ]
    facts.append("(= (total-cost) 0)")
    return (
        "(define (problem procedural)\n  (:domain alfred)\n  (:objects\n    "
        + "\n    ".join(objects)
        + "\n  )\n  (:init\n    "
        + "\n    ".join(facts)
        + "\n  )\n"
        + goal.strip("\n")
        + "\n"
    )


def pddl_name(name: str) -> str:
    """An id of the floor plans as PDDL can spell it."""
    for char, escape in _ESCAPES:
        name = name.replace(char, escape)
    return name

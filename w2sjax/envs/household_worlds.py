"""What exists in the household, and how its worlds are drawn and dealt out to the splits.

Splits are disjoint by construction. Every world (layout, goal, placements) has a fingerprint, a
hash of its canonical text: the fingerprint's residue says which split may use it, and drawing goes
on until it fits. The split `test_unseen` has its own layouts (room and inventory of places), chosen
by a hash of the layout, that no other split ever uses.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

_Item = TypeVar("_Item")

FAMILIES = ("put", "look", "clean", "heat", "cool", "two")
SPLITS = ("pretrain", "demos", "train", "dev", "test", "test_unseen")

MATERIALS: Mapping[str, str] = {  # type → material; the first `num_object_types` are in use
    "mug": "ceramic",
    "apple": "food",
    "pan": "metal",
    "book": "paper",
    "plate": "ceramic",
    "potato": "food",
    "pot": "metal",
    "newspaper": "paper",
    "bowl": "ceramic",
    "tomato": "food",
    "kettle": "metal",
    "magazine": "paper",
}
CLOSED_KINDS = frozenset(("box", "cabinet", "drawer"))  # kinds of places that start closed
VERB_APPLIANCES: Mapping[str, tuple[str, ...]] = {
    "clean": ("sink", "towel"),
    "heat": ("microwave", "stove"),
    "cool": ("fridge", "freezer"),
}
PROPERTIES: Mapping[str, str] = {"clean": "clean", "heat": "hot", "cool": "cold"}
_FITTING = {  # (verb, material) → the appliance that does it; what is missing cannot be done
    ("clean", "ceramic"): "sink",
    ("clean", "food"): "sink",
    ("clean", "metal"): "sink",
    ("clean", "paper"): "towel",
    ("heat", "ceramic"): "microwave",
    ("heat", "food"): "microwave",
    ("heat", "metal"): "stove",
    ("cool", "ceramic"): "fridge",
    ("cool", "food"): "fridge",
    ("cool", "metal"): "freezer",
}
RUIN: Mapping[tuple[str, str], str] = {  # (appliance, material) → what happens, for good
    ("sink", "paper"): "is soaked",
    ("microwave", "metal"): "sparks",
    ("microwave", "paper"): "burns",
    ("stove", "ceramic"): "cracks",
    ("stove", "food"): "burns",
    ("stove", "paper"): "burns",
    ("freezer", "ceramic"): "cracks",
    ("freezer", "food"): "bursts",
}
_ROOMS = {  # room: (kinds of places to search, appliances)
    "kitchen": (
        ("cabinet", "counter", "drawer", "shelf", "table"),
        ("sink", "towel", "microwave", "stove", "fridge", "freezer"),
    ),
    "bedroom": (("bed", "box", "desk", "drawer", "shelf"), ("sink", "towel", "lamp")),
    "studio": (
        ("box", "cabinet", "desk", "shelf", "table"),
        ("microwave", "stove", "fridge", "freezer", "lamp"),
    ),
}
_FAMILY_ROOMS = {
    "put": ("kitchen", "bedroom", "studio"),
    "look": ("bedroom", "studio"),
    "clean": ("kitchen", "bedroom"),
    "heat": ("kitchen", "studio"),
    "cool": ("kitchen", "studio"),
    "two": ("kitchen", "bedroom", "studio"),
}
_SPARE_RATE = 0.25  # how often there is one more thing of the wanted type than the goal needs


class World(NamedTuple):
    """One generated task, all of it."""

    room: str
    places: tuple[str, ...]  # places to search, as listed: "drawer 1", …
    appliances: tuple[str, ...]  # "sink 1", …
    family: str
    goal_type: str  # "mug"
    goal_place: int  # index into places; without meaning in the family "look"
    objects: tuple[tuple[str, int], ...]  # (name "mug 1", index of the place where it lies)

    @property
    def layout(self) -> str:
        """The room and its inventory of places, as text."""
        return f"{self.room}: {', '.join(self.places)}"

    @property
    def canonical(self) -> str:
        """The whole world as text: equal texts are equal worlds."""
        goal = f"{self.family} {self.goal_type} {self.goal_place}"
        return f"{self.layout}; {goal}; {_placements(self.objects)}"

    @property
    def fingerprint(self) -> int:
        """A 64-bit hash of the canonical text, the same in every process."""
        return _hash(self.canonical)


def fitting_appliance(verb: str, material: str) -> str | None:
    """The kind of appliance with which a thing of this material is cleaned, heated or cooled."""
    return _FITTING.get((verb, material))


def split_of(world: World) -> str:
    """The one split that may use a world."""
    if _is_unseen(world.room, world.places):
        return "test_unseen"
    return _seen_split(world.fingerprint)


def family_of(split: str, index: int, families: tuple[str, ...] = FAMILIES) -> str:
    """The family of a task: every n consecutive tasks from a multiple of n hold each of n once."""
    return _family_block(split, index // len(families), families)[index % len(families)]


def draw_world(
    split: str,
    index: int,
    *,
    types: Sequence[str],
    max_receptacles: int,
    num_distractors: int,
    families: tuple[str, ...] = FAMILIES,
) -> World:
    """Draws the world of a task: a function of the arguments, in every process.

    Args:
      split: one of `SPLITS`.
      index: index of the task, from 0.
      types: the types of things in use; at least one is not of paper.
      max_receptacles: places to search are 3 to this many.
      num_distractors: things of other types than the wanted one; below `len(types)`.
      families: the families in use, in the order of `FAMILIES`.
    """
    rng = random.Random(_hash(f"world {split} {index}"))
    family = family_of(split, index, families)
    layouts = _layouts(max_receptacles)
    unseen = split == "test_unseen"
    goal_types = [
        t for t in types if family not in PROPERTIES or (family, MATERIALS[t]) in _FITTING
    ]
    while True:
        room = _choose(rng, _FAMILY_ROOMS[family])
        places = _choose(rng, layouts[room, unseen])
        goal_type = _choose(rng, goal_types)
        goal_place = 0 if family == "look" else int(rng.random() * len(places))
        elsewhere = [p for p in range(len(places)) if family == "look" or p != goal_place]
        count = (2 if family == "two" else 1) + (rng.random() < _SPARE_RATE)
        wanted = sorted(_choose(rng, elsewhere) for _ in range(count))
        others = _sample(rng, [t for t in types if t != goal_type], num_distractors)
        appliances = tuple(f"{appliance} 1" for appliance in _ROOMS[room][1])
        # The distractors' places are drawn anew a few times before the rest is: that is cheaper.
        for _ in range(16 if num_distractors else 1):
            lying = [(f"{goal_type} {i}", place) for i, place in enumerate(wanted, start=1)]
            lying += [(f"{other} 1", int(rng.random() * len(places))) for other in others]
            objects = tuple(sorted(lying))
            world = World(room, places, appliances, family, goal_type, goal_place, objects)
            if unseen or _seen_split(world.fingerprint) == split:
                return world


def _placements(objects: tuple[tuple[str, int], ...]) -> str:
    return ", ".join([f"{name}@{place}" for name, place in objects])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _seen_split(fingerprint: int) -> str:
    return SPLITS[fingerprint % (len(SPLITS) - 1)]


def _is_unseen(room: str, places: tuple[str, ...]) -> bool:
    return _hash(f"layout {room}: {', '.join(places)}") % 4 == 0


# rng.random() is the one draw whose sequence Python promises to keep between versions.


def _choose(rng: random.Random, options: Sequence[_Item]) -> _Item:
    return options[int(rng.random() * len(options))]


def _sample(rng: random.Random, options: list[_Item], count: int) -> list[_Item]:
    """`count` of the options, none twice; uses up the list."""
    return [options.pop(int(rng.random() * len(options))) for _ in range(count)]


@functools.lru_cache(maxsize=4096)
def _family_block(split: str, block: int, families: tuple[str, ...]) -> list[str]:
    rng = random.Random(_hash(f"families {split} {block}"))
    return _sample(rng, list(families), len(families))


@functools.cache
def _layouts(max_receptacles: int) -> dict[tuple[str, bool], list[tuple[str, ...]]]:
    """(room, unseen) → layouts: 3 to `max_receptacles` places to search, at most two of a kind."""
    layouts: dict[tuple[str, bool], list[tuple[str, ...]]] = {}
    for room, (kinds, _) in _ROOMS.items():
        for size in range(3, max_receptacles + 1):
            for chosen in itertools.combinations_with_replacement(kinds, size):
                if max(map(chosen.count, chosen)) <= 2:
                    numbers = [chosen[: i + 1].count(kind) for i, kind in enumerate(chosen)]
                    places = tuple(f"{kind} {n}" for kind, n in zip(chosen, numbers, strict=True))
                    layouts.setdefault((room, _is_unseen(room, places)), []).append(places)
    return layouts

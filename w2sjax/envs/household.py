"""A small household in text: partially observed, six task families, unlimited tasks, no dependency.

A room holds three or four places to search (some closed) and appliances. The goal asks for an object of some type,
perhaps cleaned, heated or cooled first, to be put in a named place, or to be looked at under a lamp. The task
families and the manner of the commands follow ALFWorld (arXiv 2010.03768).

What makes failures worth reading: **the right appliance depends on what a thing is made of**, nothing says so
beforehand, and a wrong choice ruins the thing for good:

  material   types (in order of use)      sink    towel   microwave             stove   fridge
  ceramic    mug, plate, bowl             clean   –       hot                   cracks  cold
  food       apple, potato, tomato        clean   –       hot; burns if hot     burns   cold
  metal      pan, pot, kettle             clean   –       sparks                hot     cold
  paper      book, newspaper, magazine    soaks   clean   burns                 burns   cold

An episode whose goal has become impossible ends at once: not a success, score 0.

Splits are disjoint by construction. Every world (layout, placements, goal) has a fingerprint, a hash of its
canonical text: the fingerprint's residue says which split may use it, and drawing goes on until it fits. The split
`test_unseen` has its own layouts (room and inventory of places), chosen by a hash of the layout, that no other
split ever uses.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

from w2sjax.envs.base import Outcome

FAMILIES = ("put", "look", "clean", "heat", "cool", "two")
SPLITS = ("pretrain", "demos", "train", "dev", "test", "test_unseen")

_NOTHING = "Nothing happens."
_MATERIALS = {  # the first `num_object_types` of these are in use
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
_CLOSED_KINDS = frozenset(("box", "cabinet", "drawer"))
_ROOMS = {  # room: (kinds of places to search, appliances)
    "kitchen": (
        ("cabinet", "counter", "drawer", "shelf", "table"),
        ("sink", "towel", "microwave", "stove", "fridge"),
    ),
    "bedroom": (("bed", "box", "desk", "drawer", "shelf"), ("sink", "towel", "lamp")),
    "studio": (
        ("box", "cabinet", "desk", "shelf", "table"),
        ("microwave", "stove", "fridge", "lamp"),
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
_TREATED = {"clean": "clean", "heat": "hot", "cool": "cold"}  # family (and verb) → property
_VERB_APPLIANCES = {
    "clean": ("sink", "towel"),
    "heat": ("microwave", "stove"),
    "cool": ("fridge",),
}
_RUIN = {  # (appliance, material) → what happens
    ("sink", "paper"): "is soaked",
    ("microwave", "metal"): "sparks",
    ("microwave", "paper"): "burns",
    ("stove", "ceramic"): "cracks",
    ("stove", "food"): "burns",
    ("stove", "paper"): "burns",
}
_HELD = -1  # where an object is when it is in the agent's hand
_INSTRUCTION = (
    "You act in a room to reach a goal. Commands: go to, open, take from, put in, put on, use, clean with, heat with, "
    "cool with, look, inventory."
)
_SPARE_RATE = 0.25  # how often there is one more object of the wanted type than needed


class World(NamedTuple):
    """One generated task, all of it. Places are numbered as they are listed, places to search first."""

    room: str
    places: tuple[str, ...]  # to search: "drawer 1", …
    appliances: tuple[str, ...]  # "sink 1", …
    family: str
    goal_type: str  # "mug"
    goal_place: int  # index into places
    objects: tuple[tuple[str, int], ...]  # (name "mug 1", index of the place where it lies)

    @property
    def layout(self) -> str:
        """The room and its inventory of places, as text."""
        return f"{self.room}: {', '.join(self.places)}"

    @property
    def canonical(self) -> str:
        """The whole world as text: equal texts are equal worlds."""
        placed = ", ".join(f"{name}@{place}" for name, place in self.objects)
        return f"{self.layout}; {self.family} {self.goal_type} {self.goal_place}; {placed}"

    @property
    def fingerprint(self) -> int:
        """A 64-bit hash of the canonical text, the same in every process."""
        return _hash(self.canonical)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _choose(rng: random.Random, options: Sequence) -> object:
    # rng.random() is the one draw whose sequence Python promises to keep between versions.
    return options[int(rng.random() * len(options))]


def _shuffled(rng: random.Random, options: Sequence) -> list:
    return sorted(options, key=lambda _: rng.random())


@functools.cache
def _layouts(max_receptacles: int) -> dict[tuple[str, bool], list[tuple[str, ...]]]:
    """(room, unseen) → layouts: 3 to `max_receptacles` places to search, at most two of a kind."""
    layouts: dict[tuple[str, bool], list[tuple[str, ...]]] = {}
    for room, (kinds, _) in _ROOMS.items():
        for size in range(3, max_receptacles + 1):
            for chosen in itertools.combinations_with_replacement(kinds, size):
                if max(map(chosen.count, chosen)) > 2:
                    continue
                places = tuple(
                    f"{kind} {chosen[:i].count(kind) + 1}" for i, kind in enumerate(chosen)
                )
                unseen = _hash(f"layout {room}: {', '.join(places)}") % 4 == 0
                layouts.setdefault((room, unseen), []).append(places)
    return layouts


def _check_int(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"env.options.{name}: expected an integer from {low} to {high}, got {value!r}"
        )
    return value


class Household:
    """The built-in environment (see the module's text). Follows `w2sjax.envs.base.Env`.

    Task ids are "household/<split>/<index>", any index from 0 on; every six consecutive ones from a multiple of
    six hold each family once. A world is a function of its task id and of the options that shape worlds.

    Observations are functions of the state. The score is the best progress over sub-goals so far: with the wanted
    thing in hand 1/2 (put, look) or 1/3, then 2/3 once treated (clean, heat, cool), in quarters for two things;
    1 at success and only there; 0 once the goal has become impossible.

    Args:
      max_steps: step limit, for whoever plays.
      num_object_types: how many types of things exist, 4 to 12.
      max_receptacles: rooms have 3 to this many places to search, 3 to 6.
      num_distractors: things of other types in the room, each of another type; below `num_object_types`.
      instruction: another system message; None for the built-in one, which lists the commands.

    Raises:
      ValueError: an option out of range; the message names it.
    """

    name = "household"

    def __init__(
        self,
        *,
        max_steps: int = 16,
        num_object_types: int = 8,
        max_receptacles: int = 4,
        num_distractors: int = 3,
        instruction: str | None = None,
    ):
        self.max_steps = _check_int("max_steps", max_steps, 1, 10_000)
        num_types = _check_int("num_object_types", num_object_types, 4, len(_MATERIALS))
        self._types = tuple(_MATERIALS)[:num_types]
        self._max_receptacles = _check_int("max_receptacles", max_receptacles, 3, 6)
        self._num_distractors = _check_int("num_distractors", num_distractors, 0, num_types - 1)
        if instruction is not None and (not isinstance(instruction, str) or not instruction):
            raise ValueError(
                f"env.options.instruction: expected a text or None, got {instruction!r}"
            )
        self.instruction = _INSTRUCTION if instruction is None else instruction
        self._world: World | None = None

    # ---------------------------------------------------------------------------------------- tasks

    def task_ids(self, split: str, count: int | None = None) -> list[str]:
        """The first `count` task ids of a split; every prefix is balanced over the six families.

        Raises:
          ValueError: unknown split; no count (every split is endless) or a negative one.
        """
        _check_split(split)
        if count is None or count < 0:
            raise ValueError(
                f"env.household: split {split!r} is endless: give a count of 0 or more, got {count}"
            )
        return [f"household/{split}/{index}" for index in range(count)]

    def world(self, task_id: str) -> World:
        """The world of a task: what the splits' disjointness can be checked on.

        Raises:
          ValueError: not a task id of this environment.
        """
        split, index = _parse_task_id(task_id)
        block = random.Random(_hash(f"families {split} {index // 6}"))
        family = _shuffled(block, FAMILIES)[index % 6]
        rng = random.Random(_hash(f"world {split} {index}"))
        unseen = split == "test_unseen"
        num_shares = len(SPLITS) - 1
        while True:
            world = self._draw(rng, family, unseen)
            if unseen or world.fingerprint % num_shares == SPLITS.index(split):
                return world

    def _draw(self, rng: random.Random, family: str, unseen: bool) -> World:
        room = _choose(rng, _FAMILY_ROOMS[family])
        places = _choose(rng, _layouts(self._max_receptacles)[room, unseen])
        types = self._types
        if family == "heat":
            types = [kind for kind in types if _MATERIALS[kind] != "paper"]
        goal_type = _choose(rng, types)
        goal_place = int(rng.random() * len(places))
        count = (2 if family == "two" else 1) + (rng.random() < _SPARE_RATE)
        elsewhere = [place for place in range(len(places)) if place != goal_place]
        lying = [(goal_type, sorted(_choose(rng, elsewhere) for _ in range(count)))]
        others = _shuffled(rng, [kind for kind in self._types if kind != goal_type])
        for kind in others[: self._num_distractors]:
            lying.append((kind, [int(rng.random() * len(places))]))
        objects = tuple(
            (f"{kind} {number}", place)
            for kind, where in sorted(lying)
            for number, place in enumerate(where, start=1)
        )
        appliances = tuple(f"{appliance} 1" for appliance in _ROOMS[room][1])
        return World(room, places, appliances, family, goal_type, goal_place, objects)

    # -------------------------------------------------------------------------------------- episode

    def reset(self, task_id: str) -> str:
        """Starts a task; returns the room, what is in it, and the goal.

        Raises:
          ValueError: not a task id of this environment.
        """
        world = self.world(task_id)
        self._world = world
        self._places = world.places + world.appliances  # one numbering for both
        self._place_index = {name: index for index, name in enumerate(self._places)}
        self._objects = tuple(name for name, _ in world.objects)
        self._object_index = {name: index for index, name in enumerate(self._objects)}
        kinds = [name.partition(" ")[0] for name in self._objects]
        self._material = [_MATERIALS[kind] for kind in kinds]
        self._wanted = [index for index, kind in enumerate(kinds) if kind == world.goal_type]
        self._needed = 2 if world.family == "two" else 1
        self._property = _TREATED.get(world.family)
        # The state.
        self._where = [place for _, place in world.objects]
        self._here: int | None = None
        self._held: int | None = None
        self._open = [name.partition(" ")[0] not in _CLOSED_KINDS for name in world.places]
        self._clean = [False] * len(kinds)
        self._heat = [""] * len(kinds)  # "", "hot" or "cold"
        self._ruined = [False] * len(kinds)
        self._score, self._done, self._success = 0.0, False, False
        self._seen = [False] * len(world.places)  # what the agent has looked into
        return f"{self._room_text()} Goal: {self._goal_text()}."

    def step(self, action: str) -> Outcome:
        """Performs one action, any text; what means nothing now is answered by "Nothing happens."

        After the end nothing happens any more. Lower and upper case and spaces do not matter.

        Raises:
          RuntimeError: no task was started.
        """
        self._check_started()
        observation = _NOTHING if self._done else self._act(action.lower().split(None, 7))
        return Outcome(observation, self._score, self._done, self._success)

    def _act(self, words: list[str]) -> str:
        match words:
            case ["go", "to", kind, number]:
                return self._go(self._place_index.get(f"{kind} {number}"))
            case ["take", kind, number, "from", place, place_number]:
                return self._take(
                    self._object_index.get(f"{kind} {number}"), f"{place} {place_number}"
                )
            case ["open", kind, number]:
                return self._open_place(f"{kind} {number}")
            case ["put", kind, number, "in" | "on" | "in/on", place, place_number]:
                return self._put(
                    self._object_index.get(f"{kind} {number}"), f"{place} {place_number}"
                )
            case ["clean" | "heat" | "cool" as verb, kind, number, "with", place, place_number]:
                thing = self._object_index.get(f"{kind} {number}")
                return self._treat(verb, thing, f"{place} {place_number}")
            case ["use", "lamp", number]:
                return self._use_lamp(f"lamp {number}")
            case ["look"]:
                if self._here is None:
                    return self._room_text()
                return f"You are at {self._places[self._here]}. {self._view()}".rstrip()
            case ["inventory"]:
                held = "nothing" if self._held is None else self._describe(self._held)
                return f"You carry {held}."
        return _NOTHING

    def _go(self, place: int | None) -> str:
        if place is None or place == self._here:
            return _NOTHING
        self._here = place
        return self._view() or f"You are at {self._places[place]}."

    def _open_place(self, name: str) -> str:
        if not self._at(name) or not self._searchable() or self._open[self._here]:
            return _NOTHING
        self._open[self._here] = True
        return self._view()

    def _take(self, thing: int | None, name: str) -> str:
        if thing is None or self._held is not None or not self._at(name) or not self._accessible():
            return _NOTHING
        if self._where[thing] != self._here:
            return _NOTHING
        self._held, self._where[thing] = thing, _HELD
        self._update_score()
        return f"You take {self._objects[thing]}."

    def _put(self, thing: int | None, name: str) -> str:
        if thing is None or thing != self._held or not self._at(name) or not self._accessible():
            return _NOTHING
        self._held, self._where[thing] = None, self._here
        self._update_score()
        text = f"You put {self._objects[thing]} {self._preposition(self._here)} {name}."
        return f"{text} The goal is reached." if self._done else text

    def _treat(self, verb: str, thing: int | None, name: str) -> str:
        appliance = name.partition(" ")[0]
        if (
            thing is None
            or thing != self._held
            or not self._at(name)
            or appliance not in _VERB_APPLIANCES[verb]
        ):
            return _NOTHING
        material, label = self._material[thing], self._objects[thing]
        if self._ruined[thing]:
            return f"{label} stays ruined."
        ruin = _RUIN.get((appliance, material))
        if verb == "heat" and material == "food" and self._heat[thing] == "hot":
            ruin = "burns"
        if ruin is not None:
            self._ruined[thing] = True
            self._update_score()
            end = " The goal is out of reach." if self._done else ""
            return f"{label} {ruin} and is ruined.{end}"
        if verb != "clean":
            self._heat[thing] = _TREATED[verb]
        elif appliance == "sink" or material == "paper":
            self._clean[thing] = True
        elif not self._clean[thing]:
            return f"{label} stays dirty."
        self._update_score()
        return f"{label} is {_TREATED[verb]}."

    def _use_lamp(self, name: str) -> str:
        if not self._at(name):
            return _NOTHING
        if self._held is None:
            return f"{name} shines."
        text = f"Under {name} you see {self._describe(self._held)}."
        if (
            self._world.family == "look"
            and self._held in self._wanted
            and not self._ruined[self._held]
        ):
            self._score, self._done, self._success = 1.0, True, True
            return f"{text} The goal is reached."
        return text

    def _update_score(self) -> None:
        """Sets score, done and success from the state, after a change to a thing."""
        usable = [thing for thing in self._wanted if not self._ruined[thing]]
        if len(usable) < self._needed:
            self._score, self._done = 0.0, True
            return
        settled = sum(self._settled(thing) for thing in usable)
        held = self._held is not None and self._held in usable
        if settled >= self._needed:
            progress = 1.0
            self._done = self._success = True
        elif self._property is None:
            progress = (settled + held / 2) / self._needed
        elif any(self._is_treated(thing) for thing in usable):
            progress = 2 / 3
        else:
            progress = held / 3
        self._score = max(self._score, progress)

    def _settled(self, thing: int) -> bool:
        """Whether a usable wanted thing is as and where the goal wants it."""
        at_goal = self._where[thing] == self._world.goal_place and self._world.family != "look"
        return at_goal and self._is_treated(thing)

    def _is_treated(self, thing: int) -> bool:
        if self._property == "clean":
            return self._clean[thing]
        return self._property is None or self._heat[thing] == self._property

    def admissible_actions(self) -> list[str]:
        """All actions that mean something now, in the form in which the expert says them, sorted.

        Raises:
          RuntimeError: no task was started.
        """
        self._check_started()
        if self._done:
            return []
        here, held = self._here, self._held
        actions = [f"go to {name}" for index, name in enumerate(self._places) if index != here]
        actions += ["inventory", "look"]
        if here is not None:
            name = self._places[here]
            if not self._searchable():
                kind = name.partition(" ")[0]
                if kind == "lamp":
                    actions.append(f"use {name}")
                elif held is not None:
                    actions += [
                        f"{verb} {self._objects[held]} with {name}"
                        for verb, appliances in _VERB_APPLIANCES.items()
                        if kind in appliances
                    ]
            elif not self._open[here]:
                actions.append(f"open {name}")
            elif held is not None:
                actions.append(self._put_action(here))
            else:
                actions += [f"take {self._objects[i]} from {name}" for i in self._lying(here)]
        return sorted(actions)

    # --------------------------------------------------------------------------------------- expert

    def expert_action(self) -> str:
        """What a careful person would do who knows materials and remembers what they saw, and nothing else.

        Search the places in the order in which they are listed, take the first wanted thing seen, treat it with
        the appliance that suits its material, bring it to where it belongs. Anything else in hand is put down.

        Raises:
          RuntimeError: no task was started.
        """
        self._check_started()
        if self._done:
            return "look"
        here, held = self._here, self._held
        if held is None:
            return self._expert_search()
        if held not in self._wanted or self._ruined[held]:
            return self._expert_put_down(here if here is not None and self._searchable() else 0)
        if self._world.family == "look":
            lamp = self._place_index["lamp 1"]
            return "use lamp 1" if here == lamp else "go to lamp 1"
        if not self._is_treated(held):
            verb, material = self._world.family, self._material[held]
            appliance = _VERB_APPLIANCES[verb][0]
            if (verb, material) in (("clean", "paper"), ("heat", "metal")):
                appliance = _VERB_APPLIANCES[verb][1]
            if not self._at(f"{appliance} 1"):
                return f"go to {appliance} 1"
            return f"{verb} {self._objects[held]} with {appliance} 1"
        return self._expert_put_down(self._world.goal_place)

    def _expert_search(self) -> str:
        here = self._here
        found = [
            thing
            for thing in self._wanted
            if not self._ruined[thing]
            and self._seen[self._where[thing]]
            and not self._settled(thing)
        ]
        if found:
            thing = next((thing for thing in found if self._where[thing] == here), found[0])
            place = self._places[self._where[thing]]
            at_hand = self._where[thing] == here
            return f"take {self._objects[thing]} from {place}" if at_hand else f"go to {place}"
        if here is not None and self._searchable() and not self._seen[here]:
            return f"open {self._places[here]}"
        # A wanted thing that was never seen lies in a place that was never looked into.
        return f"go to {self._places[self._seen.index(False)]}"

    def _expert_put_down(self, place: int) -> str:
        if self._here != place:
            return f"go to {self._places[place]}"
        return self._put_action(place) if self._open[place] else f"open {self._places[place]}"

    def close(self) -> None:
        """Nothing to free."""

    # ---------------------------------------------------------------------------------------- texts

    def _check_started(self) -> None:
        if self._world is None:
            raise RuntimeError("household: no task was started; call reset(task_id) first")

    def _searchable(self) -> bool:
        return self._here < len(self._open)

    def _accessible(self) -> bool:
        return self._here < len(self._open) and self._open[self._here]

    def _at(self, name: str) -> bool:
        return self._here is not None and self._places[self._here] == name

    def _lying(self, place: int) -> list[int]:
        return [thing for thing, where in enumerate(self._where) if where == place]

    def _view(self) -> str:
        """What is to be seen here; empty at an appliance. Marks the place as seen."""
        here = self._here
        if not self._searchable():
            return ""
        if not self._open[here]:
            return f"{self._places[here]} is closed."
        self._seen[here] = True
        lying = self._lying(here)
        return f"You see {', '.join(map(self._name, lying)) if lying else 'nothing'}."

    def _name(self, thing: int) -> str:
        return ("ruined " if self._ruined[thing] else "") + self._objects[thing]

    def _describe(self, thing: int) -> str:
        states = ("clean" if self._clean[thing] else "", self._heat[thing], self._name(thing))
        return " ".join(filter(None, states))

    def _preposition(self, place: int) -> str:
        return "in" if self._places[place].partition(" ")[0] in _CLOSED_KINDS else "on"

    def _put_action(self, place: int) -> str:
        return f"put {self._objects[self._held]} {self._preposition(place)} {self._places[place]}"

    def _room_text(self) -> str:
        return f"You are in a {self._world.room}. You see {', '.join(self._places)}."

    def _goal_text(self) -> str:
        world = self._world
        if world.family == "look":
            return f"look at one {world.goal_type} under lamp 1"
        where = f"{self._preposition(world.goal_place)} {self._places[world.goal_place]}"
        if world.family == "two":
            return f"put one {world.goal_type} and another {world.goal_type} {where}"
        state = f"{self._property} " if self._property else ""
        return f"put one {state}{world.goal_type} {where}"


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(
            f"env.household: unknown split {split!r}; the splits are {', '.join(SPLITS)}"
        )


def _parse_task_id(task_id: str) -> tuple[str, int]:
    parts = task_id.split("/")
    if (
        len(parts) != 3
        or parts[0] != "household"
        or not (parts[2].isascii() and parts[2].isdigit())
    ):
        raise ValueError(
            f"env.household: {task_id!r} is no task id; they read household/<split>/<index>"
        )
    _check_split(parts[1])
    return parts[1], int(parts[2])

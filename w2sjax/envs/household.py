"""A small household in text: partially observed, six task families, unlimited tasks.

A room holds three or four places to search (some closed) and appliances. The goal asks for a thing
of some type, perhaps cleaned, heated or cooled first, to be put in a named place, or to be looked
at under a lamp. The families and the manner of the commands follow ALFWorld (arXiv 2010.03768).

What makes failures worth reading: **the right appliance depends on what a thing is made of**,
nothing says so beforehand, and a wrong choice may ruin the thing for good:

  material  types                      sink   towel  microwave  stove   fridge  freezer
  ceramic   mug, plate, bowl           clean  –      hot        cracks  cold    cracks
  food      apple, potato, tomato      clean  –      hot (*)    burns   cold    bursts
  metal     pan, pot, kettle           clean  –      sparks     hot     –       cold
  paper     book, newspaper, magazine  soaks  clean  burns      burns   –       –

(*) Food that is hot already burns. "–": nothing changes. A ruined thing never serves any more. An
episode whose goal has become impossible ends at once: no success, score 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from w2sjax.envs.base import Outcome
from w2sjax.envs.household_worlds import (
    CLOSED_KINDS,
    FAMILIES,
    MATERIALS,
    PROPERTIES,
    RUIN,
    SPLITS,
    VERB_APPLIANCES,
    World,
    draw_world,
    fitting_appliance,
)

_NOTHING = "Nothing happens."
_HELD = -1  # where a thing is while it is in hand
_INSTRUCTION = (
    "You act in a room to reach a goal. Commands: go to, open, take from, put in, put on, use, "
    "clean with, heat with, cool with, look, inventory."
)


class Household:
    """The built-in environment (see the module's text). Follows `w2sjax.envs.base.Env`.

    Task ids are "household/<split>/<index>", with any index from 0 on; every six consecutive ones
    from a multiple of six hold each family once (every n, where n `families` are in use). A world
    is a function of its task id and of the options that shape worlds. `household_worlds.py` says
    how the splits are kept apart.

    Observations are functions of the state. The score is the best progress over sub-goals so far:
    with the wanted thing in hand 1/2 (put, look) or 1/3, then 2/3 once it is cleaned, heated or
    cooled; in quarters for two things (in hand, put, in hand, put). It is 1 at success and only
    there, and 0 once the goal has become impossible.

    Args:
      max_steps: step limit, counted by whoever plays.
      num_object_types: how many types of things there are, 4 to 12.
      max_receptacles: rooms have 3 to this many places to search, 3 to 6.
      num_distractors: things of other types in a room; less than `num_object_types`.
      families: the task families in use, some of put, look, clean, heat, cool, two.
      instruction: another system message; None for the built-in one, which lists the commands.

    Raises:
      ValueError: an option that cannot be; the message names it.
    """

    name = "household"

    def __init__(
        self,
        *,
        max_steps: int = 16,
        num_object_types: int = 8,
        max_receptacles: int = 4,
        num_distractors: int = 3,
        families: Sequence[str] = FAMILIES,
        instruction: str | None = None,
    ):
        self.max_steps = _check_int("max_steps", max_steps, 1, 10_000)
        num_types = _check_int("num_object_types", num_object_types, 4, len(MATERIALS))
        self._world_options = {
            "types": tuple(MATERIALS)[:num_types],
            "max_receptacles": _check_int("max_receptacles", max_receptacles, 3, 6),
            "num_distractors": _check_int("num_distractors", num_distractors, 0, num_types - 1),
        }
        if not families or not set(families) <= set(FAMILIES):
            raise ValueError(
                f"env.options.families: expected some of {', '.join(FAMILIES)}, got {families!r}"
            )
        self._world_options["families"] = tuple(f for f in FAMILIES if f in families)
        if instruction is not None and (not isinstance(instruction, str) or not instruction):
            raise ValueError(
                f"env.options.instruction: expected a text or None, got {instruction!r}"
            )
        self.instruction = _INSTRUCTION if instruction is None else instruction
        self._world: World | None = None

    # -------------------------------------------------------------------------------------- tasks

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
        """The whole world of a task, which an agent must not see: for tests and for analysis.

        Raises:
          ValueError: not a task id of this environment.
        """
        split, index = _parse_task_id(task_id)
        return draw_world(split, index, **self._world_options)

    # ------------------------------------------------------------------------------------ episode

    def reset(self, task_id: str) -> str:
        """Starts a task; returns the room, what is in it, and the goal.

        Raises:
          ValueError: not a task id of this environment.
        """
        world = self.world(task_id)
        self._world = world
        # Places to search first, then appliances, in one numbering; things by their own index.
        self._places = world.places + world.appliances
        self._kinds = [name.partition(" ")[0] for name in self._places]
        self._place_index = {name: index for index, name in enumerate(self._places)}
        self._objects = [name for name, _ in world.objects]
        self._object_index = {name: index for index, name in enumerate(self._objects)}
        types = [name.partition(" ")[0] for name in self._objects]
        self._material = [MATERIALS[kind] for kind in types]
        self._wanted = [index for index, kind in enumerate(types) if kind == world.goal_type]
        self._needed = 2 if world.family == "two" else 1
        self._property = PROPERTIES.get(world.family)
        # The state.
        self._here: int | None = None
        self._held: int | None = None
        self._where = [place for _, place in world.objects]
        self._open = [kind not in CLOSED_KINDS for kind in self._kinds[: len(world.places)]]
        self._clean = [False] * len(types)
        self._heat = ["warm"] * len(types)  # or "hot", "cold"
        self._ruined = [False] * len(types)
        self._score, self._done, self._success = 0.0, False, False
        # What the agent has looked into: the expert knows no more.
        self._seen = [False] * len(world.places)
        return f"{self._room_text()} Goal: {self._goal_text()}."

    def step(self, action: str) -> Outcome:
        """Performs one action, any text; what means nothing now gets "Nothing happens."

        Case and extra spaces do not matter. Nothing happens any more after the end.

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
            case ["open", kind, number]:
                return self._open_place(self._place_index.get(f"{kind} {number}"))
            case ["use", kind, number]:
                return self._use(self._place_index.get(f"{kind} {number}"))
            case ["look"]:
                return self._look()
            case ["inventory"]:
                return f"You carry {self._describe(self._held)}."
            case [verb, kind, number, preposition, place_kind, place_number]:
                thing = self._object_index.get(f"{kind} {number}")
                place = self._place_index.get(f"{place_kind} {place_number}")
                if thing is None or place is None or place != self._here:
                    return _NOTHING
                match verb, preposition:
                    case "take", "from":
                        return self._take(thing, place)
                    case "put", "in" | "on" | "in/on":
                        return self._put(thing, place)
                    case "clean" | "heat" | "cool", "with":
                        return self._treat(verb, thing, place)
        return _NOTHING

    def _go(self, place: int | None) -> str:
        if place is None or place == self._here:
            return _NOTHING
        self._here = place
        return self._view()

    def _open_place(self, place: int | None) -> str:
        if place is None or place != self._here or not self._is_closed(place):
            return _NOTHING
        self._open[place] = True
        return self._view()

    def _use(self, place: int | None) -> str:
        if place is None or place != self._here or self._kinds[place] != "lamp":
            return _NOTHING
        if self._held is None:
            return f"{self._places[place]} shines."
        wanted = self._held in self._wanted and not self._ruined[self._held]
        if wanted and self._world.family == "look":
            self._score, self._done, self._success = 1.0, True, True
        text = f"Under {self._places[place]} you see {self._describe(self._held)}."
        return f"{text} The goal is reached." if self._done else text

    def _look(self) -> str:
        if self._here is None:
            return self._room_text()
        at = f"You are at {self._places[self._here]}."
        return at if self._is_appliance(self._here) else f"{at} {self._view()}"

    def _take(self, thing: int, place: int) -> str:
        lies_open = self._where[thing] == place and not self._is_closed(place)
        if not lies_open or self._held is not None:
            return _NOTHING
        self._held, self._where[thing] = thing, _HELD
        self._update_score()
        return f"You take {self._objects[thing]}."

    def _put(self, thing: int, place: int) -> str:
        if thing != self._held or self._is_appliance(place) or self._is_closed(place):
            return _NOTHING
        self._held, self._where[thing] = None, place
        self._update_score()
        text = f"You put {self._objects[thing]} {self._in_place(place)}."
        return f"{text} The goal is reached." if self._done else text

    def _treat(self, verb: str, thing: int, place: int) -> str:
        appliance = self._kinds[place]
        if thing != self._held or appliance not in VERB_APPLIANCES[verb]:
            return _NOTHING
        material, name = self._material[thing], self._objects[thing]
        if self._ruined[thing]:
            return f"{name} stays ruined."
        ruin = RUIN.get((appliance, material))
        if verb == "heat" and material == "food" and self._heat[thing] == "hot":
            ruin = "burns"
        if ruin is not None:
            self._ruined[thing] = True
            self._update_score()
            text = f"{name} {ruin} and is ruined."
            return f"{text} The goal is out of reach." if self._done else text
        if appliance != fitting_appliance(verb, material):
            dirt = "clean" if self._clean[thing] else "dirty"
            return f"{name} stays {dirt if verb == 'clean' else self._heat[thing]}."
        if verb == "clean":
            self._clean[thing] = True
        else:
            self._heat[thing] = PROPERTIES[verb]
        self._update_score()
        return f"{name} is {PROPERTIES[verb]}."

    def _update_score(self) -> None:
        """Sets score, done and success from the state, after something happened to a thing."""
        usable = [thing for thing in self._wanted if not self._ruined[thing]]
        if len(usable) < self._needed:
            self._score, self._done = 0.0, True
            return
        settled = sum(map(self._is_settled, usable))
        held = self._held in usable
        if settled >= self._needed:
            progress = 1.0
            self._done = self._success = True
        elif self._property is None:
            progress = (settled + held / 2) / self._needed
        else:
            progress = 2 / 3 if any(map(self._is_treated, usable)) else held / 3
        self._score = max(self._score, progress)

    def _is_treated(self, thing: int) -> bool:
        if self._property == "clean":
            return self._clean[thing]
        return self._property is None or self._heat[thing] == self._property

    def _is_settled(self, thing: int) -> bool:
        """Whether a wanted thing is as and where the goal wants it."""
        if self._world.family == "look":
            return False
        return self._where[thing] == self._world.goal_place and self._is_treated(thing)

    def admissible_actions(self) -> list[str]:
        """All actions that mean something now, in the words that the expert uses, sorted.

        Empty after the end of the episode.

        Raises:
          RuntimeError: no task was started.
        """
        self._check_started()
        if self._done:
            return []
        here, held = self._here, self._held
        actions = [f"go to {name}" for index, name in enumerate(self._places) if index != here]
        actions += ["inventory", "look"]
        if here is None:
            return sorted(actions)
        name, kind = self._places[here], self._kinds[here]
        if kind == "lamp":
            actions.append(f"use {name}")
        elif self._is_appliance(here):
            if held is not None:
                verbs = [verb for verb, kinds in VERB_APPLIANCES.items() if kind in kinds]
                actions += [f"{verb} {self._objects[held]} with {name}" for verb in verbs]
        elif self._is_closed(here):
            actions.append(f"open {name}")
        elif held is not None:
            actions.append(f"put {self._objects[held]} {self._in_place(here)}")
        else:
            actions += [f"take {self._objects[thing]} from {name}" for thing in self._lying(here)]
        return sorted(actions)

    # ------------------------------------------------------------------------------------- expert

    def expert_action(self) -> str:
        """What a careful person would do, who knows materials and remembers what they saw.

        Search the places as they are listed, take the first wanted thing seen, treat it with the
        appliance that suits its material, bring it to where it belongs. Anything else in hand is
        put down. Nothing that was not observed is used; "look" after the end.

        Raises:
          RuntimeError: no task was started.
        """
        self._check_started()
        held = self._held
        if self._done:
            return "look"
        if held is None:
            return self._expert_search()
        if held not in self._wanted or self._ruined[held]:
            at_place = self._here is not None and not self._is_appliance(self._here)
            return self._expert_put(self._here if at_place else 0)
        if self._world.family == "look":
            return self._expert_at("lamp 1") or "use lamp 1"
        if self._is_treated(held):
            return self._expert_put(self._world.goal_place)
        verb = self._world.family
        appliance = f"{fitting_appliance(verb, self._material[held])} 1"
        return self._expert_at(appliance) or f"{verb} {self._objects[held]} with {appliance}"

    def _expert_search(self) -> str:
        here = self._here
        known = [
            thing
            for thing in self._wanted
            if self._seen[self._where[thing]]
            and not self._ruined[thing]
            and not self._is_settled(thing)
        ]
        if known:
            thing = next((thing for thing in known if self._where[thing] == here), known[0])
            place = self._places[self._where[thing]]
            return self._expert_at(place) or f"take {self._objects[thing]} from {place}"
        if here is not None and not self._is_appliance(here) and not self._seen[here]:
            return f"open {self._places[here]}"
        # There is such a place: a wanted thing not yet seen lies in it.
        return f"go to {self._places[self._seen.index(False)]}"

    def _expert_put(self, place: int) -> str:
        name = self._places[place]
        at = self._expert_at(name)
        if at is None and self._is_closed(place):
            return f"open {name}"
        return at or f"put {self._objects[self._held]} {self._in_place(place)}"

    def _expert_at(self, name: str) -> str | None:
        """The way to a place; None once there."""
        return None if self._here == self._place_index[name] else f"go to {name}"

    def close(self) -> None:
        """Nothing to free."""

    # -------------------------------------------------------------------------------------- texts

    def _check_started(self) -> None:
        if self._world is None:
            raise RuntimeError("household: no task was started; call reset(task_id) first")

    def _is_appliance(self, place: int) -> bool:
        return place >= len(self._open)

    def _is_closed(self, place: int) -> bool:
        return place < len(self._open) and not self._open[place]

    def _lying(self, place: int) -> list[int]:
        return [thing for thing, where in enumerate(self._where) if where == place]

    def _view(self) -> str:
        """What is to be seen here; what was seen is remembered for the expert."""
        place = self._here
        if self._is_appliance(place):
            return f"You are at {self._places[place]}."
        if self._is_closed(place):
            return f"{self._places[place]} is closed."
        self._seen[place] = True
        return f"You see {', '.join(map(self._label, self._lying(place))) or 'nothing'}."

    def _label(self, thing: int) -> str:
        return f"ruined {self._objects[thing]}" if self._ruined[thing] else self._objects[thing]

    def _describe(self, thing: int | None) -> str:
        if thing is None:
            return "nothing"
        clean = "clean " if self._clean[thing] else ""
        heat = "" if self._heat[thing] == "warm" else f"{self._heat[thing]} "
        return f"{clean}{heat}{self._label(thing)}"

    def _in_place(self, place: int) -> str:
        preposition = "in" if self._kinds[place] in CLOSED_KINDS else "on"
        return f"{preposition} {self._places[place]}"

    def _room_text(self) -> str:
        return f"You are in a {self._world.room}. You see {', '.join(self._places)}."

    def _goal_text(self) -> str:
        world = self._world
        if world.family == "look":
            return f"look at one {world.goal_type} under lamp 1"
        state = f"{self._property} " if self._property else ""
        another = f" and another {world.goal_type}" if world.family == "two" else ""
        return f"put one {state}{world.goal_type}{another} {self._in_place(world.goal_place)}"


def _check_int(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"env.options.{name}: expected an integer from {low} to {high}, got {value!r}"
        )
    return value


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(
            f"env.household: unknown split {split!r}; the splits are {', '.join(SPLITS)}"
        )


def _parse_task_id(task_id: str) -> tuple[str, int]:
    name, _, rest = task_id.partition("/")
    split, _, index = rest.partition("/")
    if name != "household" or not (index.isascii() and index.isdigit()) or len(index) > 18:
        raise ValueError(
            f"env.household: {task_id!r} is no task id; they read household/<split>/<index>"
        )
    _check_split(split)
    return split, int(index)

"""The real engine of ALFWorld: TextWorld's PDDL environment, one game at a time, made fast.

`Engine` is alfworld's own stack (TextWorld's `PddlEnv`, names as alfworld's `AlfredDemangler` gives
them) without textworld.gym. The package's code costs about 60 ms a step and 1 s a game, nearly all
of it for parsing the same expressions again, copying what is only read, and translating the same
PDDL problem several times. `alfworld_patches.py` says what is done about that.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from typing import Any

from w2sjax.envs.alfworld_patches import patched, small_library

NOTHING = "Nothing happens."
_WELCOME = "-= Welcome to TextWorld, ALFRED! =-"
_FIELDS = ("pddl_domain", "grammar", "pddl_problem")

_idle: list[Engine] = []  # engines without an owner: each holds a library that is never unloaded
_lock = threading.Lock()


class Engine:
    """One game at a time on alfworld's stack.

    Args:
      fast: False leaves the packages' code as it is, for comparison.
    """

    def __init__(self, fast: bool = True):
        check_packages()
        textworld = importlib.import_module("textworld")
        with patched(fast), small_library(fast):
            self._env = textworld.envs.pddl.PddlEnv(textworld.EnvInfos())
        self._fast = fast
        self._state: Any = None

    @classmethod
    def take(cls) -> Engine:
        """An engine that nobody uses, or a new one; `give` returns it."""
        with _lock:
            if _idle:
                return _idle.pop()
        return cls()

    def give(self) -> None:
        """Keeps the engine for who takes one next."""
        self._state = None
        with _lock:
            _idle.append(self)

    def start(self, game: Mapping[str, Any]) -> str:
        """Loads a game (the content of a game.tw-pddl) and returns its first observation.

        Raises:
          ValueError: the engine cannot load it; the message says why.
        """
        for field in _FIELDS:
            if not isinstance(game.get(field), str):
                raise ValueError(f"the game has no text {field!r}")
        demangler = importlib.import_module("alfworld.agents.utils.misc").Demangler
        self._state = None
        try:
            with patched(self._fast):
                self._env.load({field: game[field] for field in _FIELDS})
                infos = self._env._entity_infos
                names = demangler(game_infos=infos)
                for info in infos.values():
                    info.name = names.demangle_alfred_name(info.id)
                self._state = self._env.reset()
        except Exception as error:  # the parsers raise whatever they meet
            raise ValueError(
                f"the engine cannot load the game: {type(error).__name__}: {str(error)[:500]}"
            ) from error
        return self._text()

    def step(self, command: str) -> str:
        """Performs one of `commands`, and returns what is to be seen."""
        with patched(self._fast):
            self._state, _, _ = self._env.step(command)
        return self._text()

    def _text(self) -> str:
        text = self._state.feedback.replace(_WELCOME, "", 1)  # only the first one begins with it
        lines = (line.rstrip() for line in text.splitlines())
        return "\n".join(line for line in lines if line)

    @property
    def commands(self) -> list[str]:
        """What can be done now, in the engine's words, sorted."""
        return [command.strip() for command in self._state["admissible_commands"]]

    @property
    def won(self) -> bool:
        """Whether the goal is reached."""
        return bool(self._state["won"])

    def facts(self) -> set[tuple[str, ...]]:
        """All that holds now: (predicate, id, …), in lower case."""
        return {
            (fact.name, *(variable.name for variable in fact.arguments))
            for fact in self._state["_facts"]
        }

    def named_facts(self) -> list[Any]:
        """The same as the package's propositions, with names instead of ids."""
        return [self._env._get_human_readable_fact(fact) for fact in self._state["_facts"]]

    def name(self, identifier: str) -> str:
        """What the game calls a thing or a receptacle, by its id."""
        return self._state["_entity_infos"][identifier].name.strip()


def check_packages() -> None:
    """Imports what the engine needs.

    Raises:
      ImportError: something is missing; the message says how to install it.
    """
    try:
        importlib.import_module("textworld.envs.pddl")
        importlib.import_module("fast_downward")
        importlib.import_module("alfworld.agents.utils.misc")
    except ImportError as error:
        raise ImportError(
            "alfworld needs the packages alfworld and textworld: pip install -e '.[alfworld]' "
            f"({error})"
        ) from error

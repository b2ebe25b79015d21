"""The protocol that every environment follows, and the registry of their names.

An environment is a plain Python object with one task at a time. It counts nothing and parses
nothing: step limits are counted by whoever plays, and `step` takes an action, not a model's answer.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the environment says after an action."""

    observation: str
    score: float  # the environment's own score so far, in [0, 1]
    done: bool  # the environment ended the episode
    success: bool  # the environment's own verdict


@runtime_checkable
class Env(Protocol):
    """A text environment.

    Attributes:
      name: the registered name.
      instruction: one short text that tells an agent what it can say; the system message of every
        episode.
      max_steps: step limit of the task that was reset last.
    """

    name: str
    instruction: str
    max_steps: int

    def task_ids(self, split: str, count: int | None = None) -> Sequence[str]:
        """The first `count` task ids of a split (all, where None and the split is finite).

        They come in a fixed order that is shuffled once and for all, so that any prefix is a fair
        sample of the split.

        Raises:
          ValueError: unknown split, or fewer than `count` tasks in it; the message names both
            numbers.
        """

    def reset(self, task_id: str) -> str:
        """Starts a task and returns the first observation, the goal included."""

    def step(self, action: str) -> Outcome:
        """Performs one action. Any text is accepted: nonsense gets an observation that says so."""

    def admissible_actions(self) -> list[str]:
        """Actions that mean something now, sorted."""

    def expert_action(self) -> str:
        """The expert's next action in the current state, also after actions of others."""

    def close(self) -> None:
        """Frees what the environment holds; may be called twice."""


# Name → "module:class". Modules are imported on first use, so that optional packages stay optional.
ENVIRONMENTS: Mapping[str, str] = {
    "alfworld": "w2sjax.envs.alfworld:ALFWorld",
    "gymnasium": "w2sjax.envs.gymnasium_import:GymnasiumText",
    "household": "w2sjax.envs.household:Household",
    "scienceworld": "w2sjax.envs.scienceworld:ScienceWorld",
    "textworld_express": "w2sjax.envs.textworld_express:TextWorldExpress",
    "webshop": "w2sjax.envs.webshop:WebShop",
}


def make_env(name: str, **options: Any) -> Env:
    """Makes an environment by its registered name, or from any class that follows `Env`.

    Args:
      name: a key of `ENVIRONMENTS`, or "module:Class" for an environment of your own. The module
        must be importable wherever the environment is made, worker processes included.
      **options: keyword arguments of the environment's class.

    Raises:
      ValueError: unknown name, no such module or class, or an option that the environment does not
        have.
    """
    target = ENVIRONMENTS.get(name, name)
    module, _, class_name = target.partition(":")
    if not module or not class_name:
        known = ", ".join(sorted(ENVIRONMENTS))
        raise ValueError(
            f"env.name: unknown environment {name!r}; known: {known}; your own: module:Class"
        )
    try:
        cls = getattr(importlib.import_module(module), class_name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"env.name: cannot import {target!r}: {error}") from error
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        raise ValueError(f"env.options: {name} cannot be made with {options!r}: {error}") from error
    return cls(**options)

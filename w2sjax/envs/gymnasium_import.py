"""Any Gymnasium environment with text observations and actions, as one of ours.

Needs the extra `gymnasium`. Task ids are seeds: "gymnasium/<seed>"; splits are ranges of seeds. The
environment must be a function of its seed and the actions, as Gymnasium asks for; its package must
be importable in worker processes.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

from w2sjax.envs.base import Outcome

_DEFAULT_SPLITS = {
    "pretrain": (0, 100_000),
    "demos": (100_000, 200_000),
    "train": (200_000, 300_000),
    "dev": (300_000, 400_000),
    "test": (400_000, 500_000),
}
_INSTRUCTION = "Say one action per turn, as a line of text."
_OUTSIDE = "This is no action here."
_ROUNDING = 1e-9
_END = 2**32  # seeds are below


class GymnasiumText:
    """A Gymnasium environment that speaks text. Follows `w2sjax.envs.base.Env`.

    Gymnasium has no score, no success, no expert and no list of actions: options say which of its
    numbers are meant. Where an info value is missing after some step, the last one stays.

    Without `expert_key` there is no expert: `expert_action` raises NotImplementedError, so that
    demonstrations and players of mixed skill cannot be made of it, but rollouts, search and
    evaluation can. Without `admissible_key` the list of admissible actions is empty, and a random
    player has no random actions.

    A step that the environment itself truncates exactly at the step limit is left to whoever counts
    steps; truncated earlier, the episode ends there.

    Args:
      id: a registered id as `gymnasium.make` takes it, "module:Name-v0" included. Its time limit
        becomes `max_steps`.
      factory: instead of `id`: "module:Class" or "module:function", called with `kwargs`.
      kwargs: keyword arguments of the environment.
      max_steps: step limit; None for the id's own limit, or else the environment's attribute
        `max_steps` or the info's value of that name.
      splits: name → (first seed, seed after the last); they must not overlap.
      observation_key: the entry of a Dict observation that is the text; "" where observations are
        texts.
      score: "return" (the sum of rewards), "reward" (the last one) or "info:KEY".
      score_range: what of it is score 0 and score 1; between is linear, beyond is cut off.
      success: "score" (the score is 1), "terminated", or "info:KEY".
      admissible_key: name of an info value with a list of actions; "" where there is none.
      expert_key: name of an info value with the expert's next action; "" where there is none.
      check_actions: answer actions outside the action space without asking the environment;
        False lets it have any text.
      instruction: the system message; None for the environment's attribute `instruction`, or a
        general one.

    Raises:
      ImportError: Gymnasium is missing. ValueError: an impossible option; the message names it.

    Example:
      env = make_env("gymnasium", factory="my_games:TextMaze", max_steps=30, score_range=(0, 100))
    """

    name = "gymnasium"

    def __init__(
        self,
        *,
        id: str = "",
        factory: str = "",
        kwargs: Mapping[str, Any] | None = None,
        max_steps: int | None = None,
        splits: Mapping[str, tuple[int, int]] | None = None,
        observation_key: str = "",
        score: str = "return",
        score_range: tuple[float, float] = (0.0, 1.0),
        success: str = "score",
        admissible_key: str = "",
        expert_key: str = "",
        check_actions: bool = True,
        instruction: str | None = None,
    ):
        self._splits = _checked_splits(_DEFAULT_SPLITS if splits is None else splits)
        self._score_from = _source("score", score, ("return", "reward"))
        self._success_from = _source("success", success, ("score", "terminated"))
        low, high = score_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(
                f"env.options.score_range: expected two finite numbers, the lower one first, got "
                f"{score_range!r}"
            )
        self._score_range = (float(low), float(high))
        is_int = isinstance(max_steps, int) and not isinstance(max_steps, bool)
        if max_steps is not None and (not is_int or max_steps < 1):
            raise ValueError(
                f"env.options.max_steps: expected a positive integer or None, got {max_steps!r}"
            )
        self._key, self._admissible_key, self._expert_key = (
            observation_key,
            admissible_key,
            expert_key,
        )
        self._check_actions = check_actions
        self._env, limit = _make(id, factory, dict(kwargs or {}))
        self._limit = limit if max_steps is None else max_steps
        self.max_steps = self._limit or getattr(self._env.unwrapped, "max_steps", 0)
        self._check_spaces()
        if instruction is None:
            instruction = getattr(self._env.unwrapped, "instruction", _INSTRUCTION)
        self.instruction = instruction
        self._started = False

    def task_ids(self, split: str, count: int | None = None) -> list[str]:
        """The first `count` seeds of a split as task ids, ascending.

        Raises:
          ValueError: unknown split, or more tasks than there are.
        """
        if split not in self._splits:
            raise ValueError(
                f"env.gymnasium: unknown split {split!r}; the splits are {', '.join(self._splits)}"
            )
        first, end = self._splits[split]
        if count is not None and not 0 <= count <= end - first:
            raise ValueError(
                f"env.gymnasium: {count} tasks of split {split!r} asked for, but its seeds are "
                f"{first} to {end - 1}, {end - first} in all"
            )
        return [f"gymnasium/{s}" for s in range(first, end if count is None else first + count)]

    def reset(self, task_id: str) -> str:
        """Resets the environment with the task's seed; returns its first observation.

        Raises:
          ValueError: not a task id of this environment, or no step limit is known.
          TypeError: the observation is no text.
        """
        observation, info = self._env.reset(seed=_parse_seed(task_id))
        self.max_steps = self._limit or info.get("max_steps", self.max_steps)
        if not self.max_steps:
            raise ValueError("env.options.max_steps: this environment says no step limit; give one")
        self._started, self._done, self._steps = True, False, 0
        self._return, self._last = 0.0, Outcome("", 0.0, False, False)
        self._raw_score, self._raw_success = self._score_range[0], False
        self._actions: list[str] = []
        self._expert = ""
        self._read(info, None)
        return self._text(observation)

    def step(self, action: str) -> Outcome:
        """Performs one action; after the end, and outside the action space, nothing happens.

        Raises:
          RuntimeError: no task was started.
          TypeError, ValueError: the environment's observation is no text, or a value of its info is
            not what the options say.
        """
        self._check_started()
        last = self._last
        if self._done:
            return Outcome("The task is over.", last.score, True, last.success)
        self._steps += 1
        if self._check_actions and action not in self._env.action_space:
            self._last = Outcome(_OUTSIDE, last.score, False, last.success)
            return self._last
        observation, reward, terminated, truncated, info = self._env.step(action)
        self._return += float(reward)
        self._read(info, float(reward))
        low, high = self._score_range
        score = min(1.0, max(0.0, (self._raw_score - low) / (high - low)))
        if score > 1.0 - _ROUNDING:  # rewards that add up to 1, but for rounding
            score = 1.0
        success = {"score": score == 1.0, "terminated": bool(terminated)}.get(
            self._success_from, self._raw_success
        )
        self._done = bool(terminated or (truncated and self._steps < self.max_steps))
        self._last = Outcome(self._text(observation), score, self._done, success)
        return self._last

    def admissible_actions(self) -> list[str]:
        """What the info value named by `admissible_key` listed last, sorted; else nothing.

        Raises:
          RuntimeError: no task was started.
        """
        self._check_started()
        return [] if self._done else sorted(self._actions)

    def expert_action(self) -> str:
        """The info value named by `expert_key`.

        Raises:
          NotImplementedError: there is no such value.
          RuntimeError: no task was started.
        """
        self._check_started()
        if not self._expert:
            wanted = f"no value {self._expert_key!r} in its info" if self._expert_key else "none"
            raise NotImplementedError(
                f"env.gymnasium: an expert's action was asked for, but this environment has "
                f"{wanted}. Demonstrations and players of mixed skill need one: name the info "
                "value that holds it in env.options.expert_key"
            )
        return self._expert

    def close(self) -> None:
        """Closes the environment."""
        self._env.close()

    # ------------------------------------------------------------------------------- what it says

    def _read(self, info: Mapping[str, Any], reward: float | None) -> None:
        """Takes what the options name from an info; `reward` is None at the start."""
        if self._score_from == "return":
            self._raw_score = self._return
        elif self._score_from == "reward":
            self._raw_score = self._raw_score if reward is None else reward
        elif self._score_from in info:
            value = info[self._score_from]
            try:
                self._raw_score = float(value)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"env.options.score: info[{self._score_from!r}] is no number: {value!r:.80}"
                ) from error
        if not math.isfinite(self._raw_score):
            raise ValueError(f"env.options.score: {self._score_from} is {self._raw_score}")
        self._raw_success = bool(info.get(self._success_from, self._raw_success))
        if self._admissible_key:
            self._actions = [str(action) for action in info.get(self._admissible_key, ())]
        if self._expert_key:
            self._expert = str(info.get(self._expert_key, ""))

    def _text(self, observation: Any) -> str:
        if self._key:
            observation = observation[self._key]
        if not isinstance(observation, str):
            raise TypeError(
                f"env.gymnasium: expected a text as observation, got {type(observation).__name__}: "
                f"{observation!r:.80}"
            )
        return observation

    def _check_started(self) -> None:
        if not self._started:
            raise RuntimeError("gymnasium: no task was started; call reset(task_id) first")

    def _check_spaces(self) -> None:
        from gymnasium import spaces

        observations = self._env.observation_space
        if self._key:
            if not isinstance(observations, spaces.Dict) or self._key not in observations.spaces:
                raise ValueError(
                    f"env.options.observation_key: no entry {self._key!r} in {observations}"
                )
            observations = observations[self._key]
        for what, space in (("observation", observations), ("action", self._env.action_space)):
            if not isinstance(space, spaces.Text):
                raise ValueError(
                    f"env.options: this environment's {what} space is {space!r:.200}, but only "
                    "text environments can be used: gymnasium.spaces.Text, or a Dict with one and "
                    "env.options.observation_key"
                )


def _make(id: str, factory: str, kwargs: dict[str, Any]) -> tuple[Any, int | None]:
    """The environment, and the step limit that is registered for it."""
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError(
            "gymnasium: the package is not installed; run pip install -e '.[gymnasium]'"
        ) from error
    if bool(id) == bool(factory):
        raise ValueError(
            f"env.options: give one of id and factory, got id={id!r} and factory={factory!r}"
        )
    if id:
        try:
            # −1: no TimeLimit around it, since whoever plays counts the steps.
            env = gymnasium.make(id, max_episode_steps=-1, disable_env_checker=True, **kwargs)
            return env, gymnasium.spec(id.rpartition(":")[2]).max_episode_steps
        except (gymnasium.error.Error, ModuleNotFoundError, TypeError) as error:
            raise ValueError(f"env.options.id: cannot make {id!r}: {error}") from error
    module, _, name = factory.partition(":")
    try:
        env = getattr(importlib.import_module(module), name)(**kwargs)
    except (ModuleNotFoundError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"env.options.factory: cannot make {factory!r} with {kwargs!r}: {error}"
        ) from error
    if not isinstance(env, gymnasium.Env):
        raise ValueError(
            f"env.options.factory: {factory!r} made a {type(env).__name__}, not a gymnasium.Env"
        )
    return env, None


def _source(option: str, value: str, known: tuple[str, ...]) -> str:
    """One of the known words, or the key behind "info:"."""
    kind, _, key = value.partition(":")
    if value in known:
        return value
    if kind == "info" and key and key not in known:
        return key
    raise ValueError(
        f"env.options.{option}: expected {', '.join(known)} or info:KEY, got {value!r}"
    )


def _checked_splits(splits: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    checked: dict[str, tuple[int, int]] = {}
    for split, (first, end) in splits.items():
        if not 0 <= first < end <= _END:
            raise ValueError(
                f"env.options.splits: {split!r}: expected a first seed of 0 or more and a larger "
                f"end, got {(first, end)}"
            )
        for other, (other_first, other_end) in checked.items():
            if first < other_end and other_first < end:
                raise ValueError(f"env.options.splits: {other!r} and {split!r} share seeds")
        checked[split] = (int(first), int(end))
    if not checked:
        raise ValueError("env.options.splits: no split")
    return checked


def _parse_seed(task_id: str) -> int:
    name, _, seed = task_id.partition("/")
    if name != "gymnasium" or not (seed.isascii() and seed.isdigit()) or len(seed) > 10:
        raise ValueError(
            f"env.gymnasium: {task_id[:200]!r} is no task id; they read gymnasium/<seed>"
        )
    return int(seed)

"""Any of our environments as a Gymnasium environment with text spaces.

Needs the extra `gymnasium`. The way back, Gymnasium environments as ours, is
`gymnasium_import.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from w2sjax.envs.base import Env, make_env

try:
    import gymnasium
except ImportError as error:
    raise ImportError(
        "gymnasium: the package is not installed; run pip install -e '.[gymnasium]'"
    ) from error

# What texts may be made of: tab, line ends, ASCII, Latin letters, punctuation, currencies, arrows,
# mathematical signs; and the sign that stands for any other character.
_RANGES = ((9, 11), (13, 14), (32, 127), (160, 384), (0x2010, 0x2060), (0x20A0, 0x20C1))
_RANGES += ((0x2190, 0x2300),)
REPLACEMENT = "\ufffd"
CHARSET = "".join(chr(code) for low, high in _RANGES for code in range(low, high)) + REPLACEMENT
ON_REQUEST = ("admissible_actions", "expert_action")


class TextEnv(gymnasium.Env[str, str]):
    """An environment of this package, as Gymnasium wants it.

    Observations and actions are strings in `gymnasium.spaces.Text`. The reward of a step is the
    change of the environment's score, so that an episode's rewards add up to its final score (where
    a task starts with a score above 0, the first reward includes it). `terminated` says that the
    environment ended the episode, `truncated` that the task's step limit is reached.

    `reset(seed=...)` draws a task from the split by the seed, `reset(options={"task_id": ...})`
    starts that one, `reset()` draws the next. The info holds `task_id`, `steps`, `max_steps`,
    `score` and `success`, with the numbers `replaced_characters` and `cut_characters` of what the
    observation space could not hold of the last observation, and what `extra_info` asks for.

    In a `gymnasium.vector.AsyncVectorEnv` pass `shared_memory=False`: Gymnasium fills texts in
    shared memory up to their largest length.

    Args:
      env: a registered name, "module:Class", or an environment.
      options: of the environment's class, where a name is given.
      split: where tasks are drawn from.
      num_tasks: how many of its tasks, from its start; None for all of a finite split.
      extra_info: some of "admissible_actions" (a list) and "expert_action" (a text), which cost
        time; left out after the end of an episode.
      charset: the characters of both spaces; others in observations are replaced by the last.
      max_observation_length: characters; a longer observation is cut.
      max_action_length: characters, of the action space; `step` takes any text all the same.
      render_mode: None, or "ansi" for the last observation.

    Raises:
      ValueError: an impossible argument, or what the environment raises for its own.

    Example:
      env = TextEnv("household", split="train", num_tasks=100)
      observation, info = env.reset(seed=0)
      observation, reward, terminated, truncated, info = env.step("look")
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(
        self,
        env: str | Env = "household",
        *,
        options: Mapping[str, Any] | None = None,
        split: str = "train",
        num_tasks: int | None = 100,
        extra_info: Sequence[str] = (),
        charset: str = CHARSET,
        max_observation_length: int = 16_384,
        max_action_length: int = 512,
        render_mode: str | None = None,
    ):
        if set(extra_info) - set(ON_REQUEST) or isinstance(extra_info, str):
            raise ValueError(f"extra_info: expected some of {ON_REQUEST}, got {extra_info!r}")
        if render_mode not in (None, "ansi"):
            raise ValueError(f"render_mode: expected None or 'ansi', got {render_mode!r}")
        if not isinstance(env, str) and options is not None:
            raise ValueError("options: they go with an environment's name, not with an environment")
        self._env = make_env(env, **(options or {})) if isinstance(env, str) else env
        self._tasks = list(self._env.task_ids(split, num_tasks))
        if not self._tasks:
            raise ValueError(f"num_tasks: no task in split {split!r} to draw from")
        self._extra_info = tuple(extra_info)
        self._filler = charset[-1]
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Text(
            max_observation_length, min_length=0, charset=charset
        )
        self.action_space = gymnasium.spaces.Text(max_action_length, min_length=0, charset=charset)
        self._task_id: str | None = None
        self._steps, self._score, self._success, self._done = 0, 0.0, False, False
        self._text = ""
        self._unfit = (0, 0)

    @property
    def instruction(self) -> str:
        """What an agent can say; the environment's system message."""
        return self._env.instruction

    @property
    def max_steps(self) -> int:
        """Step limit of the current task."""
        return self._env.max_steps

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Starts a task; see the class.

        Raises:
          ValueError: an option other than `task_id`, or an unknown task.
        """
        super().reset(seed=seed)
        options = options or {}
        if set(options) - {"task_id"}:
            raise ValueError(f"options: known is 'task_id', got {sorted(options)}")
        if "task_id" in options:
            task_id = options["task_id"]
        else:
            task_id = self._tasks[int(self.np_random.integers(len(self._tasks)))]
        first_observation = self._env.reset(task_id)
        self._task_id, self._steps = task_id, 0
        self._score, self._success, self._done = 0.0, False, False
        return self._fitted(first_observation), self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Performs one action; see the class.

        Raises:
          RuntimeError: no task was started.
        """
        if self._task_id is None:
            raise RuntimeError("TextEnv: no task was started; call reset first")
        outcome = self._env.step(action)
        self._steps += 1
        reward = outcome.score - self._score
        self._score, self._success, self._done = outcome.score, outcome.success, outcome.done
        truncated = not outcome.done and self._steps >= self._env.max_steps
        text = self._fitted(outcome.observation)
        return text, float(reward), bool(outcome.done), truncated, self._info()

    def render(self) -> str | None:
        return self._text if self.render_mode == "ansi" else None

    def close(self) -> None:
        self._env.close()

    def _info(self) -> dict[str, Any]:
        info = {
            "task_id": self._task_id,
            "steps": self._steps,
            "max_steps": self._env.max_steps,
            "score": float(self._score),
            "success": bool(self._success),
            "replaced_characters": self._unfit[0],
            "cut_characters": self._unfit[1],
        }
        if not self._done:
            if "admissible_actions" in self._extra_info:
                info["admissible_actions"] = list(self._env.admissible_actions())
            if "expert_action" in self._extra_info:
                info["expert_action"] = self._env.expert_action()
        return info

    def _fitted(self, text: str) -> str:
        """The text as the observation space can hold it; counts what it cannot."""
        known, limit = self.observation_space.character_set, self.observation_space.max_length
        kept = text[:limit]
        unknown = set(kept) - known
        replaced = sum(map(kept.count, unknown))
        self._unfit = (replaced, len(text) - len(kept))
        self._text = kept.translate({ord(char): self._filler for char in unknown})
        return self._text

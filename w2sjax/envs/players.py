"""Whole episodes played by an environment's own expert, with as many random steps as wanted.

With rate 0 these are expert demonstrations; rates between 0 and 1 give players of mixed skill, rate
1 random play.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random

from w2sjax.envs.base import Env
from w2sjax.records import Status


@dataclasses.dataclass(frozen=True)
class PlayedEpisode:
    """What was said and seen in one episode: pure text, no chat format.

    `actions`, `observations` (what followed each action) and `scores` (the score after each action,
    in [0, 1]) have one entry per step.
    """

    task_id: str
    instruction: str
    first_observation: str
    actions: tuple[str, ...]
    observations: tuple[str, ...]
    scores: tuple[float, ...]
    status: Status  # SUCCESS, FAILED or STEP_LIMIT
    score: float  # at the end


def play(env: Env, task_id: str, *, random_action_rate: float, seed: int) -> PlayedEpisode:
    """Plays one episode until the environment ends it or its step limit is reached.

    Args:
      env: any environment; its current task is given up.
      task_id: the task to play.
      random_action_rate: at each step the probability, in [0, 1], of a random action instead of the
        expert's: a uniform draw from all that was admissible at some step of the episode so far. It
        may make no sense any more, so that what follows such a slip is on record, too.
      seed: the episode is a function of the task, the rate and the seed.

    Returns:
      The episode.

    Raises:
      ValueError: a rate outside [0, 1]; what `env.reset` raises for an unknown task.
    """
    if not 0.0 <= random_action_rate <= 1.0:
        raise ValueError(f"random_action_rate: expected 0 to 1, got {random_action_rate!r}")
    key = hashlib.blake2b(f"{task_id}|{float(random_action_rate)!r}|{seed}".encode()).digest()
    rng = random.Random(int.from_bytes(key[:8], "big"))
    first_observation = env.reset(task_id)
    actions: list[str] = []
    observations: list[str] = []
    scores: list[float] = []
    status = Status.STEP_LIMIT
    known: set[str] = set()
    for _ in range(env.max_steps):
        if random_action_rate > 0:
            known.update(env.admissible_actions())
        if rng.random() < random_action_rate and known:
            action = sorted(known)[int(rng.random() * len(known))]
        else:
            action = env.expert_action()
        outcome = env.step(action)
        actions.append(action)
        observations.append(outcome.observation)
        scores.append(outcome.score)
        if outcome.done:
            status = Status.SUCCESS if outcome.success else Status.FAILED
            break
    return PlayedEpisode(
        task_id=task_id,
        instruction=env.instruction,
        first_observation=first_observation,
        actions=tuple(actions),
        observations=tuple(observations),
        scores=tuple(scores),
        status=status,
        score=scores[-1] if scores else 0.0,
    )

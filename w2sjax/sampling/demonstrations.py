"""Episodes that an environment's own expert plays, as trajectories."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from w2sjax.chat import format_answer
from w2sjax.envs import EnvFailure, EnvPool, PlayedEpisode, PlayRequest
from w2sjax.types import Status, Step, Trajectory


def play_episodes(
    pool: EnvPool,
    requests: Sequence[PlayRequest],
    *,
    env_name: str,
    policy_name: str,
    progress: Callable[[int, int], None] | None = None,
) -> list[Trajectory]:
    """Lets the pool's workers play whole episodes and writes them as an agent's answers.

    Args:
      pool: environments; episodes under way in it are given up.
      requests: task, rate of random actions and seed of each episode.
      env_name: recorded in the trajectories.
      policy_name: recorded in the trajectories, such as "expert" or "player".
      progress: called with (finished, requested) after every episode.

    Returns:
      One trajectory per request, in their order, whichever came first. `rollout` counts the
      requests of the same task before it. An episode whose environment broke has the status
      env_error, says what broke in `error`, and has no steps.

    Raises:
      ValueError: an expert's action that no answer can hold (several lines).
    """
    seen: collections.Counter[str] = collections.Counter()
    rollouts = []
    for request in requests:
        rollouts.append(seen[request.task_id])
        seen[request.task_id] += 1
    episodes: list[Trajectory | None] = [None] * len(requests)
    for done, (index, played) in enumerate(pool.play(requests), start=1):
        episodes[index] = _trajectory(
            requests[index], rollouts[index], played, env_name=env_name, policy_name=policy_name
        )
        if progress is not None:
            progress(done, len(requests))
    return [episode for episode in episodes if episode is not None]


def _trajectory(
    request: PlayRequest,
    rollout: int,
    played: PlayedEpisode | EnvFailure,
    *,
    env_name: str,
    policy_name: str,
) -> Trajectory:
    failed = isinstance(played, EnvFailure)
    steps = []
    if not failed:
        before = (0.0, *played.scores)
        for t, (action, observation) in enumerate(
            zip(played.actions, played.observations, strict=True)
        ):
            reward = played.scores[t] - before[t]
            steps.append(Step(format_answer(action), action, observation, reward))
    return Trajectory(
        task_id=request.task_id,
        rollout=rollout,
        env=env_name,
        policy=policy_name,
        seed=request.seed,
        instruction="" if failed else played.instruction,
        first_observation="" if failed else played.first_observation,
        steps=tuple(steps),
        status=Status.ENV_ERROR if failed else played.status,
        score=0.0 if failed else played.score,
        error=played.message if failed else "",
    )

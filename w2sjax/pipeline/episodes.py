"""Stages that make episodes: an environment's own players, and models that act. Each fills a file
and reports how it went.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from w2sjax.chat import ChatTemplate
from w2sjax.envs import EnvPool, PlayRequest
from w2sjax.pipeline.manifests import Stage
from w2sjax.report import progress_bar
from w2sjax.sampling import (
    CollectStats,
    EpisodeRequest,
    Sampler,
    SamplerSettings,
    TrajectoryWriter,
    collect,
    make_sampler,
    play_episodes,
    read_trajectories,
)
from w2sjax.types import Policy, Trajectory

EPISODES = "episodes.jsonl"
_PLAYED_BLOCK = 256  # episodes of an environment's own players per block


def read_episodes(stage: Stage) -> list[Trajectory]:
    """All episodes of a finished stage, in their canonical order."""
    return read_trajectories(stage.directory / EPISODES)


class Episodes:
    """The environments and the samplers that stages share."""

    def __init__(self, config: ml_collections.ConfigDict):
        self.config = config
        self._pools: dict[int, EnvPool] = {}
        self._samplers: dict[tuple, Sampler] = {}

    @contextlib.contextmanager
    def pool(self, *, slots: int) -> Iterator[EnvPool]:
        """The environments of one stage. They stay open for the stages after it, since starting
        some (a JVM each, cold) takes longer than a stage; what breaks in a stage closes them."""
        if slots not in self._pools:
            env = self.config.env
            self._pools[slots] = EnvPool(
                env.name,
                dict(env.options),
                num_slots=slots,
                num_workers=env.workers,
                timeout_s=env.timeout_s,
                max_restarts=env.max_restarts,
            )
        try:
            yield self._pools[slots]
        except BaseException:
            self._pools.pop(slots).close()
            raise

    def close(self) -> None:
        """Ends the environments' processes."""
        while self._pools:
            self._pools.popitem()[1].close()

    def play(
        self,
        directory: Path,
        pool: EnvPool,
        requests: Sequence[PlayRequest],
        *,
        policy_name: str,
    ) -> dict[str, Any]:
        """Writes whole episodes of the environment's expert, with as many random steps as
        wanted.
        """

        def play_block(block: Sequence[PlayRequest], done: int) -> list[Trajectory]:
            episodes = play_episodes(
                pool,
                block,
                env_name=self.config.env.name,
                policy_name=policy_name,
                progress=lambda count, _: update(done + count, ""),
            )
            numbers = _rollout_numbers(requests)[done:]
            return [
                dataclasses.replace(episode, rollout=number)
                for episode, number in zip(episodes, numbers, strict=False)
            ]

        with progress_bar(f"episodes, {policy_name}", len(requests), "episodes") as update:
            episodes = _in_blocks(directory / EPISODES, requests, _PLAYED_BLOCK, play_block)
        return _episode_facts(episodes)

    def sample(
        self,
        directory: Path,
        title: str,
        template: ChatTemplate,
        policy: Policy,
        params: Any,
        pool: EnvPool,
        requests: Sequence[EpisodeRequest],
        *,
        temperature: float,
        top_p: float,
        policy_name: str,
        seed: int,
    ) -> dict[str, Any]:
        """Lets a model act, block by block of requests.

        A block is sampled whole: which episodes run side by side decides the last bits of the
        logits, so an interrupted run repeats the block that it was cut in, and ends with the same
        episodes as one that was not. The file is in the order of `requests`.
        """
        c = self.config
        path = directory / EPISODES
        key = (policy, temperature, top_p)
        if key not in self._samplers:
            self._samplers[key] = make_sampler(
                policy,
                SamplerSettings(
                    max_length=c.models.max_length,
                    max_new_tokens=c.rollouts.max_new_tokens,
                    stop_ids=template.stop_ids,
                    temperature=temperature,
                    top_p=top_p,
                ),
                num_slots=c.sampler.slots,
            )
        total = CollectStats()

        def sample_block(block: Sequence[EpisodeRequest], done: int) -> list[Trajectory]:
            episodes: list[Trajectory] = []
            stats = collect(
                self._samplers[key],
                params,
                template,
                pool,
                block,
                env_name=c.env.name,
                policy_name=policy_name,
                seed=seed,
                on_done=episodes.append,
                progress=lambda count, _, stats: update(done + count, _share_text(stats)),
            )
            _add_stats(total, stats)
            return episodes

        with progress_bar(title, len(requests), "episodes") as update:
            episodes = _in_blocks(path, requests, c.sampler.block, sample_block)
        return _episode_facts(episodes) | {"sampling": _sampling_facts(total)}


def _episode_facts(episodes: Sequence[Trajectory]) -> dict[str, Any]:
    """Counts that go into a stage's manifest."""
    scored = [t for t in episodes if t.status.scored]
    count = max(1, len(scored))
    return {
        "episodes": len(episodes),
        "statuses": dict(Counter(t.status.value for t in episodes)),
        "unscored": len(episodes) - len(scored),
        "success": round(sum(t.success for t in scored) / count, 4),
        "reward": round(sum(t.score for t in scored) / count, 4),
        "mean_steps": round(sum(len(t.steps) for t in scored) / count, 2),
        "malformed_answers": sum(step.action is None for t in scored for step in t.steps),
    }


def _in_blocks(path: Path, requests: Sequence, size: int, make: Callable) -> list[Trajectory]:
    """Fills a file of episodes block by block; whole blocks that are there are kept.

    Args:
      path: the file.
      requests: what is asked for; several of one `task_id` are its rollouts in their order.
      size: requests per block.
      make: (block of requests, number of episodes before it) → their episodes, in any order.

    Returns:
      All episodes, in the order of `requests`.
    """
    numbers = _rollout_numbers(requests)
    order = {
        (request.task_id, number): index
        for index, (request, number) in enumerate(zip(requests, numbers, strict=True))
    }
    there = read_trajectories(path, allow_torn_tail=True) if path.exists() else []
    whole = len(there) if len(there) == len(requests) else len(there) // size * size
    episodes = there[:whole]
    _write_episodes(path, episodes)
    with TrajectoryWriter(path) as out:
        for start in range(whole, len(requests), size):
            block = make(requests[start : start + size], start)
            for episode in sorted(block, key=lambda t: order[t.task_id, t.rollout]):
                out.write(episode)
                episodes.append(episode)
    return episodes


def _rollout_numbers(requests: Sequence) -> list[int]:
    """How many requests of the same task come before each one."""
    seen: Counter[str] = Counter()
    numbers = []
    for request in requests:
        numbers.append(seen[request.task_id])
        seen[request.task_id] += 1
    return numbers


def _write_episodes(path: Path, episodes: Sequence[Trajectory]) -> None:
    """Replaces a file of episodes, so that a reader sees the old or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with TrajectoryWriter(temporary) as out:
        for episode in episodes:
            out.write(episode)
    os.replace(temporary, path)


def _add_stats(total: CollectStats, block: CollectStats) -> None:
    for field in dataclasses.fields(CollectStats):
        setattr(total, field.name, getattr(total, field.name) + getattr(block, field.name))


def _sampling_facts(stats: CollectStats) -> dict[str, Any]:
    """How the sampling went; blocks that an interrupted run had sampled before are not in."""
    return {
        "episodes": stats.episodes,
        "episodes_per_second": round(stats.episodes / max(stats.seconds, 1e-9), 2),
        "sampled_tokens": stats.sampled_tokens,
        "model_seconds": round(stats.model_seconds, 2),
        "env_seconds": round(stats.env_seconds, 2),
        "slot_use": round(stats.turns / max(1, stats.slot_rounds), 3),
    }


def _share_text(stats: CollectStats) -> str:
    seconds = max(stats.seconds, 1e-9)
    return (
        f"{stats.sampled_tokens / seconds:.0f} tokens/s, "
        f"model {stats.model_seconds / seconds:.0%}, environment {stats.env_seconds / seconds:.0%}"
    )

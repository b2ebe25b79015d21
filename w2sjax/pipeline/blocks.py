"""The files of a stage that makes episodes: blocks that appear whole, and what they are joined to.

Each episode of the block under way is written down as it ends (but in a bucket, where nothing can
be appended to a file), so that a stage that was cut off makes only what is missing.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from w2sjax.pipeline.manifests import Stage
from w2sjax.pipeline.storage import entries, in_bucket, write_whole
from w2sjax.sampling import (
    EpisodeRequest,
    TrajectoryFileError,
    TrajectoryWriter,
    dump_trajectories,
    read_trajectories,
)
from w2sjax.types import Trajectory

EPISODES = "episodes.jsonl"
BLOCK = "episodes.{:06d}.jsonl"  # what it is joined from
_BLOCKS = "episodes.*.jsonl"
_UNFINISHED = ".unfinished"  # of a block under way, its episodes as they ended


def read_episodes(stage: Stage) -> list[Trajectory]:
    """All episodes of a finished stage, in their canonical order."""
    return read_trajectories(stage.directory / EPISODES)


def read_blocks(
    directory: epath.Path, requests: Sequence[EpisodeRequest], size: int, first_block: int
) -> list[Trajectory] | None:
    """The episodes that were asked for, in that order; None while a block is not there whole.

    Args:
      directory: of the stage.
      requests, first_block: as for `Episodes.sample`.
      size: requests per block.
    """
    episodes: list[Trajectory] = []
    for number, start in enumerate(range(0, len(requests), size), start=first_block):
        block = _read(directory / BLOCK.format(number))
        wanted = [(r.task_id, r.rollout) for r in requests[start : start + size]]
        if block is None or _ids(block) != wanted:
            return None
        episodes += block
    return episodes


def joined_episodes(directory: epath.Path) -> list[Trajectory] | None:
    """What `join_episodes` wrote, in a run that was then cut off; None if it did not get as far."""
    return _read(directory / EPISODES)


def join_episodes(
    directory: epath.Path, shares: Sequence[Mapping[str, Any]], *, by_task: bool = False
) -> dict[str, Any]:
    """Joins the blocks of all processes into one file, in the order of the requests.

    Args:
      directory: of the stage, all blocks in it.
      shares: what `Episodes.play` or `Episodes.sample` returned in each process.
      by_task: puts all rollouts of a task together, in their order.

    Returns:
      Facts for the stage's manifest.
    """
    joined = directory / EPISODES
    blocks = [directory / BLOCK.format(number) for number in range(shares[0]["blocks"])]
    if not shares[0]["joined"]:  # else an earlier run got as far
        if by_task:
            episodes = [episode for block in blocks for episode in read_trajectories(block)]
            place = {task: i for i, task in enumerate(dict.fromkeys(t.task_id for t in episodes))}
            episodes.sort(key=lambda t: (place[t.task_id], t.rollout))
            write_whole(joined, dump_trajectories(episodes))
        else:
            write_whole(joined, b"".join(block.read_bytes() for block in blocks))
    facts = episode_facts(read_trajectories(joined))
    for path in entries(directory):
        if path.match(_BLOCKS) or path.suffix == _UNFINISHED:
            path.unlink(missing_ok=True)
    if "sampling" in shares[0]:
        facts["sampling"] = _sampling_facts([share["sampling"] for share in shares])
    return facts


def given_episodes(path: str | os.PathLike[str], held_out: Sequence[str]) -> list[Trajectory]:
    """Episodes from elsewhere, for training: without token ids, which may be another tokenizer's.

    Args:
      path: a file of episodes.
      held_out: tasks of the evaluation.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, or one with a task of the evaluation.
    """
    episodes = read_trajectories(path)
    if seen := {episode.task_id for episode in episodes} & set(held_out):
        raise ValueError(
            f"config.rollouts.path: {path} has {len(seen)} of the {len(held_out)} tasks that the "
            f"evaluation holds out, such as {min(seen)!r}; take them out of the file, or choose "
            "another config.tasks.held_out_split"
        )
    return list(map(without_ids, episodes))


def without_ids(episode: Trajectory) -> Trajectory:
    """The episode without the token ids of its answers and their log-probabilities."""
    steps = (dataclasses.replace(s, answer_ids=None, answer_logp=None) for s in episode.steps)
    return dataclasses.replace(episode, steps=tuple(steps))


def write_episodes(directory: epath.Path, episodes: Sequence[Trajectory]) -> dict[str, Any]:
    """Writes a stage's episodes at once; returns facts for its manifest."""
    write_whole(directory / EPISODES, dump_trajectories(episodes))
    return episode_facts(episodes)


class UnfinishedBlock:
    """The episodes of a block under way: kept in memory and, but for buckets, on disk.

    Attributes:
      have: those that are there, of a run that was cut off too.
    """

    def __init__(self, path: epath.Path, wanted: Sequence[tuple[str, int]]):
        self.have: dict[tuple[str, int], Trajectory] = {}
        self._path, self._wanted, self._writer = path, wanted, None
        if in_bucket(path):
            return
        log = path.with_suffix(_UNFINISHED)
        self._writer = TrajectoryWriter(log)  # cuts a torn line off
        try:
            found = read_trajectories(log)
        except TrajectoryFileError as error:
            self._writer.close()
            raise ValueError(
                f"{error}; or delete the file: its episodes are then sampled anew"
            ) from error
        have = dict(zip(_ids(found), found, strict=True))
        self.have = {key: have[key] for key in wanted if key in have}

    def add(self, episode: Trajectory) -> None:
        """Keeps an episode that ended."""
        if self._writer is not None:
            self._writer.write(episode)
        self.have[episode.task_id, episode.rollout] = episode

    def finish(self) -> None:
        """Writes the block, in the order of its requests, and deletes what was written down."""
        write_whole(self._path, dump_trajectories(self.have[key] for key in self._wanted))
        if self._writer is not None:
            self._writer.close()
            self._writer.path.unlink()

    def __enter__(self) -> UnfinishedBlock:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None:
            self._writer.close()


def sampled_tokens(episodes: Sequence[Trajectory]) -> int:
    """Tokens that a policy sampled for these episodes; replayed steps cost none."""
    own = (step.answer_ids or () for t in episodes for step in t.steps[t.start :])
    return sum(map(len, own))


def episode_facts(episodes: Sequence[Trajectory]) -> dict[str, Any]:
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
        "malformed_answers": sum(s.action is None for t in scored for s in t.steps[t.start :]),
        "sampled_tokens": sampled_tokens(episodes),
    }


def _sampling_facts(shares: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """How the sampling went in all processes; blocks that an interrupted run had sampled before are
    not in.
    """

    def total(name: str) -> float:
        return sum(share[name] for share in shares)

    rates = (share["episodes"] / max(share["seconds"], 1e-9) for share in shares)
    return {
        "episodes": total("episodes"),
        "episodes_per_second": round(sum(rates), 2),
        "sampled_tokens": total("sampled_tokens"),
        "model_seconds": round(total("model_seconds"), 2),
        "env_seconds": round(total("env_seconds"), 2),
        "slot_use": round(total("speaking") / max(1, total("slot_steps")), 3),
        "repeated": total("repeated"),
    }


def ids_in(path: epath.Path) -> list[tuple[str, int]] | None:
    """(task, rollout) of each episode of a file; None where it is not there whole."""
    episodes = _read(path)
    return None if episodes is None else _ids(episodes)


def _read(path: epath.Path) -> list[Trajectory] | None:
    """The episodes of a file; None where it is not there whole."""
    try:
        return read_trajectories(path)
    except (FileNotFoundError, TrajectoryFileError):
        return None


def _ids(episodes: Sequence[Trajectory]) -> list[tuple[str, int]]:
    return [(episode.task_id, episode.rollout) for episode in episodes]

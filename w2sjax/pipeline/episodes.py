"""Stages that make episodes: an environment's own players, and models that act.

A stage is made in blocks of requests, each a file that appears whole. Of several processes, each
makes its own blocks (block b is that of process b mod n) in its own environments and on its own
devices; at the end the first process joins all blocks into one file. So the episodes do not depend
on how many processes there are, and a stage that was cut off goes on with however many there are.
Each episode of the block under way is written down as it ends, and not made again either (in a
bucket, where nothing can be appended to a file, such a block is repeated).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh

from w2sjax import batches, parallel, report, train
from w2sjax.chat import ChatTemplate
from w2sjax.envs import EnvPool, PlayRequest
from w2sjax.pipeline.manifests import Stage
from w2sjax.pipeline.processes import Processes
from w2sjax.pipeline.storage import entries, in_bucket, write_whole
from w2sjax.sampling import (
    CollectStats,
    EpisodeRequest,
    Sampler,
    SamplerSettings,
    TrajectoryFileError,
    TrajectoryWriter,
    collect,
    collect_choosing,
    dump_trajectories,
    make_sampler,
    play_episodes,
    read_trajectories,
)
from w2sjax.types import Policy, Trajectory

_OnDone = Callable[[Trajectory], None]
_Progress = Callable[[int, str], None]  # (episodes so far, a note)

EPISODES = "episodes.jsonl"
_BLOCK = "episodes.{:06d}.jsonl"  # what it is joined from
_BLOCKS = "episodes.*.jsonl"
_UNFINISHED = ".unfinished"  # of a block under way, its episodes as they ended
_PLAYED_BLOCK = 32  # episodes of an environment's own players per block; they depend on no other


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
        block = _read(directory / _BLOCK.format(number))
        wanted = [(r.task_id, r.rollout) for r in requests[start : start + size]]
        if _ids(block) != wanted:
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
    blocks = [directory / _BLOCK.format(number) for number in range(shares[0]["blocks"])]
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


class Episodes:
    """The environments and the samplers that the stages of one process share."""

    def __init__(self, config: ml_collections.ConfigDict, processes: Processes):
        self.config = config
        self._processes = processes
        self._pools: dict[int, EnvPool] = {}
        self._samplers: dict[tuple, Sampler] = {}
        self._scorers: dict[Policy, train.SequenceScorer] = {}

    @contextlib.contextmanager
    def pool(self, *, slots: int) -> Iterator[EnvPool]:
        """The environments of one stage. They stay open for the stages after it, since starting
        some (a JVM each, cold) takes longer than a stage; what breaks in a stage closes them."""
        if slots not in self._pools:
            env = self.config.env
            self._pools[slots] = EnvPool(
                env.name,
                env.options.to_dict(),
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
        directory: epath.Path,
        pool: EnvPool,
        requests: Sequence[PlayRequest],
        *,
        policy_name: str,
    ) -> dict[str, Any]:
        """Writes this process's blocks of whole episodes of the environment's expert, with as many
        random steps as wanted.

        Returns:
          This process's share, for `join_episodes`.
        """
        numbers = _rollout_numbers(requests)

        def play_block(wanted: Sequence[int], on_done: _OnDone, progress: _Progress) -> None:
            episodes = play_episodes(
                pool,
                [requests[index] for index in wanted],
                env_name=self.config.env.name,
                policy_name=policy_name,
                progress=lambda count, _: progress(count, ""),
            )
            for index, episode in zip(wanted, episodes, strict=True):
                on_done(dataclasses.replace(episode, rollout=numbers[index]))

        title = f"episodes, {policy_name}"
        return self._in_blocks(directory, title, requests, _PLAYED_BLOCK, play_block)

    def sample(
        self,
        directory: epath.Path,
        title: str,
        template: ChatTemplate,
        policy: Policy,
        params: Any,
        pool: EnvPool,
        requests: Sequence[EpisodeRequest],
        *,
        draws: Mapping[str, float],
        policy_name: str,
        seed: int,
        first_block: int = 0,
    ) -> dict[str, Any]:
        """Lets a model act, in this process's blocks of requests.

        An episode does not depend on those beside it, up to the last bits of its logits: a run that
        was interrupted samples what is missing, and ends with the same episodes as one that was not
        (how rarely rounding moves a token: BUILD_NOTES.md, "draws" under Sampling).

        Args:
          directory: of the stage.
          title: of the progress bar.
          template, policy, params: who acts.
          pool: where.
          requests: all that is asked for; of a stage that asks several times, rollouts not asked
            for before.
          draws: how tokens are drawn: the temperature and the filters of `SamplerSettings`.
          policy_name, seed: recorded in the episodes.
          first_block: number of blocks that the stage asked for before.

        Returns:
          This process's share, for `join_episodes`.
        """
        c = self.config
        key = (policy, *sorted(draws.items()))
        if key not in self._samplers:
            self._samplers[key] = make_sampler(
                policy,
                SamplerSettings(
                    max_length=c.models.max_length,
                    max_new_tokens=c.rollouts.max_new_tokens,
                    stop_ids=template.stop_ids,
                    stop_sequences=tuple(map(template.encode_text, c.rollouts.stop)),
                    **draws,
                ),
                num_slots=c.sampler.slots,
            )
        play = collect
        if c.sampler.actions == "admissible":
            play = functools.partial(collect_choosing, score=self._action_scores(policy))
        total = CollectStats()

        def sample_block(wanted: Sequence[int], on_done: _OnDone, progress: _Progress) -> None:
            with jax.set_mesh(self._mesh()):  # slots are split over it, as rows are in training
                stats = play(
                    self._samplers[key],
                    params,
                    template,
                    pool,
                    [requests[index] for index in wanted],
                    env_name=c.env.name,
                    policy_name=policy_name,
                    seed=seed,
                    on_done=on_done,
                    progress=lambda count, _, stats: progress(count, _share_text(stats)),
                    # Environments of this process answer at once: there is nothing to wait for.
                    patience=None if c.env.workers else c.sampler.slots,
                )
            _add_stats(total, stats)

        share = self._in_blocks(
            directory,
            title,
            requests,
            c.sampler.block,
            sample_block,
            numbers=[request.rollout for request in requests],
            first_block=first_block,
        )
        numbers = {f.name: getattr(total, f.name) for f in dataclasses.fields(total)}
        del numbers["statuses"]
        return share | {"sampling": numbers | {"episodes": total.episodes}}

    def _mesh(self) -> Mesh:
        """The part of the mesh on which this process acts."""
        return parallel.local_mesh(parallel.make_mesh(**self.config.mesh))

    def _action_scores(self, policy: Policy) -> Callable[..., list]:
        """What `collect_choosing` scores answers with: what they share, the episode so far and the
        instruction, is computed once."""
        c = self.config
        if policy not in self._scorers:
            mesh = self._mesh()
            self._scorers[policy] = train.make_sequence_scorer(
                policy.score_fn,
                rows_per_batch=mesh.shape["data"] * mesh.shape["fsdp"],
                row_length=max(batches.round_length(c.models.max_length), 1024),
                mesh=mesh,
            )

        def score(params: Any, contexts: Sequence, answers: Sequence) -> list:
            sequences = [
                batches.Sequence(
                    np.array([*context, *answer], np.int32),
                    np.arange(len(context) + len(answer)) >= len(context),
                )
                for context, offered in zip(contexts, answers, strict=True)
                for answer in offered
            ]
            scores = self._scorers[policy](params, sequences)
            return np.split(scores, np.cumsum([len(offered) for offered in answers])[:-1])

        return score

    def _in_blocks(
        self,
        directory: epath.Path,
        title: str,
        requests: Sequence,
        size: int,
        make: Callable[[Sequence[int], _OnDone, _Progress], None],
        *,
        numbers: Sequence[int] | None = None,
        first_block: int = 0,
    ) -> dict[str, Any]:
        """Writes this process's blocks of requests; those that are there are kept.

        Args:
          directory: of the stage.
          title: of the progress bar.
          requests: all that is asked for.
          size: requests per block.
          make: (indices of requests of one block, on_done, progress) → None; it tells of each
            episode as it ends, in any order.
          numbers: which rollout of its task each request is; several of one `task_id` are its
            rollouts in their order where None.
          first_block: number of the first block.

        Returns:
          How many blocks there are, and whether they have been joined before.
        """
        processes = self._processes
        numbers = _rollout_numbers(requests) if numbers is None else numbers
        ids = [(r.task_id, n) for r, n in zip(requests, numbers, strict=True)]
        starts = range(0, len(requests), size)
        share = {"blocks": len(starts), "joined": _ids(_read(directory / EPISODES)) == ids}
        if share["joined"] or not ids:
            return share
        if len(starts) < processes.count:
            report.CONSOLE.print(
                f"  {title}: {len(starts)} of {processes.count} processes have a block of {size}",
                markup=False,
            )
        own = starts[processes.index :: processes.count]
        done, total = 0, sum(len(requests[start : start + size]) for start in own)
        with report.progress_bar(title, total, "episodes") as update:
            for start in own:
                path = directory / _BLOCK.format(first_block + start // size)
                wanted = ids[start : start + size]
                if _ids(_read(path)) != wanted:
                    processes.check()
                    with _UnfinishedBlock(path, wanted) as block:
                        left = [start + i for i, id_ in enumerate(wanted) if id_ not in block.have]
                        there = done + len(wanted) - len(left)
                        if left:
                            make(
                                left,
                                block.add,
                                lambda n, note, there=there: update(there + n, note),
                            )
                        block.finish()
                done += len(wanted)
        return share


class _UnfinishedBlock:
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
        self.have = {key: t for key, t in zip(_ids(found), found, strict=True) if key in wanted}

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

    def __enter__(self) -> _UnfinishedBlock:
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


def _read(path: epath.Path) -> list[Trajectory] | None:
    """The episodes of a file; None where it is not there whole."""
    try:
        return read_trajectories(path)
    except (FileNotFoundError, TrajectoryFileError):
        return None


def _ids(episodes: Sequence[Trajectory] | None) -> list[tuple[str, int]] | None:
    return None if episodes is None else [(t.task_id, t.rollout) for t in episodes]


def _rollout_numbers(requests: Sequence) -> list[int]:
    """How many requests of the same task come before each one."""
    seen: Counter[str] = Counter()
    numbers = []
    for request in requests:
        numbers.append(seen[request.task_id])
        seen[request.task_id] += 1
    return numbers


def _add_stats(total: CollectStats, block: CollectStats) -> None:
    for field in dataclasses.fields(CollectStats):
        setattr(total, field.name, getattr(total, field.name) + getattr(block, field.name))


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


def _share_text(stats: CollectStats) -> str:
    seconds = max(stats.seconds, 1e-9)
    return (
        f"{stats.sampled_tokens / seconds:.0f} tokens/s, "
        f"model {stats.model_seconds / seconds:.0%}, environment {stats.env_seconds / seconds:.0%}"
    )

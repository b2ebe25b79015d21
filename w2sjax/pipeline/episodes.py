"""Stages that make episodes: an environment's own players, and models that act.

A stage is made in blocks of requests, each a file that appears whole. Of several processes, each
makes its own blocks (block b is that of process b mod n) in its own environments and on its own
devices; at the end the first process joins all blocks into one file. So the episodes do not depend
on how many processes there are, and a stage that was cut off goes on with however many there are.
Of the block under way each episode that has ended is kept too (`pipeline.blocks`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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
from w2sjax.pipeline.blocks import BLOCK, EPISODES, UnfinishedBlock, ids_in
from w2sjax.pipeline.processes import Processes
from w2sjax.sampling import (
    CollectStats,
    EpisodeRequest,
    Sampler,
    SamplerSettings,
    collect,
    collect_choosing,
    make_sampler,
    play_episodes,
)
from w2sjax.types import Policy, Trajectory

_OnDone = Callable[[Trajectory], None]
_Progress = Callable[[int, str], None]  # (episodes so far, a note)

_PLAYED_BLOCK = 32  # episodes of an environment's own players per block; they depend on no other


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
        share = {
            "blocks": len(starts),
            "joined": ids_in(directory / EPISODES) == ids,
        }
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
                path = directory / BLOCK.format(first_block + start // size)
                wanted = ids[start : start + size]
                if ids_in(path) != wanted:
                    processes.check()
                    with UnfinishedBlock(path, wanted) as block:
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


def _share_text(stats: CollectStats) -> str:
    seconds = max(stats.seconds, 1e-9)
    return (
        f"{stats.sampled_tokens / seconds:.0f} tokens/s, "
        f"model {stats.model_seconds / seconds:.0%}, environment {stats.env_seconds / seconds:.0%}"
    )

"""Rollouts in rounds: what is sampled next depends on what came before.

With `rollouts.branching` later rollouts go on from nodes of the trees of all rounds before; with
`rollouts.stop_after` tasks that have succeeded so often get no more, and the others their share.

A round is a number of blocks like any (see `episodes`), made by all processes. The next one is a
function of the episodes of all rounds before, which each process waits for and reads.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from w2sjax import search
from w2sjax.pipeline.blocks import (
    EPISODES,
    episode_facts,
    join_episodes,
    joined_episodes,
    read_blocks,
    sampled_tokens,
)
from w2sjax.pipeline.forest import build_forest
from w2sjax.pipeline.processes import Processes
from w2sjax.sampling import NOT_DETERMINISTIC, EpisodeRequest, read_trajectories
from w2sjax.types import Step, Trajectory

_MOST = 4  # times per_task, rollouts of a task in all: short ones cost next to nothing
_STEPS = 8  # trees are padded to multiples of this, and to powers of two of rollouts


def in_rounds(settings: ml_collections.ConfigDict) -> bool:
    """Whether config.rollouts asks for more than so many rollouts of each task, all at once."""
    return settings.branching != "none" or settings.stop_after > 0


def sample_rounds(
    directory: epath.Path,
    tasks: Sequence[str],
    sample: Callable[..., dict[str, Any]],
    config: ml_collections.ConfigDict,
    processes: Processes,
) -> dict[str, Any]:
    """Samples all rounds, this process its own blocks of each.

    Args:
      directory: of the stage.
      tasks: what is played.
      sample: (requests, title, first_block=…) → a share; `Episodes.sample` with all else given.
      config: of the run.
      processes: those that share the blocks.

    Returns:
      This process's share, for `join_rounds`.

    Raises:
      ValueError: most replays of a round went otherwise than the episode that they repeat.
    """
    if joined_episodes(directory) is not None:
        return sample([], "", first_block=0) | {"joined": True}
    done: list[Trajectory] = []
    shares: list[dict[str, Any]] = []
    requests, is_last = _first_round(tasks, config.rollouts)
    while requests:
        first = sum(share["blocks"] for share in shares)
        title = f"weak rollouts, round {len(shares) + 1}"
        shares.append(sample(requests, title, first_block=first))
        find = functools.partial(read_blocks, directory, requests, config.sampler.block, first)
        made = processes.wait(find)
        _check_replays(made, config.env.name)
        done += made
        requests = []
        if not is_last:
            requests, is_last = next_round(
                done, tasks, config.rollouts, merge_on=config.trees.merge_on
            )
    sampling = Counter()
    for share in shares:
        sampling.update(share["sampling"])
    return {
        "blocks": sum(share["blocks"] for share in shares),
        "joined": False,
        "sampling": dict(sampling),
    }


def join_rounds(
    directory: epath.Path,
    shares: Sequence[Mapping[str, Any]],
    *,
    settings: ml_collections.ConfigDict,
) -> dict[str, Any]:
    """Joins all rounds into one file, task by task; arguments as for `join_episodes`.

    Args:
      directory: of the stage.
      shares: what `sample_rounds` returned in each process.
      settings: config.rollouts.

    Returns:
      Facts for the stage's manifest: those of all rollouts, under `root` those of the ones that say
      how the policy plays, and under `branching` what the others were.
    """
    facts = join_episodes(directory, shares, by_task=True)
    episodes = read_trajectories(directory / EPISODES)
    root = [t for t in episodes if t.rollout < settings.root_rollouts]
    others = [t for t in episodes if t.rollout >= settings.root_rollouts]
    starts = [t.start for t in others]
    facts["root"] = episode_facts(root)
    facts["branching"] = {
        "rollouts": len(others),
        "from_the_root": sum(start == 0 for start in starts),
        "mean_start": round(float(np.mean(starts)), 2) if starts else None,
        "sampled_tokens": sampled_tokens(others),
        "token_budget": _token_budget(root, settings),
        "not_deterministic": sum(map(_differed, others)),
    }
    return facts


def next_round(
    done: Sequence[Trajectory],
    tasks: Sequence[str],
    settings: ml_collections.ConfigDict,
    *,
    merge_on: str,
) -> tuple[list[EpisodeRequest], bool]:
    """What to sample after some rounds.

    Every task that goes on gets `per_round` rollouts, as long as the budget lasts by what rollouts
    of the last round cost; what is left then goes to the first tasks, and the round is the last.

    Args:
      done: all episodes so far, round by round.
      tasks: what is played.
      settings: config.rollouts.
      merge_on: see `trees.StepInterner`.

    Returns:
      The requests, and whether there will be no more.
    """
    number = Counter(t.task_id for t in done)
    successes = Counter(t.task_id for t in done if t.success)
    most = settings.per_task * (1 if settings.budget == "rollouts" else _MOST)
    tasks = [
        task
        for task in tasks
        if number[task] < most and not 0 < settings.stop_after <= successes[task]
    ]
    if not tasks:
        return [], True
    limits = [sum(most - number[task] for task in tasks)]
    if settings.budget == "tokens":
        latest = max(number.values())
        last = [t for t in done if t.rollout >= max(0, latest - settings.per_round)]
        root = [t for t in done if t.rollout < settings.root_rollouts]
        left = _token_budget(root, settings) - sampled_tokens(done)
        limits.append(left * len(last) // max(1, sampled_tokens(last)))
    wanted = settings.per_round * len(tasks)
    count = max(0, min(wanted, *limits))
    prefixes = {}
    if count and settings.branching != "none":
        prefixes = choose_prefixes(done, settings, merge_on=merge_on)
    requests = []
    for place, task in enumerate(tasks):
        # Choice j of all tasks comes before choice j + 1 of any.
        for j in range(min(-(-(count - place) // len(tasks)), most - number[task])):
            steps, first_observation = prefixes[task][j] if task in prefixes else ((), None)
            requests.append(EpisodeRequest(task, number[task] + j, steps, first_observation))
    return requests, count < wanted or count in limits


def choose_prefixes(
    done: Sequence[Trajectory], settings: ml_collections.ConfigDict, *, merge_on: str
) -> dict[str, list[tuple[tuple[Step, ...], str | None]]]:
    """Task → where its next rollouts begin: the steps before, and the first observation.

    The node is chosen by `search.choose_starts` on the mean values of the task's tree; the text is
    that of the first rollout through it. Tasks none of whose rollouts was scored are left out.
    """
    if not any(t.status.scored for t in done):
        return {}
    most = max(Counter(t.task_id for t in done if t.status.scored).values())
    longest = max(len(t.steps) for t in done if t.status.scored)
    forest = build_forest(
        done,
        merge_on=merge_on,
        num_rollouts=1 << (most - 1).bit_length(),
        num_steps=-(-max(1, longest) // _STEPS) * _STEPS,
    )
    nodes = _choose(
        forest.tree,
        forest.start,
        settings.exploration_weight,
        num_starts=settings.per_round,
        max_depth=settings.max_start_depth or None,
    )
    found = {}
    for row, chosen in enumerate(np.asarray(nodes)):
        found[done[forest.episode[row, 0]].task_id] = starts = []
        for node in chosen:
            episode = done[forest.episode[row, forest.tree.representative[row, node]]]
            depth = int(forest.tree.depth[row, node])
            first = episode.first_observation if depth else None
            starts.append((episode.steps[:depth], first))
    return found


@functools.partial(jax.jit, static_argnames=("num_starts", "max_depth"))
def _choose(trees, start, exploration_weight, *, num_starts: int, max_depth: int | None):
    def one(tree, start):
        return search.choose_starts(
            tree,
            search.backup_mean(tree, start=start),
            start,
            num_starts=num_starts,
            exploration_weight=exploration_weight,
            max_depth=max_depth,
        )

    return jax.vmap(one)(trees, start)


def _first_round(
    tasks: Sequence[str], settings: ml_collections.ConfigDict
) -> tuple[list[EpisodeRequest], bool]:
    number = settings.root_rollouts
    requests = [EpisodeRequest(task, rollout) for task in tasks for rollout in range(number)]
    return requests, number >= settings.per_task


def _token_budget(root: Sequence[Trajectory], settings: ml_collections.ConfigDict) -> int:
    """What `per_task` rollouts from the root would cost, judging by the first of them."""
    return sampled_tokens(root) * settings.per_task // settings.root_rollouts


def _differed(episode: Trajectory) -> bool:
    return episode.error.startswith(NOT_DETERMINISTIC)


def _check_replays(made: Sequence[Trajectory], env_name: str) -> None:
    differed = [t for t in made if _differed(t)]
    if 2 * len(differed) > len(made):
        raise ValueError(
            f"config.rollouts.branching: {len(differed)} of {len(made)} rollouts could not go on "
            f"from a node, since {env_name!r} does not repeat itself (task "
            f"{differed[0].task_id!r}: {differed[0].error}); use branching 'none' with it"
        )

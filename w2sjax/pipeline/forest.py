"""The trajectory trees of all tasks: built, searched and turned into targets, all tasks at once."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from w2sjax import search, targets, trees
from w2sjax.pipeline.storage import load_arrays, save_arrays
from w2sjax.types import Trajectory, TrajectoryTree


@dataclasses.dataclass(frozen=True)
class Forest:
    """B trees and how their R rollouts relate to the E episodes they were built from.

    Where there is no rollout, numbers are 0.
    """

    tree: TrajectoryTree  # every field with a leading axis B
    # int32 [B, R], index of the episode; −1 where a task has fewer than R scored ones
    episode: np.ndarray
    length: np.ndarray  # int32 [B, R], steps
    score: np.ndarray  # float32 [B, R], returns
    success: np.ndarray  # bool [B, R]
    rollout: np.ndarray  # int32 [B, R], number among the rollouts of its task
    start: np.ndarray  # int32 [B, R], steps that were replayed from another rollout of the task
    num_episodes: int  # E, unscored ones included

    @property
    def mask(self) -> np.ndarray:
        """bool [B, R]: rollouts that are there."""
        return self.episode >= 0

    @property
    def sampled(self) -> np.ndarray:
        """bool [B, R, T], steps that a rollout sampled itself."""
        step = np.arange(self.tree.trajectory_node.shape[-1] - 1)
        return (step >= self.start[..., None]) & (step < self.length[..., None])


def build_forest(
    episodes: Sequence[Trajectory],
    *,
    merge_on: str,
    num_rollouts: int | None = None,
    num_steps: int | None = None,
) -> Forest:
    """Groups episodes by task and builds a tree of each task.

    Episodes that broke (env_error, policy_error) are in no tree. A malformed answer is merged on
    its text.

    Args:
      episodes: E of them, in their canonical order.
      merge_on: see `trees.StepInterner`.
      num_rollouts: R, to pad to; the most of any task where None.
      num_steps: T, to pad to; the longest episode's where None.

    Raises:
      ValueError: no episode was scored, or a task or an episode is larger than it may be.
    """
    by_task: dict[str, list[int]] = {}
    for index, episode in enumerate(episodes):
        if episode.status.scored:
            by_task.setdefault(episode.task_id, []).append(index)
    if not by_task:
        raise ValueError(
            f"trees: none of the {len(episodes)} rollouts was scored; see their errors in stage "
            "'rollouts', episodes.jsonl"
        )
    groups = list(by_task.values())
    keys = trees.intern_steps(
        [
            [
                [
                    (("malformed", s.answer) if s.action is None else s.action, s.observation)
                    for s in episodes[i].steps
                ]
                for i in group
            ]
            for group in groups
        ],
        merge_on=merge_on,
        num_rollouts=num_rollouts,
        num_steps=num_steps,
    )
    num_rollouts, num_steps = keys.step_keys.shape[1:]
    index = np.full((len(groups), num_rollouts), -1, np.int32)
    for row, group in enumerate(groups):
        index[row, : len(group)] = group
    score = np.array([e.score for e in episodes], np.float32)[index] * (index >= 0)
    success = np.array([e.success for e in episodes], bool)[index] & (index >= 0)
    rollout = np.array([e.rollout for e in episodes], np.int32)[index] * (index >= 0)
    start = np.array([e.start for e in episodes], np.int32)[index] * (index >= 0)
    build = functools.partial(trees.build_tree, max_nodes=1 + num_rollouts * num_steps)
    tree = jax.jit(jax.vmap(lambda k, n, r, m: build(k, n, r, mask=m)))(
        keys.step_keys, keys.lengths, score, keys.mask
    )
    return Forest(
        tree=jax.tree.map(np.asarray, tree),
        episode=index,
        length=keys.lengths,
        score=score,
        success=success,
        rollout=rollout,
        start=start,
        num_episodes=len(episodes),
    )


def save_forest(path: os.PathLike[str], forest: Forest) -> None:
    """Writes a forest as one .npz file."""
    arrays = {f"tree_{f.name}": getattr(forest.tree, f.name) for f in _tree_fields()}
    others = {f.name: getattr(forest, f.name) for f in dataclasses.fields(Forest)}
    del others["tree"]
    save_arrays(path, arrays | others)


def load_forest(path: os.PathLike[str]) -> Forest:
    """Reads what `save_forest` wrote."""
    arrays = load_arrays(path)
    tree = TrajectoryTree(**{f.name: arrays[f"tree_{f.name}"] for f in _tree_fields()})
    others = {f.name: arrays[f.name] for f in dataclasses.fields(Forest) if f.name != "tree"}
    return Forest(tree=tree, **others | {"num_episodes": int(others["num_episodes"])})


def _tree_fields():
    return dataclasses.fields(TrajectoryTree)


def room(
    forest: Forest, gate: ml_collections.ConfigDict, *, root_rollouts: int | None = None
) -> dict[str, Any]:
    """What there is to learn from, and warnings where a gate says that it is too little.

    Args:
      forest: the trees.
      gate: config.gate.
      root_rollouts: rollouts of each task that say how the policy plays; the later ones began where
        a choice had them begin. All do where None.

    Returns:
      Shares in [0, 1] by name, and `warnings`.
    """
    steps = int(forest.length.sum())
    nodes = int(forest.tree.num_nodes.sum()) - len(forest.episode)
    plain = forest.mask
    if root_rollouts is not None:
        plain = plain & (forest.rollout < root_rollouts)
    if not plain.any():  # all of the first ones broke, so the next began at the root as well
        plain = forest.mask & (forest.start == 0)
    with_success = forest.success.any(axis=1)
    mixed = with_success & (~forest.success & forest.mask).any(axis=1)
    facts = {
        "tasks": len(forest.episode),
        "rollouts": int(forest.mask.sum()),
        "sampled_success": round(float(forest.success[plain].mean()), 4),
        "sampled_reward": round(float(forest.score[plain].mean()), 4),
        "tasks_with_success": round(float(with_success.mean()), 4),
        "tasks_with_success_and_failure": round(float(mixed.mean()), 4),
        "shared_steps": round(1 - nodes / max(1, steps), 4),
        "nodes_per_tree": round(nodes / len(forest.episode), 1),
        "overflow": int(forest.tree.overflow.sum()),
    }
    checks = (
        ("sampled_success", facts["sampled_success"] < gate.min_sampled_success,
         f"below {gate.min_sampled_success}: too few successes to filter for"),
        ("sampled_success", facts["sampled_success"] > gate.max_sampled_success,
         f"above {gate.max_sampled_success}: little left to gain"),
        ("tasks_with_success", facts["tasks_with_success"] < gate.min_tasks_with_success,
         f"below {gate.min_tasks_with_success}: most trees hold nothing but failures"),
        ("shared_steps", facts["shared_steps"] < gate.min_shared_steps,
         f"below {gate.min_shared_steps}: without common prefixes a tree is a list"),
    )  # fmt: skip
    facts["warnings"] = [
        f"{name} is {facts[name]}, {text}" for name, failed, text in checks if failed
    ]
    return facts


def search_forest(
    forest: Forest, *, num_simulations: int, exploration_weight: float, discount: float
) -> dict[str, np.ndarray]:
    """Runs offline MCTS and the backups on every tree.

    Rollouts that began inside a tree weigh in its mean values no more than the way to their start
    is taken (`search.backup_mean`); the others are about what was found, however often.

    Returns:
      `node_visits` int32 [B, N], `mcts_values`, `mean_values`, `max_values` float32 [B, N], and the
      paths that MCTS visits most: `path_nodes` int32 [B, T+1] (−1 past the end), `path_length`
      int32 [B].
    """

    branched = bool(forest.start.any())

    def one(tree, start):
        found = search.run_mcts(
            tree,
            num_simulations=num_simulations,
            exploration_weight=exploration_weight,
            discount=discount,
        )
        path = search.best_path(tree, found.node_visits, stop_values=found.stop_visits)
        return {
            "node_visits": found.node_visits,
            "mcts_values": found.node_values,
            "mean_values": search.backup_mean(tree, start=start if branched else None),
            "max_values": search.backup_max(tree, discount=discount),
            "path_nodes": path.nodes,
            "path_length": path.length,
        }

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(forest.tree, forest.start))


def make_targets(
    forest: Forest,
    values: Mapping[str, np.ndarray],
    settings: ml_collections.ConfigDict,
    *,
    seed: int,
) -> dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """All methods' targets as indices and weights.

    A step is learned as often as it was sampled: where a rollout began inside a tree, the steps
    before are another's and count 0 in `sft_all` and `tree_awr`. `sft_success` learns whole
    successes, but of the steps that several of them replay, each once. Pairs (`dpo`) contain the
    replayed steps, which say nothing where both sides have them.

    Args:
      forest: the trees.
      values: from `search_forest`.
      settings: config.targets.
      seed: of the random matching (`dpo`).

    Returns:
      Name → (arrays, counts). For `sft_all`, `sft_success`, `mcts` and `tree_awr`: `step_weights`
      float32 [E, T]. For `dpo` and `tree_dpo`: int32 [P] `chosen`, `rejected` (episodes),
      `start` and `…_end` (steps), and `value_gap` float32 [P].
    """
    num_steps = forest.tree.trajectory_node.shape[-1] - 1
    step_weights = {
        "sft_all": forest.sampled,
        "sft_success": _success_steps(forest),
        "mcts": _best_path_weights(forest, values, settings.best_path_min_return),
        "tree_awr": _awr_weights(forest, values, settings) * forest.sampled,
    }
    made = {}
    for name, weights in step_weights.items():
        rows = np.zeros((forest.num_episodes, num_steps), np.float32)
        rows[forest.episode[forest.mask]] = weights[forest.mask]
        used = rows.any(axis=1)
        counts = {
            "episodes": int(used.sum()),
            "steps": int((rows > 0).sum()),
            "left_out_episodes": int((~used).sum()),
        }
        made[name] = ({"step_weights": rows}, counts)
    keys = jax.random.split(jax.random.key(seed), len(forest.episode))
    extra = settings.rejected_extra_steps
    match = functools.partial(
        targets.trajectory_pairs, max_pairs=settings.max_pairs_per_task, max_extra_steps=extra
    )
    matched = jax.jit(jax.vmap(lambda r, n, k, s, m: match(r, n, k, success=s, mask=m)))(
        forest.score, forest.length, keys, forest.success, forest.mask
    )
    branch = functools.partial(
        targets.branch_pairs,
        max_pairs=settings.max_pairs_per_tree,
        min_value_gap=settings.min_value_gap,
        pairing=settings.pairing,
        max_pairs_per_node=settings.max_pairs_per_node,
        horizon={"to_end": None, "one_step": 1}[settings.continuation],
        max_extra_steps=extra,
    )
    # What the search never visited has no value of its own, so it is no side of a pair.
    visited = values["node_visits"] > 0
    candidates = visited if settings.pair_values == "mcts" else np.ones_like(visited)
    branched = jax.jit(jax.vmap(lambda t, v, c: branch(t, v, candidates=c)))(
        forest.tree, values[f"{settings.pair_values}_values"], candidates
    )
    made["dpo"] = _pair_arrays(forest, matched)
    made["tree_dpo"] = _pair_arrays(forest, branched)
    return made


def _success_steps(forest: Forest) -> np.ndarray:
    """bool [B, R, T]: all steps of successes; those that were replayed, in the first success that
    goes through their node, and only where none sampled a step into it itself.
    """
    nodes = forest.tree.trajectory_node[..., 1:]
    every_step = (nodes >= 0) & forest.success[..., None]
    taken = every_step & forest.sampled
    row, _, _ = at = np.nonzero(taken)
    seen = np.zeros(forest.tree.parent.shape, bool)
    seen[row, nodes[at]] = True
    rows = np.arange(len(nodes))[:, None]
    for number in range(nodes.shape[1]):
        here = nodes[:, number]
        new = every_step[:, number] & ~seen[rows, here]
        taken[:, number] |= new
        row, _ = at = np.nonzero(new)
        seen[row, here[at]] = True
    return taken


def _best_path_weights(
    forest: Forest, values: Mapping[str, np.ndarray], min_return: float
) -> np.ndarray:
    """1 on the steps of each tree's best path, in the text of the trajectory that stands for its
    end.
    """
    weights = np.zeros((*forest.episode.shape, values["path_nodes"].shape[1] - 1), np.float32)
    tree = forest.tree
    for row, length in enumerate(values["path_length"]):
        end = values["path_nodes"][row, length]
        count = tree.terminal_count[row, end]
        if count and tree.terminal_return_sum[row, end] / count > min_return:
            weights[row, tree.representative[row, end], :length] = 1.0
    return weights


def _awr_weights(
    forest: Forest,
    values: Mapping[str, np.ndarray],
    settings: ml_collections.ConfigDict,
) -> np.ndarray:
    """exp(advantage / β) on every step; steps below which nothing was ever returned are left
    out.
    """

    def one(tree, mean_values, max_values):
        advantages = targets.edge_advantages(tree, mean_values)
        return targets.step_weights(
            tree,
            advantages,
            beta=settings.awr_beta,
            max_weight=settings.awr_max_weight,
            keep=max_values > 0,
        )

    weights = jax.jit(jax.vmap(one))(forest.tree, values["mean_values"], values["max_values"])
    return np.asarray(weights)


def _pair_arrays(forest: Forest, pairs: targets.PairSet):
    pairs = jax.tree.map(np.asarray, pairs)
    row, column = np.nonzero(pairs.mask)
    arrays = {
        "chosen": forest.episode[row, pairs.chosen_trajectory[row, column]],
        "rejected": forest.episode[row, pairs.rejected_trajectory[row, column]],
        "start": pairs.start[row, column],
        "chosen_end": pairs.chosen_end[row, column],
        "rejected_end": pairs.rejected_end[row, column],
        "value_gap": pairs.value_gap[row, column],
    }
    names = ("num_below_gap", "num_over_node_cap", "num_over_max_pairs")
    counts = {"pairs": len(row), "tasks_with_pairs": len(set(row.tolist()))}
    counts |= {name.removeprefix("num_"): int(getattr(pairs, name).sum()) for name in names}
    return arrays, counts

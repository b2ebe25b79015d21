"""Preference pairs: continuations that part at a node of the tree, and whole trajectories."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from w2sjax.trees.build import end_values, path_lengths
from w2sjax.types import TrajectoryTree

# Which children of a node are set against each other.
PAIRINGS = ("best_vs_each", "best_vs_worst", "adjacent")


@chex.dataclass(frozen=True)
class PairSet:
    """Up to P pairs of one task. Rows where `mask` is False are zeros.

    Both sides share the first `start` steps and differ in step `start`. The continuations are the
    steps start … end − 1 of the two trajectories.
    """

    parent_node: chex.Array  # int32 [P], where they part; 0 for pairs of whole trajectories
    chosen_node: chex.Array  # int32 [P], the better child; 0 for pairs of whole trajectories
    rejected_node: chex.Array  # int32 [P]
    chosen_trajectory: chex.Array  # int32 [P], whose text is used
    rejected_trajectory: chex.Array  # int32 [P]
    start: chex.Array  # int32 [P], first step of the continuations
    chosen_end: chex.Array  # int32 [P], past the last step
    rejected_end: chex.Array  # int32 [P]
    value_gap: chex.Array  # float [P], Q(chosen) − Q(rejected)
    mask: chex.Array  # bool [P]
    num_pairs: chex.Array  # int32 [], rows in use
    num_below_gap: chex.Array  # int32 [], candidates whose gap was too small
    num_over_node_cap: chex.Array  # int32 [], candidates beyond `max_pairs_per_node`
    num_over_max_pairs: chex.Array  # int32 [], candidates that did not fit into P rows


def branch_pairs(
    tree: TrajectoryTree,
    node_values: chex.Array,
    *,
    max_pairs: int,
    min_value_gap: float = 0.0,
    pairing: str = "best_vs_each",
    max_pairs_per_node: int | None = None,
    horizon: int | None = None,
    max_extra_steps: int | None = 5,
    candidates: chex.Array | None = None,
) -> PairSet:
    """Pairs the children of every node by value: a better continuation against a worse one.

    The text of the chosen side is the best trajectory through the better child, that of the
    rejected side the worst one through the worse child (by the mean return at their ends; ties:
    the lowest id). Stopping has no text and is never a side of a pair.

    Args:
      tree: one tree of capacity N; `jax.vmap` for many.
      node_values: float [N].
      max_pairs: P. Where there are more, those of the largest gap stay.
      min_value_gap: smallest gap that makes a pair; gaps of 0 never do.
      pairing: "best_vs_each" (the best child against every other), "best_vs_worst", or "adjacent"
        (each child against the next better one).
      max_pairs_per_node: those of the largest gap at a node stay; no limit where None.
      horizon: steps of a continuation, 1 for the parting step alone; to the end where None.
      max_extra_steps: the rejected continuation is cut to this many steps more than the chosen one
        (ETO's rule, arXiv 2403.02502); no cut where None.
      candidates: bool [N], nodes that may be a side of a pair (for example those a search
        visited); all where None.

    Returns:
      `PairSet`, in falling order of gap.

    Raises:
      ValueError: unknown `pairing`.

    Example:
      >>> from w2sjax.trees import build_tree
      >>> tree = build_tree(jnp.array([[1], [2]]), jnp.array([1, 1]), jnp.eye(2)[1], max_nodes=3)
      >>> pairs = branch_pairs(tree, tree.return_sum / tree.data_count, max_pairs=4)
      >>> int(pairs.num_pairs), pairs.chosen_trajectory[0].item(), pairs.value_gap[0].item()
      (1, 1, 1.0)
    """
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing: got {pairing!r}; known: {', '.join(PAIRINGS)}")
    chex.assert_rank([tree.parent, tree.trajectory_node], [1, 2])
    chex.assert_equal_shape([tree.parent, node_values])
    num_nodes = tree.parent.shape[0]
    allowed = tree.parent >= 0
    if candidates is not None:
        chex.assert_equal_shape([tree.parent, candidates])
        allowed = allowed & candidates
    index = jnp.arange(num_nodes, dtype=jnp.int32)
    up = jnp.where(allowed, tree.parent, num_nodes)

    # Siblings in runs, best first; the partner of every node is found in its run.
    order = jnp.lexsort((index, -node_values, up))
    up_s = up[order]
    new = jnp.concatenate([jnp.ones((1,), bool), up_s[1:] != up_s[:-1]])
    first = jax.lax.cummax(jnp.where(new, index, 0))
    partner_at = jnp.maximum(index - 1, 0) if pairing == "adjacent" else first
    proposed = (up_s < num_nodes) & ~new
    if pairing == "best_vs_worst":
        proposed = proposed & jnp.concatenate([new[1:], jnp.ones((1,), bool)])
    chosen, rejected = order[partner_at], order
    gap = jnp.where(proposed, node_values[chosen] - node_values[rejected], 0)
    wide = proposed & (gap >= min_value_gap) & (gap > 0)
    kept = wide
    if max_pairs_per_node is not None:
        by_gap = jnp.lexsort((index, -gap, ~wide, up_s))
        rank = jnp.zeros((num_nodes,), jnp.int32).at[by_gap].set(index - first)
        kept = wide & (rank < max_pairs_per_node)

    take = jnp.lexsort((rejected, -gap, ~kept))[: min(max_pairs, num_nodes)]
    take = jnp.pad(take, (0, max_pairs - take.shape[0]))
    count = jnp.sum(kept, dtype=jnp.int32)
    num_pairs = jnp.minimum(count, max_pairs)
    chosen, rejected, gap = chosen[take], rejected[take], gap[take]

    best, worst = _extreme_trajectories(tree)
    lengths = path_lengths(tree)
    start = tree.depth[jnp.maximum(tree.parent[rejected], 0)]
    chosen_end, rejected_end = _ends(
        start, lengths[best[chosen]], lengths[worst[rejected]], horizon, max_extra_steps
    )
    return _pair_set(
        num_pairs,
        tree.parent[rejected],
        chosen,
        rejected,
        best[chosen],
        worst[rejected],
        start,
        chosen_end,
        rejected_end,
        gap,
        num_below_gap=jnp.sum(proposed & ~wide, dtype=jnp.int32),
        num_over_node_cap=jnp.sum(wide & ~kept, dtype=jnp.int32),
        num_over_max_pairs=count - num_pairs,
    )


def trajectory_pairs(
    returns: chex.Array,
    lengths: chex.Array,
    rng_key: chex.PRNGKey,
    *,
    max_pairs: int,
    success: chex.Array | None = None,
    min_return_gap: float = 0.0,
    max_extra_steps: int | None = 5,
    mask: chex.Array | None = None,
) -> PairSet:
    """Matches whole trajectories of one task at random: ETO's way (arXiv 2403.02502).

    With `success`, every success and every failure is shuffled and they are matched in turn; the
    rarer side is gone through again, so that each trajectory of the other side is in exactly one
    pair. Without, trajectories are matched two by two and the one of higher return is chosen.

    Args:
      returns: float [R].
      lengths: int32 [R], steps.
      rng_key: decides the matching.
      max_pairs: P.
      success: bool [R], the environment's verdict.
      min_return_gap: smallest gap of returns that makes a pair; gaps of 0 never do.
      max_extra_steps: see `branch_pairs`.
      mask: bool [R], real trajectories; all where None.

    Returns:
      `PairSet`; all nodes are the root and `start` is 0.
    """
    chex.assert_rank([returns, lengths], 1)
    chex.assert_equal_shape([returns, lengths])
    num = returns.shape[0]
    present = jnp.ones((num,), bool) if mask is None else mask.astype(bool)
    chex.assert_equal_shape([returns, present])
    priority = jax.random.uniform(rng_key, (num,))
    slot = jnp.arange(num, dtype=jnp.int32)
    if success is None:
        order = jnp.lexsort((priority, ~present)).astype(jnp.int32)
        one, two = order[0::2][: num // 2], order[1::2]
        better = returns[one] >= returns[two]
        chosen, rejected = jnp.where(better, one, two), jnp.where(better, two, one)
        proposed = slot[: num // 2] < jnp.sum(present) // 2
    else:
        chex.assert_equal_shape([returns, success])
        good, bad = present & success, present & ~success
        num_good, num_bad = jnp.sum(good), jnp.sum(bad)
        good_order = jnp.lexsort((priority, ~good)).astype(jnp.int32)
        bad_order = jnp.lexsort((priority, ~bad)).astype(jnp.int32)
        chosen = good_order[slot % jnp.maximum(num_good, 1)]
        rejected = bad_order[slot % jnp.maximum(num_bad, 1)]
        both = (num_good > 0) & (num_bad > 0)
        proposed = both & (slot < jnp.maximum(num_good, num_bad))
    gap = jnp.where(proposed, returns[chosen] - returns[rejected], 0)
    wide = proposed & (gap >= min_return_gap) & (gap > 0)
    count = jnp.sum(wide, dtype=jnp.int32)
    num_pairs = jnp.minimum(count, max_pairs)
    take = jnp.argsort(~wide, stable=True)[:max_pairs]  # the matching's own order is random
    take = jnp.pad(take, (0, max_pairs - take.shape[0]))
    chosen, rejected, gap = chosen[take], rejected[take], gap[take]
    zero = jnp.zeros((max_pairs,), jnp.int32)
    chosen_end, rejected_end = _ends(
        zero, lengths[chosen], lengths[rejected], None, max_extra_steps
    )
    return _pair_set(
        num_pairs,
        zero,
        zero,
        zero,
        chosen,
        rejected,
        zero,
        chosen_end,
        rejected_end,
        gap,
        num_below_gap=jnp.sum(proposed & ~wide, dtype=jnp.int32),
        num_over_node_cap=jnp.int32(0),
        num_over_max_pairs=count - num_pairs,
    )


def _extreme_trajectories(tree: TrajectoryTree) -> tuple[chex.Array, chex.Array]:
    """The best and the worst trajectory through each node, int32 [N] each (0 on padding)."""
    num_rollouts = tree.trajectory_node.shape[0]
    num_nodes = tree.parent.shape[0]
    values, _ = end_values(tree)
    lengths = jnp.maximum(path_lengths(tree), 0)
    nodes = tree.trajectory_node
    last = jnp.take_along_axis(nodes, lengths[:, None], axis=1)[:, 0]
    # A trajectory cut by overflow stands at an inner node that is no end; its node's mean stands
    # for it.
    mean = tree.return_sum / jnp.maximum(tree.data_count, 1).astype(values.dtype)
    worth = jnp.where((tree.terminal_count > 0) | (tree.num_children == 0), values, mean)[last]
    at = jnp.where(nodes >= 0, nodes, num_nodes)
    rows = jnp.broadcast_to(jnp.arange(num_rollouts, dtype=jnp.int32)[:, None], nodes.shape)

    def extreme(worth):
        top = jnp.full((num_nodes,), -jnp.inf, worth.dtype)
        top = top.at[at].max(jnp.broadcast_to(worth[:, None], nodes.shape), mode="drop")
        is_top = (nodes >= 0) & (worth[:, None] == top[nodes])
        who = jnp.full((num_nodes,), num_rollouts, jnp.int32)
        who = who.at[jnp.where(is_top, nodes, num_nodes)].min(rows, mode="drop")
        return jnp.where(who < num_rollouts, who, 0)

    return extreme(worth), extreme(-worth)


def _ends(start, chosen_length, rejected_length, horizon, max_extra_steps):
    """Where the two continuations end: at their trajectory's end, the horizon, and ETO's cut."""
    if horizon is not None:
        chosen_length = jnp.minimum(chosen_length, start + horizon)
        rejected_length = jnp.minimum(rejected_length, start + horizon)
    if max_extra_steps is not None:
        rejected_length = jnp.minimum(rejected_length, chosen_length + max_extra_steps)
    return chosen_length, rejected_length


def _pair_set(
    num_pairs,
    parent_node,
    chosen_node,
    rejected_node,
    chosen_trajectory,
    rejected_trajectory,
    start,
    chosen_end,
    rejected_end,
    value_gap,
    **counts,
) -> PairSet:
    mask = jnp.arange(value_gap.shape[0]) < num_pairs

    def masked(x):
        return jnp.where(mask, x, 0).astype(jnp.int32)

    return PairSet(
        parent_node=masked(parent_node),
        chosen_node=masked(chosen_node),
        rejected_node=masked(rejected_node),
        chosen_trajectory=masked(chosen_trajectory),
        rejected_trajectory=masked(rejected_trajectory),
        start=masked(start),
        chosen_end=masked(chosen_end),
        rejected_end=masked(rejected_end),
        value_gap=jnp.where(mask, value_gap, 0),
        mask=mask,
        num_pairs=num_pairs,
        **counts,
    )

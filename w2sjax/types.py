"""The frozen records that cross rooms, and the shape letters.

Shape letters, project-wide: `B` tasks or trees, `R` rollouts per task, `T` environment steps, `N`
nodes, `P` pairs, `L` tokens in a row, `S` rows (or sampling slots), `V` vocabulary, `D` width, `H`
heads, `K` key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex

from w2sjax.records import Status as Status
from w2sjax.records import Step as Step
from w2sjax.records import Trajectory as Trajectory


@chex.dataclass(frozen=True)
class TrajectoryTree:
    """One task's trajectories merged by common prefixes: fixed capacity, breadth-first, root 0.

    Children of a node are contiguous; `parent[v] < v`; nodes at or past `num_nodes` are inert
    padding (all zeros, `parent`, `first_child` and `representative` −1). Batched by `jax.vmap`
    (leading axis B).
    """

    parent: chex.Array  # int32 [N], −1 at the root
    depth: chex.Array  # int32 [N], steps from the root
    step_key: chex.Array  # int32 [N], key of the step into the node; −1 at the root
    data_count: chex.Array  # int32 [N], trajectories through the node
    return_sum: chex.Array  # float32 [N], sum of their returns
    terminal_count: chex.Array  # int32 [N], trajectories that end at the node
    terminal_return_sum: chex.Array  # float32 [N], sum of their returns
    first_child: chex.Array  # int32 [N], −1 without children
    num_children: chex.Array  # int32 [N]
    representative: chex.Array  # int32 [N], lowest trajectory id through the node
    # int32 [R, T+1], node after t steps; −1 past the end (or past overflow)
    trajectory_node: chex.Array
    num_nodes: chex.Array  # int32 []
    overflow: chex.Array  # int32 [], nodes that did not fit; 0 when all did


@chex.dataclass(frozen=True)
class PackedBatch:
    """Rows of token tries, laid out depth first: a prefix that sequences of a row share is there
    once.

    Token i may attend to token j of its row exactly when `j <= i < subtree_end[j]`. Padding has
    `subtree_end == 0`, so nothing attends to it. The logits that predict token i are those at
    `predecessor[i]`, the token before it on its path: i − 1, but where a branch begins.

    A path is what one sequence learns, or a part of it; its entries list the tokens. Losses over
    single tokens need no paths (E = 0).
    """

    tokens: chex.Array  # int32 [S, L]
    positions: chex.Array  # int32 [S, L], position of the token on its own path
    # int32 [S, L], row index past the last token that may attend to this one
    subtree_end: chex.Array
    # int32 [S, L], row index of the predicting token; 0 where nothing is to be learned
    predecessor: chex.Array
    # float32 [S, L], what the token counts in all sequences that run through it together; 0 on what
    # the agent did not say
    loss_weight: chex.Array
    loss_count: chex.Array  # int32 [S, L], how many of them learn it (weight other than 0)
    path_token: chex.Array  # int32 [S, E], row index of a token on a path
    path_id: chex.Array  # int32 [S, E], which path of the batch; −1 past the last entry
    path_weight: chex.Array  # float32 [S, E], what it counts there


class Policy(NamedTuple):
    """A language model as plain functions over a pytree of parameters.

    apply_fn(params, tokens [S, L], *, positions [S, L], subtree_end [S, L]) →
      logits float32 [S, L, V]
    score_fn(params, batch: PackedBatch, *, dropout_key=None) → float32 [S, L], log-probability of
      each token that is to be learned (loss_count > 0), 0 elsewhere; no logits of a whole row
    init_cache(num_slots, max_length) → cache (a pytree, leading axes chosen by the model)
    decode_fn(params, cache, tokens [S, C], start [S], last [S], *, slots=None) → (logits float32
      [S, V], cache): writes the chunk's keys and values at positions start … start+C−1 of every
      slot, lets each token attend to all cached positions up to its own, returns the logits at
      chunk index `last`. Chunk tokens after `last`, and positions past the end of the cache, are
      not written. With `slots` int32 [S] the rows are those slots of a larger cache; rows of slots
      past its end write nothing, and their logits mean nothing.
    resize_cache(cache, length) → a cache of positions 0 … length − 1: shortened, or with empty
      positions added. None: a cache keeps the length it was made with.
    """

    apply_fn: Callable[..., Any]
    score_fn: Callable[..., Any]
    init_cache: Callable[..., Any]
    decode_fn: Callable[..., Any]
    resize_cache: Callable[..., Any] | None = None

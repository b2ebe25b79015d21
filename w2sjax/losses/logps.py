"""Log-probabilities of the tokens that are there, and the form of what losses return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from w2sjax.types import PackedBatch


class Mean(NamedTuple):
    """A metric that averages: it reports total / weight, both summed over micro-batches first."""

    total: chex.Array  # float32 []
    weight: chex.Array  # float32 []


class Total(NamedTuple):
    """A metric that counts: it reports its sum over micro-batches."""

    total: chex.Array  # float32 []


class LossOutput(NamedTuple):
    """Sums, so that micro-batches and hosts average exactly: the loss is loss_sum / denominator."""

    loss_sum: chex.Array  # float32 []
    denominator: chex.Array  # float32 []
    metrics: dict[str, Mean | Total]


# (params, batch, *, dropout_key=None) → per_token_logps float32 [S, L]; see `types.Policy`
ScoreFn = Callable[..., chex.Array]
# (per_token_logps [S, L], batch, extras) → LossOutput
LossFn = Callable[[chex.Array, PackedBatch, Mapping[str, chex.Array]], LossOutput]


def per_token_logps(logits: chex.Array, tokens: chex.Array, predecessor: chex.Array) -> chex.Array:
    """Log-probability of each token given what is before it.

    `logits[s, predecessor[s, i], tokens[s, i]] − logsumexp(logits[s, predecessor[s, i]])`: beside
    the logits only [S, L] arrays are made.

    Args:
      logits: float [S, L, V], any precision; the sums run in float32 at least.
      tokens: int32 [S, L].
      predecessor: int32 [S, L], index in the row of the token whose logits predict this one.

    Returns:
      float32 [S, L], in nats. Entries of tokens that nothing predicts (loss weight 0) are
      meaningless but finite.
    """
    chex.assert_rank(logits, 3)
    chex.assert_shape([tokens, predecessor], logits.shape[:2])
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits[rows, predecessor, tokens] - normalizer[rows, predecessor]


def score_from_logits(apply_fn: Callable[..., chex.Array]) -> Callable[..., chex.Array]:
    """Turns a model that gives logits into what a train step asks of one.

    Args:
      apply_fn: (params, tokens, *, positions, subtree_end) → logits [S, L, V], as in
        `types.Policy`; it takes a `dropout_key` too where one is given.

    Returns:
      `score_fn` as in `types.Policy`. It holds the logits of all tokens at once; the library's own
      models have one that does not (`models.make_score_fn`).
    """

    def score_fn(params: Any, batch: PackedBatch, *, dropout_key: Any = None) -> chex.Array:
        options = {} if dropout_key is None else {"dropout_key": dropout_key}
        logits = apply_fn(
            params,
            batch.tokens,
            positions=batch.positions,
            subtree_end=batch.subtree_end,
            **options,
        )
        logps = per_token_logps(logits, batch.tokens, batch.predecessor)
        return jnp.where(batch.loss_count > 0, logps, 0.0)

    return score_fn


def path_sums(per_token: chex.Array, batch: PackedBatch, num_paths: int) -> chex.Array:
    """Sums over the tokens of each path, each times its weight there.

    Args:
      per_token: float32 [S, L].
      batch: whose paths they are.
      num_paths: Q.

    Returns:
      float32 [Q]; 0 for a path without entries.
    """
    chex.assert_rank(per_token, 2)
    chex.assert_equal_shape([per_token, batch.tokens])
    values = jnp.take_along_axis(per_token, batch.path_token, axis=1) * batch.path_weight
    paths = jnp.where(batch.path_id < 0, num_paths, batch.path_id)  # out of range: dropped
    return jax.ops.segment_sum(values.ravel(), paths.ravel(), num_segments=num_paths)

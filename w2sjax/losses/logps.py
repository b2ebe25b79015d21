"""Log-probabilities of the tokens that are there, and the form of what losses return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

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


def sequence_sums(
    per_token: chex.Array, weight: chex.Array, sequence_id: chex.Array, num_sequences: int
) -> chex.Array:
    """Weighted sums over the tokens of each sequence; tokens without weight do not enter at all.

    Args:
      per_token: float32 [S, L].
      weight: float32 [S, L].
      sequence_id: int32 [S, L], 0 … Q−1, or −1 on padding.
      num_sequences: Q.

    Returns:
      float32 [Q]; 0 for a sequence that is not there.
    """
    chex.assert_rank(per_token, 2)
    chex.assert_equal_shape([per_token, weight, sequence_id])
    counted = (weight != 0) & (sequence_id >= 0)
    values = jnp.where(counted, per_token * weight, 0.0)
    segments = jnp.where(counted, sequence_id, num_sequences)  # out of range: dropped
    return jax.ops.segment_sum(values.ravel(), segments.ravel(), num_segments=num_sequences)


def sequence_logps(
    per_token_logps: chex.Array,
    loss_weight: chex.Array,
    sequence_id: chex.Array,
    num_sequences: int,
) -> chex.Array:
    """Log-probability of each sequence's learned tokens: `sequence_sums` of `per_token_logps`.

    Args:
      per_token_logps: float32 [S, L].
      loss_weight: float32 [S, L].
      sequence_id: int32 [S, L], −1 on padding.
      num_sequences: Q.

    Returns:
      float32 [Q], in nats.
    """
    return sequence_sums(per_token_logps, loss_weight, sequence_id, num_sequences)


def sequence_lengths(
    loss_weight: chex.Array, sequence_id: chex.Array, num_sequences: int
) -> chex.Array:
    """Number of learned tokens (weight other than 0) of each sequence.

    Args:
      loss_weight: float32 [S, L].
      sequence_id: int32 [S, L], −1 on padding.
      num_sequences: Q.

    Returns:
      float32 [Q].
    """
    learned = (loss_weight != 0).astype(jnp.float32)
    return sequence_sums(learned, learned, sequence_id, num_sequences)

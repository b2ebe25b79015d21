"""Weighted maximum likelihood."""

from __future__ import annotations

from collections.abc import Mapping

import chex
import jax.numpy as jnp

from w2sjax.losses.logps import LossOutput, Mean, Total
from w2sjax.types import PackedBatch


def sft_loss(
    per_token_logps: chex.Array,
    batch: PackedBatch,
    extras: Mapping[str, chex.Array] | None = None,
) -> LossOutput:
    """Negative log-likelihood of the learned tokens, each times its weight, over the sum of
    weights.

    Multiplicities (a sequence that stands for several) and importances (exp(advantage / β) in
    advantage-weighted regression, Peng et al. 2019) are weights. A token that several sequences
    share has the sum of theirs, which is why packed tries give the gradient of the sequences one by
    one. A token of weight 0 might as well not be there.

    Args:
      per_token_logps: float32 [S, L], in nats.
      batch: the tokens they belong to.
      extras: not read; every loss has this argument.

    Returns:
      loss_sum Σ w·nll; denominator Σ w; metrics `nll` (mean over the learned tokens of all
      sequences, whatever their weight) and `tokens` (their number).
    """
    del extras
    weight, count = batch.loss_weight, batch.loss_count.astype(jnp.float32)
    chex.assert_rank(per_token_logps, 2)
    chex.assert_equal_shape([per_token_logps, weight])
    nll = jnp.where(count > 0, -per_token_logps, 0.0)
    tokens = jnp.sum(count)
    return LossOutput(
        loss_sum=jnp.sum(nll * weight),
        denominator=jnp.sum(weight),
        metrics={"nll": Mean(jnp.sum(nll * count), tokens), "tokens": Total(tokens)},
    )

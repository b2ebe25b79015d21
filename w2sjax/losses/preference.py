"""Losses over pairs: one answer shall gain on another, measured against a reference policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from w2sjax.losses.logps import LossOutput, Mean, Total, sequence_lengths, sequence_logps
from w2sjax.types import PackedBatch

LossType = Literal["sigmoid", "ipo"]


def dpo_loss(
    chosen_logps: chex.Array,
    rejected_logps: chex.Array,
    ref_chosen_logps: chex.Array,
    ref_rejected_logps: chex.Array,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    loss_type: LossType = "sigmoid",
) -> chex.Array:
    """Loss of each pair from the four log-probabilities.

    With h = (log π(chosen) − log π_ref(chosen)) − (log π(rejected) − log π_ref(rejected)):

    - `sigmoid`: −(1 − ε) log σ(βh) − ε log σ(−βh), DPO (Rafailov et al. 2023, eq. 7), with ε =
      `label_smoothing` its conservative form; log 2 where the policy is the reference;
    - `ipo`: (h − 1 / 2β)² (Azar et al. 2023, eq. 17).

    Args:
      chosen_logps, rejected_logps: float32 [P], the policy's, in nats.
      ref_chosen_logps, ref_rejected_logps: float32 [P], the frozen reference's.
      beta: how dear it is to leave the reference; above 0.
      label_smoothing: ε in [0, 0.5), the share of pairs taken to be the wrong way round; `sigmoid`
        only.
      loss_type: one of the two above.

    Returns:
      float32 [P].

    Raises:
      ValueError: on an unknown loss type, or beta or label_smoothing out of range.
    """
    chex.assert_rank(chosen_logps, 1)
    chex.assert_equal_shape([chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps])
    if not beta > 0:
        raise ValueError(f"beta must be above 0; got {beta}.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5); got {label_smoothing}.")
    gain = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    if loss_type == "sigmoid":
        return -(
            (1 - label_smoothing) * jax.nn.log_sigmoid(beta * gain)
            + label_smoothing * jax.nn.log_sigmoid(-beta * gain)
        )
    if loss_type == "ipo":
        if label_smoothing:
            raise ValueError("label_smoothing goes with loss_type 'sigmoid' only.")
        return jnp.square(gain - 1 / (2 * beta))
    raise ValueError(f"loss_type must be 'sigmoid' or 'ipo'; got {loss_type!r}.")


def preference_loss(
    per_token_logps: chex.Array,
    batch: PackedBatch,
    extras: Mapping[str, chex.Array],
    *,
    beta: float,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    length_normalized: bool = False,
) -> LossOutput:
    """`dpo_loss` on a packed batch, with the chosen side's likelihood mixed in on demand.

    Sequence ids 0 … P−1 are the chosen sides, P … 2P−1 the rejected ones of the same pairs.
    Specialise with `functools.partial` for `train.make_train_step`.

    Args:
      per_token_logps: float32 [S, L], in nats.
      batch: the tokens they belong to.
      extras: `ref_chosen_logps` and `ref_rejected_logps`, float32 [P]: sums over the same tokens
        under the reference.
      beta, loss_type, label_smoothing: as in `dpo_loss`.
      sft_weight: times the chosen side's mean negative log-likelihood per token, added to each
        pair's loss (Pang et al. 2024, "Iterative reasoning preference optimization", eq. 1).
      length_normalized: divide each side's log-probabilities, the policy's and the reference's, by
        its number of learned tokens. Off by default: margins then grow with length.

    Returns:
      loss_sum over pairs, denominator P, and metrics under TRL's names: means over pairs of
      `rewards/chosen`, `rewards/rejected` (β × drift from the reference), `rewards/margins`,
      `rewards/accuracies`, `logps/chosen`, `logps/rejected` (plain sums in nats, whatever the
      normalisation), `nll_loss` (the mixed-in term before its weight), `tokens/chosen`,
      `tokens/rejected`; and the total `tokens`.

    Raises:
      KeyError: if the reference's log-probabilities are missing.
      ValueError: as `dpo_loss`, or a negative sft_weight.
    """
    if sft_weight < 0:
        raise ValueError(f"sft_weight must not be negative; got {sft_weight}.")
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        if name not in extras:
            raise KeyError(f"extras lacks {name!r}; it has {sorted(extras)}.")
    num_pairs = extras["ref_chosen_logps"].shape[0]
    logps = sequence_logps(per_token_logps, batch.loss_weight, batch.sequence_id, 2 * num_pairs)
    lengths = sequence_lengths(batch.loss_weight, batch.sequence_id, 2 * num_pairs)
    chosen, rejected = logps[:num_pairs], logps[num_pairs:]
    chosen_length, rejected_length = lengths[:num_pairs], lengths[num_pairs:]
    sides = (chosen, rejected, extras["ref_chosen_logps"], extras["ref_rejected_logps"])
    if length_normalized:
        scales = (chosen_length, rejected_length, chosen_length, rejected_length)
        sides = tuple(side / scale for side, scale in zip(sides, scales, strict=True))
    losses = dpo_loss(*sides, beta=beta, label_smoothing=label_smoothing, loss_type=loss_type)
    nll = -chosen / chosen_length
    if sft_weight:
        losses = losses + sft_weight * nll
    chosen_rewards = beta * (sides[0] - sides[2])
    rejected_rewards = beta * (sides[1] - sides[3])
    per_pair = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).astype(jnp.float32),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "nll_loss": nll,
        "tokens/chosen": chosen_length,
        "tokens/rejected": rejected_length,
    }
    count = jnp.asarray(num_pairs, jnp.float32)
    metrics: dict[str, Mean | Total] = {
        name: Mean(jnp.sum(values), count) for name, values in per_pair.items()
    }
    metrics["tokens"] = Total(jnp.sum(lengths))
    return LossOutput(loss_sum=jnp.sum(losses), denominator=count, metrics=metrics)

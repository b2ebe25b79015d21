"""Losses over pairs: one answer shall gain on another, against a reference policy or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from w2sjax.losses.logps import LossOutput, Mean, Total, path_sums
from w2sjax.types import PackedBatch

LossType = Literal["sigmoid", "ipo", "simpo"]
LOSS_TYPES = ("sigmoid", "ipo", "simpo")


def pair_loss(
    gain: chex.Array,
    *,
    beta: float,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    margin: float = 0.0,
) -> chex.Array:
    """Loss of each pair from how much the chosen side gains on the rejected one.

    For `sigmoid` and `ipo` the gain is h = (log π(chosen) − log π_ref(chosen)) −
    (log π(rejected) − log π_ref(rejected)); for `simpo` it has no reference and is a difference of
    means per token.

    - `sigmoid`: −(1 − ε) log σ(βh) − ε log σ(−βh), DPO (Rafailov et al. 2023, eq. 7), with ε =
      `label_smoothing` its conservative form; log 2 where the policy is the reference;
    - `ipo`: (h − 1 / 2β)² (Azar et al. 2023, eq. 17);
    - `simpo`: −log σ(βh − γ), γ = `margin` (Meng et al. 2024, eq. 6).

    Args:
      gain: float32 [P], h, in nats.
      beta: how dear it is to leave the reference; above 0.
      loss_type: one of the three above.
      label_smoothing: ε in [0, 0.5), the share of pairs taken to be the wrong way round; `sigmoid`
        only.
      margin: γ, not negative; `simpo` only.

    Returns:
      float32 [P].

    Raises:
      ValueError: on an unknown loss type, a value out of range or one that the type does not read.
    """
    chex.assert_rank(gain, 1)
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}; got {loss_type!r}.")
    if not beta > 0:
        raise ValueError(f"beta must be above 0; got {beta}.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5); got {label_smoothing}.")
    if margin < 0:
        raise ValueError(f"margin must not be negative; got {margin}.")
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing goes with loss_type 'sigmoid', not {loss_type!r}.")
    if margin and loss_type != "simpo":
        raise ValueError(f"margin goes with loss_type 'simpo', not {loss_type!r}.")
    if loss_type == "ipo":
        return jnp.square(gain - 1 / (2 * beta))
    return -(
        (1 - label_smoothing) * jax.nn.log_sigmoid(beta * gain - margin)
        + label_smoothing * jax.nn.log_sigmoid(margin - beta * gain)
    )


def preference_loss(
    per_token_logps: chex.Array,
    batch: PackedBatch,
    extras: Mapping[str, chex.Array],
    *,
    beta: float,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    sft_weight: float = 0.0,
    length_normalized: bool = False,
) -> LossOutput:
    """`pair_loss` on a packed batch, with the chosen side's likelihood mixed in on demand.

    The batch's paths are those of `batches.pair_parts`: what each side says after the parting, and
    what both sides share. The shared part cancels in the gain, so it is not summed there; it
    counts in means per token, in the likelihood and in metrics. Specialise with
    `functools.partial` for `train.make_train_step`.

    Args:
      per_token_logps: float32 [S, L], in nats.
      batch: the tokens they belong to.
      extras: `path_tokens` int32 [P, 3], learned tokens of each pair's paths (chosen, rejected,
        shared); but for `simpo` also `ref_logps` float32 [P, 3], the reference's sums over the same
        paths.
      beta, loss_type, label_smoothing, margin: as in `pair_loss`.
      sft_weight: times the chosen side's mean negative log-likelihood per token, added to each
        pair's loss (Pang et al. 2024, "Iterative reasoning preference optimization", eq. 1).
      length_normalized: divide each side's log-probabilities, the policy's and the reference's, by
        its number of learned tokens. Off by default: margins then grow with length. `simpo` always
        does.

    Returns:
      loss_sum over pairs, denominator P, and metrics under TRL's names: means over pairs of
      `rewards/chosen`, `rewards/rejected` (β × drift from the reference), `rewards/margins`,
      `rewards/accuracies`, `logps/chosen`, `logps/rejected` (plain sums in nats, whatever the
      normalisation), `nll_loss` (the mixed-in term before its weight), `tokens/chosen`,
      `tokens/rejected`; and the total `tokens`.

    Raises:
      KeyError: if the tokens' or the reference's entry is missing.
      ValueError: as `pair_loss`, or a negative sft_weight.
    """
    if sft_weight < 0:
        raise ValueError(f"sft_weight must not be negative; got {sft_weight}.")
    needed = ["path_tokens"] if loss_type == "simpo" else ["path_tokens", "ref_logps"]
    for name in needed:
        if name not in extras:
            raise KeyError(f"extras lacks {name!r}; it has {sorted(extras)}.")
    tokens = extras["path_tokens"].astype(jnp.float32)
    num_pairs = tokens.shape[0]
    logps = path_sums(per_token_logps, batch, 3 * num_pairs).reshape(3, num_pairs).T
    drift = logps if loss_type == "simpo" else logps - extras["ref_logps"]
    lengths = tokens[:, :2] + tokens[:, 2:]  # of the chosen and the rejected side
    whole = drift[:, :2] + drift[:, 2:]
    if length_normalized or loss_type == "simpo":
        whole = whole / lengths
        gain = whole[:, 0] - whole[:, 1]
    else:
        gain = drift[:, 0] - drift[:, 1]
    losses = pair_loss(
        gain, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, margin=margin
    )
    sides = logps[:, :2] + logps[:, 2:]
    nll = -sides[:, 0] / lengths[:, 0]
    if sft_weight:
        losses = losses + sft_weight * nll
    per_pair = {
        "rewards/chosen": beta * whole[:, 0],
        "rewards/rejected": beta * whole[:, 1],
        "rewards/margins": beta * gain,
        "rewards/accuracies": (gain > 0).astype(jnp.float32),
        "logps/chosen": sides[:, 0],
        "logps/rejected": sides[:, 1],
        "nll_loss": nll,
        "tokens/chosen": lengths[:, 0],
        "tokens/rejected": lengths[:, 1],
    }
    count = jnp.asarray(num_pairs, jnp.float32)
    metrics: dict[str, Mean | Total] = {
        name: Mean(jnp.sum(values), count) for name, values in per_pair.items()
    }
    metrics["tokens"] = Total(jnp.sum(lengths))
    return LossOutput(loss_sum=jnp.sum(losses), denominator=count, metrics=metrics)

"""Pure losses: log-probabilities in, sums and denominators out. No model, no parameters."""

from w2sjax.losses.logps import (
    LossFn,
    LossOutput,
    Mean,
    ScoreFn,
    Total,
    path_sums,
    per_token_logps,
    score_from_logits,
)
from w2sjax.losses.preference import LOSS_TYPES, pair_loss, preference_loss
from w2sjax.losses.sft import sft_loss

__all__ = [
    "LOSS_TYPES",
    "LossFn",
    "LossOutput",
    "Mean",
    "ScoreFn",
    "Total",
    "pair_loss",
    "path_sums",
    "per_token_logps",
    "preference_loss",
    "score_from_logits",
    "sft_loss",
]

"""Pure losses: log-probabilities in, sums and denominators out. No model, no parameters."""

from w2sjax.losses.logps import (
    LossFn,
    LossOutput,
    Mean,
    Total,
    per_token_logps,
    sequence_lengths,
    sequence_logps,
    sequence_sums,
)
from w2sjax.losses.preference import dpo_loss, preference_loss
from w2sjax.losses.sft import sft_loss

__all__ = [
    "LossFn",
    "LossOutput",
    "Mean",
    "Total",
    "dpo_loss",
    "per_token_logps",
    "preference_loss",
    "sequence_lengths",
    "sequence_logps",
    "sequence_sums",
    "sft_loss",
]

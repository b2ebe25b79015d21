"""Token sequences into packed rows, ordered by seed and step alone. Host side, numpy only."""

from w2sjax.batches.loader import (
    LoadedBatch,
    Loader,
    PairSequences,
    PreferenceLoader,
    SequenceLoader,
    preference_batches,
    sft_batches,
)
from w2sjax.batches.packing import (
    Sequence,
    check_sequences,
    fill_rate,
    fill_rows,
    pack_rows,
    plan_rows,
    plan_rows_decreasing,
)

__all__ = [
    "LoadedBatch",
    "Loader",
    "PairSequences",
    "PreferenceLoader",
    "Sequence",
    "SequenceLoader",
    "check_sequences",
    "fill_rate",
    "fill_rows",
    "pack_rows",
    "plan_rows",
    "plan_rows_decreasing",
    "preference_batches",
    "sft_batches",
]

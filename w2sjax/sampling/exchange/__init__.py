"""Trajectories in other people's formats, in and out."""

from w2sjax.sampling.exchange.exports import (
    ContextsDifferError,
    episode_record,
    preference_record,
    sft_record,
    to_messages,
)
from w2sjax.sampling.exchange.imports import (
    ImportOptions,
    ImportReport,
    Refusal,
    import_records,
)
from w2sjax.sampling.exchange.records import Record, read_records

__all__ = [
    "ContextsDifferError",
    "ImportOptions",
    "ImportReport",
    "Record",
    "Refusal",
    "episode_record",
    "import_records",
    "preference_record",
    "read_records",
    "sft_record",
    "to_messages",
]

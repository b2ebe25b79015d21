"""Parameters and training states on disk."""

from w2sjax.checkpoints.io import (
    CheckpointMismatchError,
    TrainCheckpoints,
    load_metadata,
    load_params,
    save_params,
)

__all__ = [
    "CheckpointMismatchError",
    "TrainCheckpoints",
    "load_metadata",
    "load_params",
    "save_params",
]

"""Parameters and training states on disk."""

from w2sjax.checkpoints.io import (
    CheckpointMismatchError,
    TrainCheckpoints,
    absolute_path,
    load_metadata,
    load_params,
    save_params,
)

__all__ = [
    "CheckpointMismatchError",
    "TrainCheckpoints",
    "absolute_path",
    "load_metadata",
    "load_params",
    "save_params",
]

"""Models: a decoder-only transformer behind plain functions, and named shapes."""

from w2sjax.models.presets import PRESETS, preset
from w2sjax.models.transformer import (
    PARTITION_RULES,
    ModelConfig,
    Transformer,
    init_params,
    make_apply_fn,
    make_policy,
)

__all__ = [
    "PARTITION_RULES",
    "PRESETS",
    "ModelConfig",
    "Transformer",
    "init_params",
    "make_apply_fn",
    "make_policy",
    "preset",
]

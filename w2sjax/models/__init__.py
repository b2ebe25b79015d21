"""Models: a decoder-only transformer behind plain functions, and named shapes."""

from w2sjax.models.config import Lora, ModelConfig, RopeScaling
from w2sjax.models.hf import load_hf, read_config, save_hf
from w2sjax.models.lora import load_peft, merge_lora, save_peft, without_adapters
from w2sjax.models.memory import MemoryPlan, plan_memory
from w2sjax.models.policy import (
    abstract_params,
    init_params,
    make_apply_fn,
    make_policy,
    make_score_fn,
)
from w2sjax.models.presets import PRESETS, PUBLISHED, preset
from w2sjax.models.transformer import PARTITION_RULES, Transformer

__all__ = [
    "PARTITION_RULES",
    "PRESETS",
    "PUBLISHED",
    "Lora",
    "MemoryPlan",
    "ModelConfig",
    "RopeScaling",
    "Transformer",
    "abstract_params",
    "init_params",
    "load_hf",
    "load_peft",
    "make_apply_fn",
    "make_policy",
    "make_score_fn",
    "merge_lora",
    "plan_memory",
    "preset",
    "read_config",
    "save_hf",
    "save_peft",
    "without_adapters",
]

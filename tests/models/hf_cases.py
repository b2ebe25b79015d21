"""Small random checkpoints of every family, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMON = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    attn_implementation="eager",
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GEMMA = dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=5)

# name → (config class of transformers, its fields beside `COMMON`)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", dict(num_key_value_heads=4)),
    "llama3": (
        "LlamaConfig",
        dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, head_dim=12),
    ),
    "llama_biases": (
        "LlamaConfig",
        dict(
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        ),
    ),
    "mistral": ("MistralConfig", dict(sliding_window=6)),
    "mistral_global": ("MistralConfig", dict(sliding_window=None)),
    "qwen2": ("Qwen2Config", dict(tie_word_embeddings=True)),
    "qwen2_window": (
        "Qwen2Config",
        dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen3": ("Qwen3Config", dict(head_dim=16)),
    "gemma2": ("Gemma2Config", dict(**_GEMMA, attn_logit_softcapping=5.0,
                                    final_logit_softcapping=3.0)),
    "gemma3": (
        "Gemma3TextConfig",
        dict(
            **_GEMMA,
            num_hidden_layers=4,
            layer_types=["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": {
                    "rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        ),
    ),
}  # fmt: skip


def make_torch_model(name: str, **changes: Any) -> Any:
    """A random model of the case, in float32; norms and biases drawn as well, or they would hide
    mistakes.
    """
    import torch
    import transformers

    kind, fields = CASES[name]
    config = getattr(transformers, kind)(**(COMMON | fields | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
            else:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


def write_checkpoint(path: Path, name: str, **changes: Any) -> Any:
    """Saves the case's model there, and returns it."""
    model = make_torch_model(name, **changes)
    model.save_pretrained(path)
    return model

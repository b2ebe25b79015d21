"""Named model shapes: from a toy for tests up to a billion parameters, and published models.

| preset | layers × width | heads (key/value) | MLP | parameters, without embeddings | meant for |
|---|---|---|---|---|---|
| `tiny` | 1 × 32 | 2 (1) | 64 | 9.3 k | tests |
| `xs` | 2 × 64 | 4 (2) | 192 | 98.6 k | the weak agent on a CPU |
| `s` | 2 × 128 | 4 (2) | 384 | 394 k | the strong model on a CPU |
| `m` | 4 × 192 | 6 (2) | 576 | 1.72 M | more patience |
| `l` | 6 × 320 | 8 (2) | 960 | 7.07 M | an accelerator, or a night |
| `100m` | 12 × 768 | 12 (4) | 2048 | 75.5 M | one accelerator |
| `1b` | 16 × 2048 | 32 (8) | 8192 | 973 M | Llama 3.2 1B's shape |

Embeddings add `vocab_size × width` (twice that where they are not tied).

`PUBLISHED` holds the shapes of published models as their `config.json` says them, their own
vocabulary among them: enough to plan a run (`models.plan_memory`) without a checkpoint.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from w2sjax.models.config import ModelConfig, RopeScaling

_NOMINAL_VOCAB = 512  # presets say the shape; the tokenizer says the vocabulary (see `preset`)


def _shape(layers: int, width: int, heads: int, kv_heads: int, mlp: int, **more) -> ModelConfig:
    return ModelConfig(
        vocab_size=_NOMINAL_VOCAB,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_width=mlp,
        # Few layers run fastest written out, and many compile fastest as a loop.
        unroll=layers if layers <= 6 else 1,
        **more,
    )


_FROM_SCRATCH: dict[str, ModelConfig] = {
    "tiny": _shape(1, 32, 2, 1, 64),
    "xs": _shape(2, 64, 4, 2, 192),
    "s": _shape(2, 128, 4, 2, 384),
    "m": _shape(4, 192, 6, 2, 576),
    "l": _shape(6, 320, 8, 2, 960, max_length=1024),
    "100m": _shape(12, 768, 12, 4, 2048, max_length=2048),
    "1b": _shape(16, 2048, 32, 8, 8192, max_length=4096, rope_theta=500_000.0, remat="full"),
}


def _published(
    family: str,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    vocab_size: int,
    max_length: int,
    **more,
) -> ModelConfig:
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_width=mlp,
        max_length=max_length,
        remat="full",
        **({"tie_embeddings": False} | more),
    )


_LLAMA_3_1 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
_QWEN_2_5 = dict(rope_theta=1_000_000.0, norm_eps=1e-6, qkv_bias=True)

PUBLISHED: dict[str, ModelConfig] = {
    "llama-2-7b": _published("llama", 32, 4096, 32, 32, 11008, 32_000, 4096),
    "llama-2-13b": _published("llama", 40, 5120, 40, 40, 13824, 32_000, 4096),
    "llama-3.1-8b": _published(
        "llama", 32, 4096, 32, 8, 14336, 128_256, 131_072,
        rope_theta=500_000.0, rope_scaling=_LLAMA_3_1,
    ),
    "qwen2.5-1.5b": _published(
        "qwen2", 28, 1536, 12, 2, 8960, 151_936, 131_072, tie_embeddings=True, **_QWEN_2_5
    ),
    "qwen2.5-7b": _published("qwen2", 28, 3584, 28, 4, 18944, 152_064, 131_072, **_QWEN_2_5),
    "qwen3-8b": _published(
        "qwen3", 36, 4096, 32, 8, 12288, 151_936, 40_960,
        head_width=128, rope_theta=1_000_000.0, norm_eps=1e-6, qk_norm=True,
    ),
}  # fmt: skip

PRESETS: dict[str, ModelConfig] = _FROM_SCRATCH | PUBLISHED


def preset(name: str, *, vocab_size: int | None = None, **changes: Any) -> ModelConfig:
    """A preset with a vocabulary, and any field changed.

    Args:
      name: a key of `PRESETS`.
      vocab_size: tokens of the tokenizer. None takes the model's own, which `PUBLISHED` ones have.
      **changes: other fields of `ModelConfig`.

    Returns:
      The config.

    Raises:
      ValueError: unknown name (the message lists the known ones), a preset without a vocabulary
        where none is given, or an impossible value.
      TypeError: a change that names no field.

    Example:
      >>> preset("s", vocab_size=400, max_length=256).num_params
      445056
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}; known: {', '.join(PRESETS)}")
    if vocab_size is None:
        if name not in PUBLISHED:
            raise ValueError(
                f"model preset {name!r} has no vocabulary of its own; give vocab_size, the number "
                "of tokens of the tokenizer"
            )
        vocab_size = PUBLISHED[name].vocab_size
    return dataclasses.replace(PRESETS[name], vocab_size=vocab_size, **changes)

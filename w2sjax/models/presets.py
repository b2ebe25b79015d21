"""Named model shapes, from a toy for tests up to one with a billion parameters.

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
"""

from __future__ import annotations

import dataclasses
from typing import Any

from w2sjax.models.config import ModelConfig

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


PRESETS: dict[str, ModelConfig] = {
    "tiny": _shape(1, 32, 2, 1, 64),
    "xs": _shape(2, 64, 4, 2, 192),
    "s": _shape(2, 128, 4, 2, 384),
    "m": _shape(4, 192, 6, 2, 576),
    "l": _shape(6, 320, 8, 2, 960, max_length=1024),
    "100m": _shape(12, 768, 12, 4, 2048, max_length=2048),
    "1b": _shape(16, 2048, 32, 8, 8192, max_length=4096, rope_theta=500_000.0, remat="full"),
}


def preset(name: str, *, vocab_size: int, **changes: Any) -> ModelConfig:
    """A preset with the tokenizer's vocabulary, and any field changed.

    Args:
      name: a key of `PRESETS`.
      vocab_size: tokens of the tokenizer.
      **changes: other fields of `ModelConfig`.

    Returns:
      The config.

    Raises:
      ValueError: unknown name (the message lists the known ones) or an impossible value.
      TypeError: a change that names no field.

    Example:
      >>> preset("s", vocab_size=400, max_length=256).num_params
      445056
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}; known: {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], vocab_size=vocab_size, **changes)

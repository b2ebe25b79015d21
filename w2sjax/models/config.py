"""The shape of a model: one record for all families, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp

_DTYPES = ("auto", "float32", "bfloat16")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
REMAT_POLICIES = ("none", "full", "dots", "attention")
ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "tree", "pallas", "cudnn", "splash")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary wavelengths are stretched for contexts longer than those pretrained on.

    Attributes:
      kind: "linear" (all by `factor`) or "llama3" (long ones by `factor`, short ones not at all,
        those between gradually; Llama 3.1's rule).
      factor: how much.
      low_freq_factor, high_freq_factor: wavelengths above `original_length / low_freq_factor` are
        long, below `original_length / high_freq_factor` short; "llama3" alone.
      original_length: context that the model was pretrained on; "llama3" alone.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"RopeScaling.kind must be linear or llama3, got {self.kind!r}")
        for field in ("factor", "low_freq_factor", "original_length"):
            if not getattr(self, field) > 0:
                raise ValueError(f"RopeScaling.{field} must be > 0, got {getattr(self, field)!r}")
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"RopeScaling.high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside frozen projections: y = W·x + (α / rank)·B·A·dropout(x)
    (arXiv 2106.09685).

    Attributes:
      rank: inner width of the adapters.
      alpha: α.
      dropout: probability that a feature of an adapter's input is zeroed in training.
      targets: regex; projections whose path ("attention/query", "mlp/down", …) it is found in get
        an adapter.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "attention/(query|key|value|output)"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"Lora.rank must be a whole number >= 1, got {self.rank!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Lora.dropout must be in [0, 1), got {self.dropout!r}")
        try:
            found = [name for name in PROJECTIONS if re.search(self.targets, name)]
        except re.error as error:
            raise ValueError(f"Lora.targets={self.targets!r} is no regex: {error}") from None
        if not found:
            raise ValueError(
                f"Lora.targets={self.targets!r} names no projection; there are "
                f"{', '.join(PROJECTIONS)}"
            )

    def adapts(self, path: str) -> bool:
        """Whether the projection at this path of a block gets an adapter."""
        return path in PROJECTIONS and re.search(self.targets, path) is not None

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.alpha / self.rank


PROJECTIONS = (
    *(f"attention/{name}" for name in ("query", "key", "value", "output")),
    *(f"mlp/{name}" for name in ("gate", "up", "down")),
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Impossible values fail here, with the field's name.

    The defaults are the Llama family's; `models.load_hf` fills in what other families do.

    Attributes:
      vocab_size: tokens (V).
      width: features of the residual stream (D).
      num_layers: blocks.
      num_heads: query heads (H).
      num_kv_heads: key/value heads (K); divides `num_heads`.
      mlp_width: hidden features of the gated MLP.
      max_length: longest context, in tokens, that the model is meant for.
      head_width: features of one head (E), even; None means `width / num_heads`.
      activation: of the MLP's gate.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: how they are stretched; None leaves them.
      local_rope_theta: base in local layers, never stretched; None means as in the others.
      window: tokens that a local layer sees, the token itself included; None where all are global.
      local_layers: per layer whether it is local; () means all, where `window` is given.
      norm_eps: added to the mean square inside RMSNorm.
      norm_plus_one: a norm's scale is 1 + its parameter (Gemma).
      qk_norm: queries and keys are normed per head, before they are rotated (Qwen 3, Gemma 3).
      post_norms: attention and MLP are normed once more before they are added (Gemma).
      qkv_bias, output_bias, mlp_bias: which projections have biases.
      attention_scale: multiplies the scores; None means `head_size ** -0.5`.
      attention_softcap: c, scores become c·tanh(score / c); None leaves them (Gemma 2).
      logit_softcap: the same for the logits.
      embedding_scale: multiplies the embeddings (Gemma: √D).
      tie_embeddings: the output layer is the transposed embedding.
      param_dtype: "float32" or "bfloat16", what parameters are stored in.
      compute_dtype: "float32", "bfloat16", or "auto": float32 on CPU, bfloat16 elsewhere.
      remat: what the backward pass computes again: "none", "full" (each block), "dots" (all but
        matrix products with parameters), "attention" (scores and their sums alone).
      unroll: layers per step of the loop over layers; 1 compiles fastest for deep models.
      attention: how rows are attended: "xla" (scores of a whole row), "tree" (in tiles of what is
        visible), "pallas" (the same as a kernel, on GPU and TPU), "cudnn" (GPU), "splash" (TPU), or
        "auto", which picks by backend.
      lora: adapters; None for a plain model.
      family: Hugging Face's name of the architecture, in which `models.save_hf` writes the model.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    max_length: int = 512
    head_width: int | None = None
    activation: str = "silu"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    window: int | None = None
    local_layers: tuple[bool, ...] = ()
    norm_eps: float = 1e-5
    norm_plus_one: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    tie_embeddings: bool = True
    param_dtype: str = "float32"
    compute_dtype: str = "auto"
    remat: str = "none"
    unroll: int = 1
    attention: str = "auto"
    lora: Lora | None = None
    family: str = "llama"

    def __post_init__(self) -> None:
        for field in (
            "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "mlp_width",
            "max_length", "unroll",
        ):  # fmt: skip
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"ModelConfig.{field} must be a whole number >= 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig.num_kv_heads={self.num_kv_heads} must divide "
                f"num_heads={self.num_heads}"
            )
        if self.head_width is None and self.width % self.num_heads:
            raise ValueError(
                f"ModelConfig.num_heads={self.num_heads} must divide width={self.width}, "
                "or head_width must be given"
            )
        if self.head_size < 2 or self.head_size % 2:
            raise ValueError(
                f"ModelConfig.head_width must be even and >= 2 (rotary pairs), got {self.head_size}"
            )
        for field in (
            "rope_theta", "local_rope_theta", "norm_eps", "window", "attention_scale",
            "attention_softcap", "logit_softcap",
        ):  # fmt: skip
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"ModelConfig.{field} must be > 0, got {value!r}")
        object.__setattr__(self, "local_layers", tuple(map(bool, self.local_layers)))
        if self.local_layers and len(self.local_layers) != self.num_layers:
            raise ValueError(
                f"ModelConfig.local_layers has {len(self.local_layers)} entries for "
                f"num_layers={self.num_layers}"
            )
        if self.window is None and (any(self.local_layers) or self.local_rope_theta is not None):
            raise ValueError("ModelConfig.local_layers and local_rope_theta need a window")
        for field, known in (
            ("activation", ACTIVATIONS),
            ("param_dtype", _DTYPES[1:]),
            ("compute_dtype", _DTYPES),
            ("remat", REMAT_POLICIES),
            ("attention", ATTENTION_IMPLEMENTATIONS),
        ):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"ModelConfig.{field} must be one of {known}, got {getattr(self, field)!r}"
                )

    @property
    def head_size(self) -> int:
        """Features of one head (E)."""
        return self.width // self.num_heads if self.head_width is None else self.head_width

    @property
    def is_local(self) -> tuple[bool, ...]:
        """Per layer, whether it sees `window` tokens alone."""
        return self.local_layers or (self.window is not None,) * self.num_layers

    @property
    def dtype(self) -> jnp.dtype:
        """What the blocks compute in; "auto" looks at the default backend."""
        name = self.compute_dtype
        if name == "auto":
            name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return jnp.dtype(name)

    @property
    def num_params(self) -> int:
        """How many parameters a model of this shape has, adapters not counted."""
        head, queries, keys = self.head_size, self.num_heads, self.num_kv_heads
        layer = 2 * self.width * head * (queries + keys) + 3 * self.width * self.mlp_width
        layer += self.width * (4 if self.post_norms else 2)
        layer += self.qk_norm * 2 * head + self.qkv_bias * head * (queries + 2 * keys)
        layer += self.output_bias * self.width + self.mlp_bias * (2 * self.mlp_width + self.width)
        embeddings = self.vocab_size * self.width * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.width

    def rope_frequencies(self, *, local: bool) -> tuple[float, ...]:
        """Radians per position of each rotary pair, E / 2 of them."""
        theta, scaling = self.rope_theta, self.rope_scaling
        if local and self.local_rope_theta is not None:
            theta, scaling = self.local_rope_theta, None
        half = self.head_size // 2
        frequencies = [theta ** (-pair / half) for pair in range(half)]
        if scaling is None:
            return tuple(frequencies)
        return tuple(_stretched(frequency, scaling) for frequency in frequencies)


def _stretched(frequency: float, scaling: RopeScaling) -> float:
    """A frequency after `RopeScaling`."""
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.original_length * frequency / (2 * math.pi)  # over the pretrained context
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = min(max(share, 0.0), 1.0)
    return share * frequency + (1 - share) * frequency / scaling.factor

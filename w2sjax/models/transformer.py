"""One decoder-only transformer for all families, in Flax Linen.

Rotary positions, RMSNorm, a gated MLP, grouped-query attention; what Llama, Mistral, Qwen and Gemma
do differently is said by `ModelConfig`. The forward pass takes rows of packed sequences or of token
trees (`subtree_end`); the cached pass decodes chunks slot by slot. Both run the same modules.

Layers are stacked: every parameter of a block has a leading axis over layers
(`layers/attention/query/kernel` is [N, D, H, E]), and the forward pass loops over it.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from w2sjax.models import attention
from w2sjax.models.config import ModelConfig
from w2sjax.models.head import token_logps
from w2sjax.models.tree_kernels import default_block
from w2sjax.types import PackedBatch

# Ordered (regex over the parameter path → PartitionSpec), plain data for `w2sjax.parallel.rules`.
# Mesh axes: `fsdp` splits what every device would otherwise store whole, `tensor` splits heads, the
# hidden layer of the MLP, and the vocabulary. Adapters are small: they are split where the product
# that they are added to is.
PARTITION_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding$", PartitionSpec("tensor", "fsdp")),
    (r"attention/(query|key|value)/kernel$", PartitionSpec(None, "fsdp", "tensor", None)),
    (r"attention/(query|key|value)/bias$", PartitionSpec(None, "tensor", None)),
    (r"attention/output/kernel$", PartitionSpec(None, "tensor", None, "fsdp")),
    (r"mlp/(gate|up)/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"mlp/(gate|up)/bias$", PartitionSpec(None, "tensor")),
    (r"mlp/down/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"(query|key|value|gate|up|down|output)/lora_a$", PartitionSpec()),
    (r"(query|key|value)/lora_b$", PartitionSpec(None, None, "tensor", None)),
    (r"(gate|up)/lora_b$", PartitionSpec(None, None, "tensor")),
    (r"(output|down)/lora_b$", PartitionSpec()),
    (r"head/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(output|down)/bias$", PartitionSpec()),
    (r"norm/scale$", PartitionSpec()),
)

# How activations are split, by the same axes; see `constrained`.
_STREAM = PartitionSpec(("data", "fsdp"), None, None)  # [S, L, D]
_HEADS = PartitionSpec(("data", "fsdp"), None, "tensor", None)  # [S, L, H, E]
_HIDDEN = PartitionSpec(("data", "fsdp"), None, "tensor")  # [S, L, F]
CACHE = PartitionSpec(("data", "fsdp"), "tensor", None, None)  # [S, K, …], keys and values

# What a block keeps for its backward pass; None keeps its input alone.
_REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# One for all layers, or one for the global and one for the local layers, in this order.
Views = tuple[attention.View, ...]

_ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}


def constrained(x: chex.Array, spec: PartitionSpec) -> chex.Array:
    """Says how an activation is split, where a mesh with the project's axes is set
    (`jax.set_mesh`). Elsewhere, and for rows that the mesh cannot split, the compiler chooses.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or "fsdp" not in mesh.shape:
        return x
    for dimension, axes in zip(x.shape, spec, strict=True):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        ways = 1
        for axis in axes:
            ways *= mesh.shape[axis]
        if dimension % ways:
            return x
    return jax.lax.with_sharding_constraint(x, spec)


class RMSNorm(nn.Module):
    """Divides by the root mean square of the features, then scales each feature."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """float [..., D] → float [..., D] in the compute dtype; computed in float32."""
        config = self.config
        init = nn.initializers.zeros if config.norm_plus_one else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(config.param_dtype))
        scale = scale.astype(jnp.float32) + float(config.norm_plus_one)
        x = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps)
        return (normed * scale).astype(config.dtype)


class Projection(nn.Module):
    """A linear map of the trailing axes, with the adapter that `ModelConfig.lora` asks for.

    Attributes:
      config: the model's shape.
      site: which projection this is ("attention/query"), for `Lora.targets`.
      inputs: shape of the axes that are summed over.
      outputs: shape of the axes that come instead.
      bias: whether it has one.
      variance: of the initial values, times the number of inputs.
    """

    config: ModelConfig
    site: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bias: bool = False
    variance: float = 1.0

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """float [..., *inputs] → float [..., *outputs] in the compute dtype."""
        config, dtype = self.config, jnp.dtype(self.config.param_dtype)
        num_inputs = len(self.inputs)
        axes = tuple(range(-num_inputs, 0)), tuple(range(num_inputs))
        init = nn.initializers.variance_scaling(
            self.variance,
            "fan_in",
            "normal",
            in_axis=axes[1],
            out_axis=tuple(range(num_inputs, num_inputs + len(self.outputs))),
        )
        kernel = self.param("kernel", init, self.inputs + self.outputs, dtype)
        x = x.astype(config.dtype)
        y = jnp.tensordot(x, kernel.astype(config.dtype), axes)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.outputs, dtype)
            y = y + bias.astype(config.dtype)
        lora = config.lora
        if lora is None or not lora.adapts(self.site):
            return y

        def adapter(name: str, shape: tuple[int, ...], make: Any) -> chex.Array:
            def draw() -> chex.Array:
                return make(self.make_rng("params"), shape, jnp.float32)

            return self.variable("lora", name, draw).value.astype(config.dtype)

        # As Hugging Face's PEFT starts them: Kaiming-uniform A, zero B.
        bounded = nn.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", in_axis=axes[1], out_axis=num_inputs
        )
        a = adapter("lora_a", (*self.inputs, lora.rank), bounded)
        b = adapter("lora_b", (lora.rank, *self.outputs), nn.initializers.zeros)
        if lora.dropout and self.has_rng("dropout"):
            x = nn.Dropout(lora.dropout, deterministic=False)(x)
        return y + jnp.tensordot(jnp.tensordot(x, a, axes), b, 1) * lora.scale


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over the row itself or over a cache."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config

        def heads(name: str, number: int) -> Projection:
            shape = (number, config.head_size)
            return Projection(
                config, f"attention/{name}", (config.width,), shape, bias=config.qkv_bias
            )

        self.query = heads("query", config.num_heads)
        self.key = heads("key", config.num_kv_heads)
        self.value = heads("value", config.num_kv_heads)
        # Residual branches add up over depth: start each with 1 / (2 * layers) of the variance.
        self.output = Projection(
            config,
            "attention/output",
            (config.num_heads, config.head_size),
            (config.width,),
            bias=config.output_bias,
            variance=0.5 / config.num_layers,
        )
        if config.qk_norm:
            self.query_norm, self.key_norm = RMSNorm(config), RMSNorm(config)

    def __call__(
        self,
        x: chex.Array,
        is_local: chex.Array | bool,
        views: Views,
        cache: attention.Cache | None = None,
    ) -> tuple[chex.Array, attention.Cache | None]:
        """x [S, L, D] → [S, L, D]; with a cache, keys and values are written there first."""
        config = self.config
        query, key, value = self.query(x), self.key(x), self.value(x)
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (constrained(heads, _HEADS) for heads in (query, key, value))
        attend = functools.partial(
            attention.attend_view,
            query,
            key,
            value,
            cache=cache,
            scale=config.attention_scale or config.head_size**-0.5,
            softcap=config.attention_softcap,
        )
        if (
            config.remat == "attention" and views[0].implementation == "xla"
        ):  # others keep no scores
            attend = jax.checkpoint(attend)
        if len(views) == 1:
            mixed, cache = attend(views[0])
        elif isinstance(is_local, bool):
            mixed, cache = attend(views[is_local])
        else:
            # Keeps the inputs alone for the backward pass, not what both branches would keep.
            globally, locally = (functools.partial(jax.checkpoint(attend), view) for view in views)
            mixed, cache = jax.lax.cond(is_local, locally, globally)
        return self.output(constrained(mixed, _HEADS)), cache


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))` (arXiv 2002.05202)."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        into = functools.partial(
            Projection,
            config,
            inputs=(config.width,),
            outputs=(config.mlp_width,),
            bias=config.mlp_bias,
        )
        self.gate, self.up = into("mlp/gate"), into("mlp/up")
        self.down = Projection(
            config,
            "mlp/down",
            (config.mlp_width,),
            (config.width,),
            bias=config.mlp_bias,
            variance=0.5 / config.num_layers,
        )

    def __call__(self, x: chex.Array) -> chex.Array:
        """float [S, L, D] → float [S, L, D]."""
        gate = _ACTIVATIONS[self.config.activation](self.gate(x))
        hidden = constrained(gate * self.up(x), _HIDDEN)
        return self.down(hidden)


class Block(nn.Module):
    """One layer: attention, then the MLP, each on a normed copy and added to the stream."""

    config: ModelConfig

    def setup(self) -> None:
        self.attention_norm = RMSNorm(self.config)
        self.attention = Attention(self.config)
        self.mlp_norm = RMSNorm(self.config)
        self.mlp = GatedMLP(self.config)
        if self.config.post_norms:
            self.attention_post_norm = RMSNorm(self.config)
            self.mlp_post_norm = RMSNorm(self.config)

    def __call__(
        self,
        x: chex.Array,
        is_local: chex.Array | bool,
        views: Views,
        cache: attention.Cache | None = None,
    ) -> tuple[chex.Array, attention.Cache | None]:
        """float [S, L, D] → float [S, L, D], and the updated cache where one was given."""
        x = constrained(x, _STREAM)
        mixed, cache = self.attention(self.attention_norm(x), is_local, views, cache)
        x = x + (self.attention_post_norm(mixed) if self.config.post_norms else mixed)
        changed = self.mlp(self.mlp_norm(x))
        x = x + (self.mlp_post_norm(changed) if self.config.post_norms else changed)
        return constrained(x, _STREAM), cache


class Transformer(nn.Module):
    """The decoder: `__call__` gives all logits, `score` the log-probabilities that a loss needs;
    `embed_tokens` and `logits` are the ends of the cached pass (`models.policy`).
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.embed = nn.Embed(
            config.vocab_size,
            config.width,
            dtype=config.dtype,
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=nn.initializers.normal(config.width**-0.5),
        )
        block = Block
        if config.remat in _REMAT_POLICIES:
            block = nn.remat(Block, prevent_cse=False, policy=_REMAT_POLICIES[config.remat])
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=config.num_layers,
            unroll=min(config.unroll, config.num_layers),
        )(config)
        self.final_norm = RMSNorm(config)
        if not config.tie_embeddings:
            self.head = Projection(config, "head", (config.width,), (config.vocab_size,))

    def __call__(
        self, tokens: chex.Array, positions: chex.Array, subtree_end: chex.Array | None
    ) -> chex.Array:
        """int32 [S, L], [S, L] and [S, L] or None → logits float32 [S, L, V]."""
        return self.logits(self.stream(tokens, positions, subtree_end))

    def score(self, batch: PackedBatch) -> chex.Array:
        """float32 [S, L], log-probabilities of the tokens that are to be learned, 0 elsewhere."""
        config = self.config
        x = self.final_norm(self.stream(batch.tokens, batch.positions, batch.subtree_end))
        if config.tie_embeddings:
            table = self.embed.embedding
        else:
            table = self.head.get_variable("params", "kernel").T
        return token_logps(
            x,
            table.astype(config.dtype),
            batch.tokens,
            batch.predecessor,
            batch.loss_count > 0,
            softcap=config.logit_softcap,
        )

    def stream(
        self, tokens: chex.Array, positions: chex.Array, subtree_end: chex.Array | None
    ) -> chex.Array:
        """The residual stream after the last block, float [S, L, D]."""
        config = self.config
        implementation = attention.resolve(
            config.attention,
            dtype=config.dtype,
            softcap=config.attention_softcap,
            packed=subtree_end is not None,
        )
        block = None
        if implementation == "pallas":
            block = default_block(
                jax.default_backend(),
                dtype=config.dtype,
                width=config.head_size,
                group=config.num_heads // config.num_kv_heads,
            )
        views = tuple(
            attention.row_view(
                positions,
                subtree_end,
                frequencies=config.rope_frequencies(local=local),
                window=config.window if local else None,
                implementation=implementation,
                block=block,
            )
            for local in sorted(set(config.is_local))
        )
        return self.layers(self.embed_tokens(tokens), jnp.asarray(config.is_local), views)[0]

    def embed_tokens(self, tokens: chex.Array) -> chex.Array:
        """int32 [S, L] → float [S, L, D]."""
        x = self.embed(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        return constrained(x, _STREAM)

    def logits(self, x: chex.Array) -> chex.Array:
        """float [S, L, D] → float32 [S, L, V]."""
        config = self.config
        x = self.final_norm(x)
        if config.tie_embeddings:
            table = self.embed.embedding.astype(config.dtype)
            scores = jnp.einsum("sld,vd->slv", x, table, preferred_element_type=jnp.float32)
        else:
            scores = self.head(x).astype(jnp.float32)
        if config.logit_softcap is not None:
            scores = config.logit_softcap * jnp.tanh(scores / config.logit_softcap)
        return scores

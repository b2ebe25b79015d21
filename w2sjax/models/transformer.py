"""One decoder-only transformer of the Llama family's shape, as plain functions over its parameters.

Rotary positions, RMSNorm before each block, SwiGLU, grouped-query attention, optionally tied
embeddings. The forward pass takes rows of packed sequences or of token trees (`subtree_end`); the
cached pass decodes chunks slot by slot. Both run the same Linen modules.

Layers are a plain Python loop: for the few layers of the built-in presets that compiles as fast as
a scan, and every layer has its own path in the parameters (`layers_0/attention/query/kernel`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from w2sjax.models import attention
from w2sjax.types import Policy

_OWN_DRAW = 2**20  # arrays of at least this many values are drawn on their own by `init_params`
_DTYPES = ("auto", "float32", "bfloat16")

# Ordered (regex over the parameter path → PartitionSpec), plain data for `w2sjax.parallel.rules`.
# Mesh axes: `fsdp` splits what every device would otherwise store whole, `tensor` splits heads, the
# hidden layer of the MLP, and the vocabulary.
PARTITION_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding$", PartitionSpec("tensor", "fsdp")),
    (r"attention/(query|key|value)/kernel$", PartitionSpec("fsdp", "tensor", None)),
    (r"attention/output/kernel$", PartitionSpec("tensor", None, "fsdp")),
    (r"mlp/(gate|up)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"mlp/down/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"head/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"norm/scale$", PartitionSpec()),
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Impossible values fail here, with the field's name.

    Attributes:
      vocab_size: tokens (V).
      width: features of the residual stream (D).
      num_layers: blocks.
      num_heads: query heads (H).
      num_kv_heads: key/value heads (K); divides `num_heads`.
      mlp_width: hidden features of the SwiGLU block.
      max_length: longest context, in tokens, that the model is meant for.
      head_width: features of one head (E), even; None means `width / num_heads`.
      rope_theta: base of the rotary wavelengths.
      norm_eps: added to the mean square inside RMSNorm.
      tie_embeddings: the output layer is the transposed embedding.
      param_dtype: "float32" or "bfloat16", what parameters are stored in.
      compute_dtype: "float32", "bfloat16", or "auto": float32 on CPU, bfloat16 elsewhere.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    max_length: int = 512
    head_width: int | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    param_dtype: str = "float32"
    compute_dtype: str = "auto"
    remat: bool = False

    def __post_init__(self) -> None:
        for field in (
            "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "mlp_width",
            "max_length",
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
        for field in ("rope_theta", "norm_eps"):
            if not getattr(self, field) > 0:
                raise ValueError(f"ModelConfig.{field} must be > 0, got {getattr(self, field)!r}")
        if self.param_dtype not in _DTYPES[1:]:
            raise ValueError(
                f"ModelConfig.param_dtype must be one of {_DTYPES[1:]}, got {self.param_dtype!r}"
            )
        if self.compute_dtype not in _DTYPES:
            raise ValueError(
                f"ModelConfig.compute_dtype must be one of {_DTYPES}, got {self.compute_dtype!r}"
            )

    @property
    def head_size(self) -> int:
        """Features of one head (E)."""
        return self.width // self.num_heads if self.head_width is None else self.head_width

    @property
    def dtype(self) -> jnp.dtype:
        """What the blocks compute in; "auto" looks at the default backend."""
        name = self.compute_dtype
        if name == "auto":
            name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return jnp.dtype(name)

    @property
    def num_params(self) -> int:
        """How many parameters a model of this shape has."""
        attention_size = 2 * self.width * self.head_size * (self.num_heads + self.num_kv_heads)
        layer = attention_size + 3 * self.width * self.mlp_width + 2 * self.width
        embeddings = self.vocab_size * self.width * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.width


class RMSNorm(nn.Module):
    """Divides by the root mean square of the features, then scales each feature."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """float [..., D] → float [..., D] in the compute dtype; computed in float32."""
        dtype = jnp.dtype(self.config.param_dtype)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), dtype)
        x = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.norm_eps)
        return (normed * scale.astype(jnp.float32)).astype(self.config.dtype)


def _projection(
    config: ModelConfig, features: int | tuple[int, ...], *, axis: Any = -1, scale: float = 1.0
) -> nn.DenseGeneral:
    """A linear map without bias; `scale` multiplies the variance of its initial values."""
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=False,
        dtype=config.dtype,
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nn.initializers.variance_scaling(scale, "fan_in", "normal"),
    )


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over the row itself or over a cache."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.query = _projection(config, (config.num_heads, config.head_size))
        self.key = _projection(config, (config.num_kv_heads, config.head_size))
        self.value = _projection(config, (config.num_kv_heads, config.head_size))
        # Residual branches add up over depth: start each with 1 / (2 * layers) of the variance.
        self.output = _projection(
            config, config.width, axis=(-2, -1), scale=0.5 / config.num_layers
        )

    def __call__(
        self,
        x: chex.Array,
        positions: chex.Array,
        mask: chex.Array,
        cache: tuple[chex.Array, chex.Array] | None = None,
        valid: chex.Array | None = None,
    ) -> tuple[chex.Array, tuple[chex.Array, chex.Array] | None]:
        """x [S, L, D], positions [S, L], mask [S, L, M]; with a cache, M is its length."""
        config = self.config
        query = attention.rotary(self.query(x), positions, theta=config.rope_theta)
        key = attention.rotary(self.key(x), positions, theta=config.rope_theta)
        value = self.value(x)
        if cache is None:
            keys, values = jnp.transpose(key, (0, 2, 3, 1)), jnp.swapaxes(value, 1, 2)
            mixed = attention.attend_backwards(query, keys, values, mask)
        else:
            keys, values = cache = attention.write_cache(cache, key, value, positions, valid)
            mixed = attention.attend(query, keys, values, mask)
        return self.output(mixed), cache


class GatedMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))` (arXiv 2002.05202)."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.gate = _projection(config, config.mlp_width)
        self.up = _projection(config, config.mlp_width)
        self.down = _projection(config, config.width, scale=0.5 / config.num_layers)

    def __call__(self, x: chex.Array) -> chex.Array:
        """float [S, L, D] → float [S, L, D]."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: attention, then the MLP, each on a normed copy and added to the stream."""

    config: ModelConfig

    def setup(self) -> None:
        self.attention_norm = RMSNorm(self.config)
        self.attention = Attention(self.config)
        self.mlp_norm = RMSNorm(self.config)
        self.mlp = GatedMLP(self.config)

    def __call__(
        self,
        x: chex.Array,
        positions: chex.Array,
        mask: chex.Array,
        cache: tuple[chex.Array, chex.Array] | None = None,
        valid: chex.Array | None = None,
    ) -> tuple[chex.Array, tuple[chex.Array, chex.Array] | None]:
        """float [S, L, D] → float [S, L, D], and the updated cache where one was given."""
        mixed, cache = self.attention(self.attention_norm(x), positions, mask, cache, valid)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Transformer(nn.Module):
    """The decoder. `__call__` is the full forward pass, `decode` the cached one."""

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
        block = nn.remat(Block) if config.remat else Block
        self.layers = [block(config) for _ in range(config.num_layers)]
        self.final_norm = RMSNorm(config)
        if not config.tie_embeddings:
            self.head = _projection(config, config.vocab_size)

    def __call__(
        self, tokens: chex.Array, positions: chex.Array, subtree_end: chex.Array
    ) -> chex.Array:
        """int32 [S, L] three times → logits float32 [S, L, V]."""
        mask = attention.subtree_mask(subtree_end)
        x = self.embed(tokens)
        for layer in self.layers:
            x, _ = layer(x, positions, mask)
        return self._logits(x)

    def decode(
        self, cache: Any, tokens: chex.Array, start: chex.Array, last: chex.Array
    ) -> tuple[chex.Array, Any]:
        """One chunk per slot on top of the cache; see `make_policy`."""
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = start[:, None] + index
        valid = index <= last[:, None]
        mask = attention.cache_mask(positions, cache[0][1].shape[2])
        x = self.embed(tokens)
        updated = []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x, layer_cache = layer(x, positions, mask, layer_cache, valid)
            updated.append(layer_cache)
        x = jnp.take_along_axis(x, jnp.maximum(last, 0)[:, None, None], axis=1)
        return self._logits(x)[:, 0], tuple(updated)

    def _logits(self, x: chex.Array) -> chex.Array:
        x = self.final_norm(x)
        if not self.config.tie_embeddings:
            return self.head(x).astype(jnp.float32)
        table = self.embed.embedding.astype(self.config.dtype)
        return jnp.einsum("sld,vd->slv", x, table, preferred_element_type=jnp.float32)


def init_params(config: ModelConfig, key: chex.PRNGKey) -> chex.ArrayTree:
    """Draws a model's parameters: a pure function of (config, key).

    Kernels are normal with variance 1 / fan-in, those that write to the residual stream 1 / (2 *
    num_layers) of that; embeddings have variance 1 / width, norms are 1: the same laws as
    `Transformer.init`, whose draws, one for each array, take seconds to compile. Here small arrays
    share one draw; large ones have their own, which a sharded program can draw shard by shard.

    Args:
      config: the model's shape.
      key: PRNG key.

    Returns:
      Nested dict of arrays in `config.param_dtype`, with paths such as
      `layers_0/attention/query/kernel`.
    """
    rows = jnp.zeros((1, 1), jnp.int32)
    init = functools.partial(Transformer(config).init, jax.random.key(0))
    abstract = jax.eval_shape(init, rows, rows, rows)["params"]
    leaves, treedef = jax.tree.flatten_with_path(abstract)
    deviations = [_initial_deviation(config, path, leaf.shape) for path, leaf in leaves]
    shared_size = sum(
        leaf.size
        for (_, leaf), deviation in zip(leaves, deviations, strict=True)
        if deviation is not None and leaf.size < _OWN_DRAW
    )
    shared_draw = jax.random.normal(key, (shared_size,), jnp.float32)
    shared_draw = jax.lax.optimization_barrier(shared_draw)  # or XLA draws again for every slice
    arrays, offset = [], 0
    for index, ((_, leaf), deviation) in enumerate(zip(leaves, deviations, strict=True)):
        if deviation is None:
            arrays.append(jnp.ones(leaf.shape, leaf.dtype))
            continue
        if leaf.size < _OWN_DRAW:
            draw = shared_draw[offset : offset + leaf.size].reshape(leaf.shape)
            offset += leaf.size
        else:
            draw = jax.random.normal(jax.random.fold_in(key, index), leaf.shape, jnp.float32)
        arrays.append((draw * deviation).astype(leaf.dtype))
    return jax.tree.unflatten(treedef, arrays)


def _initial_deviation(config: ModelConfig, path: Any, shape: tuple[int, ...]) -> float | None:
    """Standard deviation of a parameter's initial values; None where it starts at 1."""
    *_, module, name = (entry.key for entry in path)
    if name == "scale":
        return None
    if name == "embedding":
        return config.width**-0.5
    fan_in = math.prod(shape[:2]) if module == "output" else shape[0]
    variance = 1.0 / fan_in
    if module in ("output", "down"):
        variance *= 0.5 / config.num_layers
    return variance**0.5


@functools.cache
def make_apply_fn(config: ModelConfig) -> Callable[..., chex.Array]:
    """The full forward pass as a plain function.

    Args:
      config: the model's shape.

    Returns:
      `apply_fn(params, tokens int32 [S, L], *, positions=None, subtree_end=None)` → logits float32
      [S, L, V]. Token i attends to token j of its row exactly when `j <= i < subtree_end[j]`.
      Without `positions` rows count from 0; without `subtree_end` a row is one whole sequence.
    """
    model = Transformer(config)

    def apply_fn(
        params: chex.ArrayTree,
        tokens: chex.Array,
        *,
        positions: chex.Array | None = None,
        subtree_end: chex.Array | None = None,
    ) -> chex.Array:
        chex.assert_rank(tokens, 2)
        if positions is None:
            index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            positions = jnp.broadcast_to(index, tokens.shape)
        if subtree_end is None:
            subtree_end = jnp.full(tokens.shape, tokens.shape[1], jnp.int32)
        chex.assert_equal_shape([tokens, positions, subtree_end])
        return model.apply({"params": params}, tokens, positions, subtree_end)

    return apply_fn


@functools.cache
def make_policy(config: ModelConfig) -> Policy:
    """The model as `w2sjax.types.Policy`: full pass, cache, cached pass.

    The cache is a tuple over layers of keys [slots, K, E, max_length] and values [slots, K,
    max_length, E] in the compute dtype. `decode_fn(params, cache, tokens [S, C], start [S], last
    [S])` writes chunk tokens 0 … last at positions start … start + last of their slot (tokens after
    `last`, and positions past the end of the cache, are not written; `last == -1` writes nothing),
    lets each token attend to all positions up to its own, and returns (logits float32 [S, V] of
    chunk token `last`, cache). Its caller keeps positions contiguous: what lies at `start` and
    later is overwritten before any token can see it. `resize_cache(cache, length)` keeps the first
    `length` positions, or adds empty ones.

    Equal configs get the same functions, so that whatever is jitted with them is compiled once.

    Args:
      config: the model's shape.

    Returns:
      A `Policy`; its functions are not jitted.
    """
    model = Transformer(config)

    def init_cache(num_slots: int, max_length: int) -> Any:
        lead = (num_slots, config.num_kv_heads)
        return tuple(
            (
                jnp.zeros((*lead, config.head_size, max_length), config.dtype),
                jnp.zeros((*lead, max_length, config.head_size), config.dtype),
            )
            for _ in range(config.num_layers)
        )

    def decode_fn(
        params: chex.ArrayTree,
        cache: Any,
        tokens: chex.Array,
        start: chex.Array,
        last: chex.Array,
    ) -> tuple[chex.Array, Any]:
        chex.assert_rank([tokens, start, last], [2, 1, 1])
        return model.apply({"params": params}, cache, tokens, start, last, method="decode")

    def resize_cache(cache: Any, length: int) -> Any:
        return tuple(
            (_resize(keys, length, axis=3), _resize(values, length, axis=2))
            for keys, values in cache
        )

    return Policy(make_apply_fn(config), init_cache, decode_fn, resize_cache)


def _resize(array: chex.Array, length: int, *, axis: int) -> chex.Array:
    """Cuts the array along an axis, or appends zeros."""
    missing = length - array.shape[axis]
    if missing <= 0:
        return jax.lax.slice_in_dim(array, 0, length, axis=axis)
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, missing)
    return jnp.pad(array, padding)

"""The transformer as plain functions: initial parameters, the full pass, the cached pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from w2sjax.models import attention
from w2sjax.models.config import ModelConfig
from w2sjax.models.transformer import CACHE, Block, Transformer, constrained
from w2sjax.types import PackedBatch, Policy

_OWN_DRAW = 2**20  # arrays of at least this many values are drawn on their own by `init_params`


def abstract_params(config: ModelConfig) -> chex.ArrayTree:
    """Shapes and dtypes of a model's parameters, `jax.ShapeDtypeStruct` each; nothing is computed.

    Returns:
      For a plain model a nested dict with paths such as `layers/attention/query/kernel`; for one
      with adapters {"base": the same, "lora": …/query/lora_a, …/query/lora_b}.
    """
    rows = jnp.zeros((1, 1), jnp.int32)
    made = jax.eval_shape(
        functools.partial(Transformer(config).init, jax.random.key(0)), *[rows] * 3
    )
    if config.lora is None:
        return made["params"]
    return {"base": made["params"], "lora": made["lora"]}


def init_params(config: ModelConfig, key: chex.PRNGKey) -> chex.ArrayTree:
    """Draws a model's parameters: a pure function of (config, key).

    Kernels are normal with variance 1 / fan-in, those that write to the residual stream 1 / (2 *
    num_layers) of that; embeddings have variance 1 / width, norms start at a factor of 1 and biases
    at 0: the same laws as `Transformer.init`, whose draws, one for each array, take seconds to
    compile. Here small arrays share one draw; large ones have their own, which a sharded program
    can draw shard by shard. Adapters start as in PEFT: A uniform within ±1/√fan-in, B zero.

    Args:
      config: the model's shape.
      key: PRNG key.

    Returns:
      Arrays of the structure of `abstract_params(config)`.
    """
    leaves, treedef = jax.tree.flatten_with_path(abstract_params(config))
    deviations = [_initial_deviation(config, path, leaf.shape) for path, leaf in leaves]
    shared_size = sum(
        leaf.size
        for (_, leaf), deviation in zip(leaves, deviations, strict=True)
        if deviation and leaf.size < _OWN_DRAW
    )
    shared_draw = jax.random.normal(key, (shared_size,), jnp.float32)
    shared_draw = jax.lax.optimization_barrier(shared_draw)  # or XLA draws again for every slice
    arrays, offset = [], 0
    for index, ((path, leaf), deviation) in enumerate(zip(leaves, deviations, strict=True)):
        name = path[-1].key
        if not deviation:
            start = name == "scale" and not config.norm_plus_one
            arrays.append(jnp.full(leaf.shape, float(start), leaf.dtype))
            continue
        if leaf.size < _OWN_DRAW:
            draw = shared_draw[offset : offset + leaf.size].reshape(leaf.shape)
            offset += leaf.size
        else:
            draw = jax.random.normal(jax.random.fold_in(key, index), leaf.shape, jnp.float32)
        if name == "lora_a":  # uniform from normal: the cumulative distribution is uniform
            draw = 2 * jax.scipy.special.ndtr(draw) - 1
        arrays.append((draw * deviation).astype(leaf.dtype))
    return jax.tree.unflatten(treedef, arrays)


def _initial_deviation(config: ModelConfig, path: Any, shape: tuple[int, ...]) -> float:
    """Scale of a parameter's initial values; 0 where all start equal."""
    *_, module, name = (entry.key for entry in path)
    if name in ("scale", "bias", "lora_b"):
        return 0.0
    if name == "embedding":
        return config.width**-0.5
    inputs = shape if module == "head" else shape[1:]  # without the axis over layers
    fan_in = math.prod(inputs[:2]) if module == "output" else inputs[0]
    variance = 1.0 / fan_in
    if name == "kernel" and module in ("output", "down"):
        variance *= 0.5 / config.num_layers
    return variance**0.5


def _variables(config: ModelConfig, params: chex.ArrayTree) -> dict[str, chex.ArrayTree]:
    """Parameters as Linen's collections."""
    if config.lora is None:
        return {"params": params}
    return {"params": params["base"], "lora": params["lora"]}


@functools.cache
def make_apply_fn(config: ModelConfig) -> Callable[..., chex.Array]:
    """The full forward pass as a plain function.

    Args:
      config: the model's shape.

    Returns:
      `apply_fn(params, tokens int32 [S, L], *, positions=None, subtree_end=None,
      dropout_key=None)` → logits float32 [S, L, V]. Token i attends to token j of its row exactly
      when `j <= i < subtree_end[j]`, and j is inside its window where the layer has one. Without
      `positions` rows count from 0; without `subtree_end` a row is one whole sequence. Adapters
      drop inputs where a `dropout_key` is given.
    """
    model = Transformer(config)

    def apply_fn(
        params: chex.ArrayTree,
        tokens: chex.Array,
        *,
        positions: chex.Array | None = None,
        subtree_end: chex.Array | None = None,
        dropout_key: chex.PRNGKey | None = None,
    ) -> chex.Array:
        chex.assert_rank(tokens, 2)
        if positions is None:
            index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            positions = jnp.broadcast_to(index, tokens.shape)
        chex.assert_equal_shape([tokens, positions])
        if subtree_end is not None:
            chex.assert_equal_shape([tokens, subtree_end])
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return model.apply(_variables(config, params), tokens, positions, subtree_end, rngs=rngs)

    return apply_fn


@functools.cache
def make_score_fn(config: ModelConfig) -> Callable[..., chex.Array]:
    """What a loss needs of the forward pass, as a plain function.

    Args:
      config: the model's shape.

    Returns:
      `score_fn(params, batch: PackedBatch, *, dropout_key=None)` → float32 [S, L], the
      log-probability of each token that is to be learned (`loss_count > 0`), 0 elsewhere. The
      output layer runs on those alone, in chunks.
    """
    model = Transformer(config)

    def score_fn(
        params: chex.ArrayTree, batch: PackedBatch, *, dropout_key: chex.PRNGKey | None = None
    ) -> chex.Array:
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return model.apply(_variables(config, params), batch, method="score", rngs=rngs)

    return score_fn


@functools.cache
def make_policy(config: ModelConfig) -> Policy:
    """The model as `w2sjax.types.Policy`: full pass, cache, cached pass.

    The cache is a tuple over layers of keys [slots, K, E, max_length] and values [slots, K,
    max_length, E] in the compute dtype. `decode_fn(params, cache, tokens [S, C], start [S], last
    [S], *, slots=None)` writes chunk tokens 0 … last at positions start … start + last of their
    slot (tokens after `last`, and positions past the end of the cache, are not written; `last ==
    -1` writes nothing), lets each token attend to all positions up to its own, and returns (logits
    float32 [S, V] of chunk token `last`, cache). Rows are the cache's slots in order, or `slots`
    int32 [S], of which those past the end are not written. Its caller keeps positions contiguous:
    what lies at `start` and later is overwritten before any token can see it.
    `resize_cache(cache, length)` keeps the first `length`
    positions, or adds empty ones. Where a mesh is set (`jax.set_mesh`), slots are split over `data`
    and `fsdp` and heads over `tensor`, as far as they divide.

    Equal configs get the same functions, so that whatever is jitted with them is compiled once.

    Args:
      config: the model's shape.

    Returns:
      A `Policy`; its functions are not jitted.
    """
    model, block = Transformer(config), Block(config)

    def init_cache(num_slots: int, max_length: int) -> Any:
        lead = (num_slots, config.num_kv_heads)
        return tuple(
            (
                constrained(jnp.zeros((*lead, config.head_size, max_length), config.dtype), CACHE),
                constrained(jnp.zeros((*lead, max_length, config.head_size), config.dtype), CACHE),
            )
            for _ in range(config.num_layers)
        )

    def decode_fn(
        params: chex.ArrayTree,
        cache: Any,
        tokens: chex.Array,
        start: chex.Array,
        last: chex.Array,
        *,
        slots: chex.Array | None = None,
    ) -> tuple[chex.Array, Any]:
        chex.assert_rank([tokens, start, last], [2, 1, 1])
        variables = _variables(config, params)
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        views = tuple(
            attention.cache_view(
                start[:, None] + index,
                index <= last[:, None],
                frequencies=config.rope_frequencies(local=local),
                window=config.window if local else None,
                cache_length=cache[0][1].shape[2],
                slots=slots,
            )
            for local in sorted(set(config.is_local))
        )
        x = model.apply(variables, tokens, method="embed_tokens")
        updated = []
        # One layer after the other, so that each cache is updated where it is.
        for layer, is_local in enumerate(config.is_local):
            own = {
                name: jax.tree.map(lambda leaf: leaf[layer], collection["layers"])  # noqa: B023
                for name, collection in variables.items()
            }
            x, layer_cache = block.apply(own, x, is_local, views, cache[layer])
            updated.append(tuple(constrained(part, CACHE) for part in layer_cache))
        x = jnp.take_along_axis(x, jnp.maximum(last, 0)[:, None, None], axis=1)
        return model.apply(variables, x, method="logits")[:, 0], tuple(updated)

    def resize_cache(cache: Any, length: int) -> Any:
        return tuple(
            (_resize(keys, length, axis=3), _resize(values, length, axis=2))
            for keys, values in cache
        )

    return Policy(make_apply_fn(config), make_score_fn(config), init_cache, decode_fn, resize_cache)


def _resize(array: chex.Array, length: int, *, axis: int) -> chex.Array:
    """Cuts the array along an axis, or appends zeros."""
    missing = length - array.shape[axis]
    if missing <= 0:
        return jax.lax.slice_in_dim(array, 0, length, axis=axis)
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, missing)
    return jnp.pad(array, padding)

"""What a model needs on each device, by arithmetic on shapes: no weights, no devices, no compiler.

Letters as in `w2sjax.types`, for one device of a mesh {data, fsdp, tensor}: `S` rows and `H`, `K`,
`V`, `F` (hidden features of the MLP) are what is left of them after the split over data × fsdp and
over tensor; `T = S·L` tokens, `N` layers, `E` features of a head, `r` rank, `c` bytes of the
compute dtype. `A` counts norms of a block (2, or 4 with `post_norms`).

    parameters    each array's own part, by `PARTITION_RULES`
    optimizer     each array of `tx.init`'s state, split like its parameter
    gradients     as the parameters that train

    kept per token and layer, by remat policy
      full        c·D
      dots        c·(2·D + (H + 2·K)·E + 2·F), with adapters c·(r + outputs) per adapted projection;
                  what the down kernel gives counts with post_norms alone, c·D
      attention   norms       4·D·A in, 4·D·A before their scale, c·D for each that a kernel follows
                  attention   c·(H + 2·K)·E and c·H·E that goes to the output kernel (fused or
                              tree attention keeps the latter anyway)
                  MLP         5·c·F and c·F that goes to the down kernel
                  adapters    c·r per adapted projection
      none        the same, and (4 + c)·H·M for the scores and 4·H·E for their sums
    M = L·(1 + 1/blocks)/2 keys per query (plain XLA; others keep 4·H, a sum, instead)

    activations   T·N·kept, T·L for the mask of plain XLA attention and T·(8 + c)·D at the end;
                  c·(a block's parameters)·N where they are cast and `none` or `attention` keeps it
    block         T·(kept under `none`), what one block has at once when it is computed again;
                  T·((4 + 2·c)·H + (8 + 2·c)·K)·E, gradients and turned copies, for tree attention;
                  c·(a block's parameters), gathered over fsdp; twice that where they train, for
                  their gradient
    logits        4·C·V, a chunk's logits and in their place their gradient in float32 (C tokens,
                  see `head.chunk_size`), below float32 c·C·V more; 4·T·D, the stream's gradient;
                  8·V·D, the output layer's gradient and a chunk's part of it, where it trains;
                  c·V·D where the head is gathered, cast or turned (untied)

    training      parameters + optimizer + the largest of
                    activations + logits                   output layer, end of the forward pass
                    activations + gradients + block        backward pass through the layers
                    2·gradients                            the sum and the mean, for their norm

    cache         2·c·N·K·E per position and slot; slots are split over data × fsdp, if they divide
    growth        as much again at most: the old cache is there while a longer one is made
    step          the layers' parameters once more, split as they are and in the compute dtype (the
                  loop over tokens gets them cut out of their stack), and the scores and logits of
                  one token per slot
    sampling      parameters + cache + the larger of growth and step

Terms marked "goes to" are kept where that kernel trains or has an adapter, those "before their
scale" where the base trains. Left out: what a compiler wastes, libraries' workspaces, collectives'
buffers, masks and rotary angles of local layers, tiles of tree attention, paths of pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from w2sjax.models import attention
from w2sjax.models.config import PROJECTIONS, ModelConfig
from w2sjax.models.head import chunk_size
from w2sjax.models.policy import abstract_params
from w2sjax.models.transformer import PARTITION_RULES
from w2sjax.parallel import AXES, param_shardings


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device; what each is stands in the module's docstring."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    block: int
    logits: int
    cache: int
    growth: int
    step: int

    @property
    def training(self) -> int:
        """The most that training holds at once."""
        return self.parameters + self.optimizer + max(self.moments.values())

    @property
    def moments(self) -> dict[str, int]:
        """What comes on top of parameters and optimizer state at the three dearest moments."""
        return {
            "end of the forward pass": self.activations + self.logits,
            "backward pass": self.activations + self.gradients + self.block,
            "update": 2 * self.gradients,
        }

    @property
    def sampling(self) -> int:
        """The most that sampling holds at once."""
        return self.parameters + self.cache + max(self.growth, self.step)


def plan_memory(
    config: ModelConfig,
    tx: optax.GradientTransformation,
    *,
    mesh: Mapping[str, int],
    rows: int,
    row_length: int,
    slots: int = 0,
    cache_length: int = 0,
) -> MemoryPlan:
    """What training and sampling need on each device of a mesh that need not be there.

    Attention "auto" and compute dtype "auto" are what they would be on this machine: name them in
    the config to plan for another.

    Args:
      config: the model's shape. With `config.lora` the adapters train, else all parameters.
      tx: the optimizer.
      mesh: sizes of the axes data, fsdp and tensor.
      rows: of a batch, over all devices (S); of a micro-batch where gradients are accumulated.
      row_length: tokens of a row (L).
      slots: episodes sampled side by side.
      cache_length: longest context of a slot, in tokens.

    Returns:
      A `MemoryPlan`.

    Raises:
      ValueError: mesh axes other than the three, rows that the mesh cannot split, or a parameter
        that it cannot (the message names it).

    Example:
      >>> config = ModelConfig(512, 64, 2, 4, 2, 192, compute_dtype="float32", attention="xla")
      >>> mesh = {"data": 1, "fsdp": 4, "tensor": 1}
      >>> plan = plan_memory(config, optax.adam(1e-3), mesh=mesh, rows=4, row_length=64)
      >>> plan.parameters, plan.optimizer  # norms are on every device
      (132352, 264708)
    """
    if set(mesh) != set(AXES):
        raise ValueError(f"mesh must have the axes {', '.join(AXES)}, got {', '.join(mesh)}")
    parts = mesh["data"] * mesh["fsdp"]
    if rows % parts:
        raise ValueError(
            f"{rows} rows do not divide over data × fsdp = {parts} devices: make the row count a "
            f"multiple of {parts}"
        )
    sizes = tuple(mesh[axis] for axis in AXES)
    devices = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    params = abstract_params(config)
    shardings = param_shardings(params, PARTITION_RULES, devices)
    trained, trained_shardings = params, shardings
    if config.lora is not None:
        trained, trained_shardings = {"lora": params["lora"]}, {"lora": shardings["lora"]}
    tokens = rows // parts * row_length
    return MemoryPlan(
        parameters=_total(params, shardings),
        optimizer=_optimizer_bytes(tx, trained, trained_shardings, devices),
        gradients=_total(trained, trained_shardings),
        activations=_activations(config, tokens, row_length, mesh),
        block=_block(config, tokens, row_length, mesh),
        logits=_logits(config, tokens, mesh),
        **_sampling(config, slots, cache_length, mesh),
    )


def _total(arrays: Any, shardings: Any) -> int:
    """Bytes of a tree's arrays on one device."""
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        arrays,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))


def _optimizer_bytes(
    tx: optax.GradientTransformation, trained: Any, shardings: Any, devices: AbstractMesh
) -> int:
    """Arrays of their parameter's shape are split like it, all others are everywhere."""
    everywhere = NamedSharding(devices, PartitionSpec())
    state = jax.eval_shape(tx.init, trained)
    state_shardings = optax.tree_utils.tree_map_params(
        tx,
        lambda leaf, param, sharding: sharding if leaf.shape == param.shape else everywhere,
        state,
        trained,
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    return _total(state, state_shardings)


def _itemsizes(config: ModelConfig) -> tuple[int, int]:
    """Bytes of a value as computed and as stored."""
    return config.dtype.itemsize, jnp.dtype(config.param_dtype).itemsize


def _attention(config: ModelConfig) -> str:
    """What attends to rows of tries."""
    if config.attention != "auto":
        return config.attention
    return attention.resolve("auto", dtype=config.dtype, softcap=config.attention_softcap)


def _split(config: ModelConfig, tensor: int) -> tuple[int, int, int]:
    """Features of queries, of keys, and hidden ones, on one device."""
    head = config.head_size
    numbers = (config.num_heads * head, config.num_kv_heads * head, config.mlp_width)
    return tuple(number // tensor for number in numbers)


def _kept(config: ModelConfig, remat: str, row_length: int, tensor: int) -> int:
    """Bytes that a block keeps of each token for its backward pass."""
    width, (queries, keys, hidden) = config.width, _split(config, tensor)
    c, _ = _itemsizes(config)
    lora, all_train = config.lora, config.lora is None
    adapted = [site for site in PROJECTIONS if lora is not None and lora.adapts(site)]
    rank = 0 if lora is None else lora.rank * len(adapted)

    def feeds(*sites: str) -> bool:
        """Whether a gradient asks for the input of these projections."""
        return all_train or any(site in adapted for site in sites)

    if remat == "full":
        return c * width
    if remat == "dots":
        outputs = {
            "attention/query": queries,
            "attention/key": keys,
            "attention/value": keys,
            "attention/output": width,
            "mlp/gate": hidden,
            "mlp/up": hidden,
            "mlp/down": width * config.post_norms,
        }
        through = sum(outputs[site] for site in adapted)
        products = (2 + config.post_norms) * width + queries + 2 * keys + 2 * hidden
        return c * (products + rank + through)
    norms = 4 if config.post_norms else 2
    into_attention = feeds("attention/query", "attention/key", "attention/value")
    kept = (4 + 4 * all_train) * width * norms
    kept += c * width * (into_attention + feeds("mlp/gate", "mlp/up"))
    kept += config.qk_norm * (4 + 4 * all_train) * (queries + keys)
    scores = _attention(config) == "xla"
    kept += c * (queries + 2 * keys)
    kept += c * queries * (not scores or feeds("attention/output"))
    kept += c * hidden * (5 + feeds("mlp/down"))
    kept += c * rank
    heads = config.num_heads // tensor
    if not scores:
        return kept + 4 * heads
    if remat == "attention" or len(set(config.is_local)) > 1:  # scores are computed again
        return kept
    return kept + _scores(config, row_length, heads) + 4 * queries


def _scores(config: ModelConfig, row_length: int, heads: int) -> int:
    """Bytes of each token's attention weights: in float32, and as they meet the values."""
    seen = row_length * (1 + 1 / attention.num_blocks(row_length)) / 2
    capped = 4 if config.attention_softcap is not None else 0
    return int((4 + _itemsizes(config)[0] + capped) * heads * seen)


def _block_params(config: ModelConfig, tensor: int) -> int:
    """Parameters of a block's projections, gathered over fsdp."""
    queries, keys, hidden = _split(config, tensor)
    return config.width * (2 * queries + 2 * keys + 3 * hidden)


def _activations(config: ModelConfig, tokens: int, row_length: int, mesh: Mapping[str, int]) -> int:
    c, stored = _itemsizes(config)
    kept = _kept(config, config.remat, row_length, mesh["tensor"])
    found = tokens * (config.num_layers * kept + (8 + c) * config.width)
    if _attention(config) == "xla":
        found += tokens * row_length
    if c != stored and config.remat in ("none", "attention"):
        found += c * config.num_layers * _block_params(config, mesh["tensor"])
    return found


def _block(config: ModelConfig, tokens: int, row_length: int, mesh: Mapping[str, int]) -> int:
    plain = dataclasses.replace(config, window=None, local_layers=(), local_rope_theta=None)
    at_once = tokens * _kept(plain, "none", row_length, mesh["tensor"])
    c, _ = _itemsizes(config)
    if _attention(config) == "tree":
        queries, keys, _ = _split(config, mesh["tensor"])
        at_once += tokens * ((4 + 2 * c) * queries + (8 + 2 * c) * keys)
    weights = c * _block_params(config, mesh["tensor"])
    return at_once + weights * (2 if config.lora is None else 1)


def _logits(config: ModelConfig, tokens: int, mesh: Mapping[str, int]) -> int:
    c, stored = _itemsizes(config)
    vocab = config.vocab_size // mesh["tensor"]
    found = (4 + (c if c < 4 else 0)) * chunk_size(tokens, vocab) * vocab
    found += 4 * tokens * config.width
    if config.lora is None:
        found += 8 * vocab * config.width
    if mesh["fsdp"] > 1 or c != stored or not config.tie_embeddings:
        found += c * vocab * config.width
    return found


def _sampling(
    config: ModelConfig, slots: int, length: int, mesh: Mapping[str, int]
) -> dict[str, int]:
    """Cache, growth and step; all 0 where nothing is sampled."""
    if not slots:
        return dict(cache=0, growth=0, step=0)
    (c, _), tensor = _itemsizes(config), mesh["tensor"]
    _, keys, _ = _split(config, tensor)
    rows = mesh["data"] * mesh["fsdp"]
    slots = slots // rows if slots % rows == 0 else slots
    cache = 2 * c * config.num_layers * slots * keys * length
    layers = c * config.num_layers * _block_params(config, tensor) // mesh["fsdp"]
    scores = (4 + c) * slots * (config.num_heads // tensor) * length
    logits = 8 * slots * (config.vocab_size // tensor)
    return dict(cache=cache, growth=cache, step=layers + scores + logits)

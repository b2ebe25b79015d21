"""Log-probabilities of the tokens that are to be learned, without the logits of the others.

The output layer runs on those tokens alone, a chunk at a time: logits of one chunk are all that
ever exists. The backward pass computes them again, chunk by chunk, from the log-sum-exp that the
forward pass kept of each token.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from w2sjax.parallel import on_each_device, row_axes, tensor_axis

_MOST_LOGITS = 2**27  # of a chunk, in all: half a gigabyte of float32


def token_logps(
    hidden: chex.Array,
    table: chex.Array,
    tokens: chex.Array,
    predecessor: chex.Array,
    learned: chex.Array,
    *,
    softcap: float | None = None,
) -> chex.Array:
    """Log-probability of each learned token given what is before it.

    Cost follows the number of learned tokens, memory the size of a chunk. Under a mesh each device
    takes its own rows and its own part of the vocabulary.

    Args:
      hidden: float [S, L, D], what the output layer reads.
      table: float [V, D], the output layer, in the dtype that its products run in.
      tokens: int32 [S, L].
      predecessor: int32 [S, L], see `types.PackedBatch`.
      learned: bool [S, L].
      softcap: c, logits become c·tanh(logit / c).

    Returns:
      float32 [S, L], in nats; 0 where nothing is learned.
    """
    chex.assert_rank([hidden, table, tokens], [3, 2, 2])
    chex.assert_equal_shape([tokens, predecessor, learned])
    chex.assert_shape(hidden, (*tokens.shape, table.shape[1]))
    arrays = map(jnp.asarray, (hidden, table, tokens, predecessor, learned))
    return _token_logps(softcap, *arrays)


def _specs(
    hidden: chex.Array, table: chex.Array
) -> tuple[PartitionSpec, PartitionSpec, str | None]:
    """Of rows, of the table, and the axis that splits the vocabulary."""
    axis = tensor_axis(table.shape[0])
    return PartitionSpec(row_axes(hidden.shape[0]) or None), PartitionSpec(axis), axis


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logps(softcap, hidden, table, tokens, predecessor, learned):
    return _forward(softcap, hidden, table, tokens, predecessor, learned)[0]


def _forward(softcap, hidden, table, tokens, predecessor, learned):
    rows, vocabulary, axis = _specs(hidden, table)
    compute = functools.partial(_local_forward, softcap=softcap, axis=axis)
    compute = on_each_device(compute, (rows, vocabulary, rows, rows, rows), (rows, rows))
    logps, normalizer = compute(hidden, table, tokens, predecessor, learned)
    return logps, (hidden, table, tokens, predecessor, learned, normalizer)


def _backward(softcap, kept, cotangent):
    hidden, table, *rest = kept
    rows, vocabulary, axis = _specs(hidden, table)
    compute = functools.partial(
        _local_backward, softcap=softcap, axis=axis, row_axes=row_axes(hidden.shape[0])
    )
    in_specs = (rows, vocabulary, rows, rows, rows, rows, rows)
    compute = on_each_device(compute, in_specs, (rows, vocabulary))
    return (*compute(hidden, table, *rest, cotangent), None, None, None)


_token_logps.defvjp(_forward, _backward)


def chunk_size(num_tokens: int, vocab_size: int) -> int:
    """How many tokens' logits exist at once: an eighth of what a device has, in bounds."""
    size = min(1024, max(128, -(-num_tokens // 8 // 128) * 128), num_tokens)
    while size > 128 and size * vocab_size > _MOST_LOGITS:
        size //= 2
    return size


class _Chunks:
    """The learned tokens of some rows, in chunks of which only those in use are computed."""

    def __init__(self, table, tokens, predecessor, learned):
        rows, length = tokens.shape
        self.total = rows * length
        self.size = chunk_size(self.total, table.shape[0])
        self.number = -(-jnp.sum(learned) // self.size)
        room = -(-self.total // self.size) * self.size
        self._index = jnp.nonzero(learned.ravel(), size=room, fill_value=self.total)[0]
        first = jnp.arange(rows, dtype=jnp.int32)[:, None] * length
        self._source = (first + predecessor).ravel()
        self._tokens = tokens.ravel()

    def take(self, number):
        """Of a chunk: places of its tokens (`total` past the last), of what predicts them, and
        the tokens; int32 [C] each.
        """
        place = jax.lax.dynamic_slice(self._index, (number * self.size,), (self.size,))
        inside = jnp.minimum(place, self.total - 1)
        return place, self._source[inside], self._tokens[inside]


def _logits(hidden, table, softcap):
    """float32 [C, V], capped."""
    scores = jnp.einsum("cd,vd->cv", hidden, table, preferred_element_type=jnp.float32)
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _own(tokens, table, axis):
    """Which row of this device's part of the table each token is; outside of it where another
    device has it.
    """
    start = 0 if axis is None else jax.lax.axis_index(axis) * table.shape[0]
    own = tokens - start
    return jnp.where((own >= 0) & (own < table.shape[0]), own, table.shape[0])


def _local_forward(hidden, table, tokens, predecessor, learned, *, softcap, axis):
    chunks = _Chunks(table, tokens, predecessor, learned)
    flat = hidden.reshape(-1, hidden.shape[-1])

    def over_devices(reduce, values):
        return values if axis is None else reduce(values, axis)

    def body(number, found):
        place, source, token = chunks.take(number)
        logits = _logits(flat[source].astype(table.dtype), table, softcap)
        peak = over_devices(jax.lax.pmax, logits.max(axis=-1))
        total = over_devices(jax.lax.psum, jnp.exp(logits - peak[:, None]).sum(axis=-1))
        own = _own(token, table, axis)[:, None]
        target = jnp.take_along_axis(logits, own, axis=1, mode="fill", fill_value=0)[:, 0]
        normalizer = peak + jnp.log(total)
        logps = over_devices(jax.lax.psum, target) - normalizer
        return tuple(
            array.at[place].set(values, mode="drop")
            for array, values in zip(found, (logps, normalizer), strict=True)
        )

    empty = jnp.zeros(chunks.total, jnp.float32)
    found = jax.lax.fori_loop(0, chunks.number, body, (empty, empty))
    return tuple(array.reshape(tokens.shape) for array in found)


def _local_backward(
    hidden, table, tokens, predecessor, learned, normalizer, cotangent, *, softcap, axis, row_axes
):
    chunks = _Chunks(table, tokens, predecessor, learned)
    flat, normalizer, cotangent = (
        array.reshape(chunks.total, -1) for array in (hidden, normalizer, cotangent)
    )

    def body(number, grads):
        into_hidden, into_table = grads
        place, source, token = chunks.take(number)
        inside = jnp.minimum(place, chunks.total - 1)
        weight = jnp.where(place[:, None] < chunks.total, cotangent[inside], 0.0)
        read = flat[source].astype(table.dtype)
        logits = _logits(read, table, softcap)
        is_target = jnp.arange(table.shape[0]) == _own(token, table, axis)[:, None]
        change = weight * (is_target - jnp.exp(logits - normalizer[inside]))
        if softcap is not None:
            change = change * (1 - jnp.square(logits / softcap))
        change = change.astype(table.dtype)
        wide = dict(preferred_element_type=jnp.float32)
        into_hidden = into_hidden.at[source].add(jnp.einsum("cv,vd->cd", change, table, **wide))
        return into_hidden, into_table + jnp.einsum("cv,cd->vd", change, read, **wide)

    grads = jnp.zeros(flat.shape, jnp.float32), jnp.zeros(table.shape, jnp.float32)
    into_hidden, into_table = jax.lax.fori_loop(0, chunks.number, body, grads)
    if axis is not None:
        into_hidden = jax.lax.psum(into_hidden, axis)
    if row_axes:
        into_table = jax.lax.psum(into_table, row_axes)
    return into_hidden.reshape(hidden.shape).astype(hidden.dtype), into_table.astype(table.dtype)

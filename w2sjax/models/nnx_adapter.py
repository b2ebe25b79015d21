"""Models written in Flax NNX, as the plain functions that the other rooms take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
from flax import nnx


def from_nnx(
    module: nnx.Module, call: Callable[..., chex.Array]
) -> tuple[Callable[..., chex.Array], dict[str, Any]]:
    """Takes an NNX module apart.

    Args:
      module: the model; not changed, and its arrays are not copied.
      call: (module, tokens [S, L], positions [S, L] or None, subtree_end [S, L] or None) → logits
        [S, L, V]: how this module is called. It has to honour `subtree_end` (token i sees token j
        exactly when `j <= i < subtree_end[j]`) for rows that hold more than one sequence.

    Returns:
      (apply_fn, params): `apply_fn(params, tokens, *, positions=None, subtree_end=None)`, and the
      module's `nnx.Param` variables as a nested dict of arrays. Whatever else the module holds
      (running statistics, random streams) stays as it is at this moment.

    Raises:
      ValueError: the module has no parameters.
    """
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    params = nnx.to_pure_dict(state)
    if not params:
        raise ValueError(f"{type(module).__name__} has no nnx.Param: nothing to train")

    def apply_fn(
        params: dict[str, Any],
        tokens: chex.Array,
        *,
        positions: chex.Array | None = None,
        subtree_end: chex.Array | None = None,
    ) -> chex.Array:
        filled = nnx.State(state)  # the structure, with a place for each array
        nnx.replace_by_pure_dict(filled, params)
        return call(nnx.merge(graph, filled, rest), tokens, positions, subtree_end)

    return apply_fn, params

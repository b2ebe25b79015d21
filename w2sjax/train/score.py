"""Log-probabilities of whole sequences under a policy: one forward pass, no gradients."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

import chex
import jax
import numpy as np
from jax.sharding import Mesh

from w2sjax.batches import Sequence, fill_rows, plan_rows_decreasing
from w2sjax.losses import per_token_logps, sequence_logps
from w2sjax.parallel import across_processes, replicated
from w2sjax.train.state import check_rows, default_mesh, row_sharding
from w2sjax.types import PackedBatch


class SequenceScorer:
    """`scorer(params, sequences) → float32 [Q]`; reusable with any parameters of the same model.

    One compiled shape for each number of sequences in a batch, which is rounded up to a power of
    two.
    """

    def __init__(
        self,
        apply_fn: Callable[..., chex.Array],
        *,
        rows_per_batch: int,
        row_length: int,
        mesh: Mesh | None = None,
    ):
        self._apply_fn = apply_fn
        self._rows_per_batch = rows_per_batch
        self._row_length = row_length
        self._mesh = mesh if mesh is not None else default_mesh()
        check_rows(rows_per_batch, self._mesh)
        self._jitted = jax.jit(
            self._score, static_argnames="num_sequences", out_shardings=replicated(self._mesh)
        )

    def __call__(
        self,
        params: Any,
        sequences: SequenceOf[Sequence],
        *,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Scores sequences; equal ones are computed once.

        Args:
          params: the policy's parameters; neither changed nor consumed.
          sequences: Q of them, none longer than a row.
          on_batch: called with (batches done, batches in all).

        Returns:
          float32 [Q], Σ weight · log-probability in nats, as `losses.sequence_logps`.

        Raises:
          ValueError: if a sequence is longer than a row.
        """
        if not sequences:
            return np.zeros(0, np.float32)
        unique, which = _unique(sequences)
        plan = plan_rows_decreasing([len(sequence) for sequence in unique], self._row_length)
        size = self._rows_per_batch
        batches = [plan[start : start + size] for start in range(0, len(plan), size)]
        most = max(sum(len(row) for row in rows) for rows in batches)
        num_sequences = 1 << (most - 1).bit_length()
        rows_over_mesh = row_sharding(self._mesh)
        scores = np.zeros(len(unique), np.float32)
        under_way = None  # the next batch is built while this one is computed

        def finish(ids, values):
            scores[ids] = np.asarray(values)[: len(ids)]

        for number, rows in enumerate(batches):
            ids = [index for row in rows for index in row]
            place = {index: position for position, index in enumerate(ids)}
            members = [[(index, place[index]) for index in row] for row in rows]
            batch = fill_rows(unique, members, num_rows=size, row_length=self._row_length)
            batch = jax.device_put(across_processes(batch, rows_over_mesh), rows_over_mesh)
            with jax.set_mesh(self._mesh):  # for the activations that the model constrains
                values = self._jitted(params, batch, num_sequences=num_sequences)
            if under_way is not None:
                finish(*under_way)
            under_way = (ids, values)
            if on_batch is not None:
                on_batch(number + 1, len(batches))
        finish(*under_way)
        return scores[which]

    def _score(self, params, batch: PackedBatch, *, num_sequences: int) -> chex.Array:
        logits = self._apply_fn(
            params, batch.tokens, positions=batch.positions, subtree_end=batch.subtree_end
        )
        logps = per_token_logps(logits, batch.tokens, batch.predecessor)
        return sequence_logps(logps, batch.loss_weight, batch.sequence_id, num_sequences)


def make_sequence_scorer(
    apply_fn: Callable[..., chex.Array],
    *,
    rows_per_batch: int,
    row_length: int,
    mesh: Mesh | None = None,
) -> SequenceScorer:
    """What computes log-probabilities of whole sequences, such as those of a frozen reference
    policy.

    Args:
      apply_fn: (params, tokens, *, positions, subtree_end) → logits [S, L, V], as in
        `types.Policy`.
      rows_per_batch: rows of one forward pass.
      row_length: tokens of a row.
      mesh: where it runs; by default one device.

    Returns:
      A `SequenceScorer`.

    Raises:
      ValueError: if the rows do not divide over the mesh.
    """
    return SequenceScorer(apply_fn, rows_per_batch=rows_per_batch, row_length=row_length, mesh=mesh)


def _unique(sequences: SequenceOf[Sequence]) -> tuple[list[Sequence], list[int]]:
    """The distinct sequences, and for each of the given ones its index among them."""
    places: dict[tuple[bytes, bytes], int] = {}
    unique: list[Sequence] = []
    which = []
    for sequence in sequences:
        place = places.setdefault(
            (sequence.tokens.tobytes(), sequence.weights.tobytes()), len(unique)
        )
        if place == len(unique):
            unique.append(sequence)
        which.append(place)
    return unique, which

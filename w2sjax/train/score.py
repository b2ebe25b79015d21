"""Log-probabilities of whole sequences, or of parts of them: one forward pass, no gradients."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

import chex
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from w2sjax.batches import Part, Sequence, fill_rows, find_prefixes, plan_rows
from w2sjax.losses import ScoreFn, path_sums
from w2sjax.parallel import across_processes, replicated
from w2sjax.train.state import check_rows, default_mesh, row_sharding
from w2sjax.types import PackedBatch


class SequenceScorer:
    """`scorer(params, sequences, parts) → float32 [Q]`; reusable with any parameters of the same
    model.

    Sequences of all batches are laid out as one trie before they are cut into rows, so what they
    share is computed once, but for the trunks that rows repeat.
    """

    def __init__(
        self,
        score_fn: ScoreFn,
        *,
        rows_per_batch: int,
        row_length: int,
        mesh: Mesh | None = None,
        share: bool = True,
    ):
        self._score_fn = score_fn
        self._rows_per_batch = rows_per_batch
        self._row_length = row_length
        self._share = share
        self._mesh = mesh if mesh is not None else default_mesh()
        check_rows(rows_per_batch, self._mesh)
        self._jitted = jax.jit(
            self._score, static_argnames="num_paths", out_shardings=replicated(self._mesh)
        )

    def __call__(
        self,
        params: Any,
        sequences: SequenceOf[Sequence],
        parts: SequenceOf[Part] | None = None,
        *,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Scores sequences.

        Args:
          params: the policy's parameters; neither changed nor consumed.
          sequences: none longer than a row.
          parts: Q stretches of them that are scored; by default every sequence as a whole.
          on_batch: called with (batches done, batches in all).

        Returns:
          float32 [Q], Σ weight · log-probability in nats.

        Raises:
          ValueError: if a sequence is longer than a row.
        """
        if parts is None:
            parts = [Part(place, 0, len(sequence)) for place, sequence in enumerate(sequences)]
        scores = np.zeros(len(parts), np.float32)
        if not parts:
            return scores
        prefixes = find_prefixes(sequences, share=self._share)
        rows = plan_rows(prefixes, self._row_length)
        size = self._rows_per_batch
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        parts_of: dict[int, list[int]] = {}
        for number, part in enumerate(parts):
            parts_of.setdefault(part.sequence, []).append(number)

        def numbers(row: SequenceOf[int]) -> list[int]:
            """The parts that lie in a row."""
            return [n for place in row for n in parts_of.get(int(prefixes.order[place]), ())]

        ids = [[n for row in batch for n in numbers(row)] for batch in batches]
        num_paths = _power_of_two(max(map(len, ids)))
        learned = [_num_learned(sequences[part.sequence], part) for part in parts]
        num_entries = _power_of_two(max(sum(learned[n] for n in numbers(row)) for row in rows))
        rows_over_mesh = row_sharding(self._mesh)
        under_way = None  # the next batch is built while this one is computed

        def finish(ids, values):
            scores[ids] = np.asarray(values)[: len(ids)]

        for number, (batch_rows, batch_ids) in enumerate(zip(batches, ids, strict=True)):
            batch = fill_rows(
                sequences,
                prefixes,
                batch_rows,
                num_rows=size,
                row_length=self._row_length,
                parts=[parts[n] for n in batch_ids],
                num_entries=num_entries,
            )
            batch = jax.device_put(across_processes(batch, rows_over_mesh), rows_over_mesh)
            with jax.set_mesh(self._mesh):  # for the activations that the model constrains
                values = self._jitted(params, batch, num_paths=num_paths)
            if under_way is not None:
                finish(*under_way)
            under_way = (batch_ids, values)
            if on_batch is not None:
                on_batch(number + 1, len(batches))
        finish(*under_way)
        return scores

    def _score(self, params, batch: PackedBatch, *, num_paths: int) -> chex.Array:
        return path_sums(self._score_fn(params, batch), batch, num_paths)


def make_sequence_scorer(
    score_fn: ScoreFn,
    *,
    rows_per_batch: int,
    row_length: int,
    mesh: Mesh | None = None,
    share: bool = True,
) -> SequenceScorer:
    """What computes log-probabilities of whole sequences, such as those of a frozen reference
    policy.

    Args:
      score_fn: (params, batch) → per_token_logps [S, L], as in `types.Policy`.
      rows_per_batch: rows of one forward pass.
      row_length: tokens of a row.
      mesh: where it runs; by default one device.
      share: whether common prefixes are computed once.

    Returns:
      A `SequenceScorer`.

    Raises:
      ValueError: if the rows do not divide over the mesh.
    """
    return SequenceScorer(
        score_fn, rows_per_batch=rows_per_batch, row_length=row_length, mesh=mesh, share=share
    )


def cached_scores(
    path: str | os.PathLike[str],
    compute: Callable[[], np.ndarray],
    sequences: SequenceOf[Sequence],
    parts: SequenceOf[Part],
) -> np.ndarray:
    """Scores from a file, or computed and written there (by the first process).

    Args:
      path: an .npz file of one policy's scores, in a bucket or not; its directory exists.
      compute: makes the scores where the file has none of these sequences and parts.
      sequences: what is scored.
      parts: which stretches of it.

    Returns:
      float32 [Q].
    """
    path = epath.Path(path)
    digest = hashlib.sha256(np.asarray(parts, np.int64).tobytes())
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8))
        digest.update(sequence.tokens.tobytes())
        digest.update(sequence.weights.tobytes())
    if path.exists():
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            if str(arrays["of"]) == digest.hexdigest():
                return arrays["scores"]
    scores = compute()
    if jax.process_index() > 0:
        return scores
    content = io.BytesIO()
    np.savez(content, scores=scores, of=digest.hexdigest())
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.getvalue())
    temporary.replace(path)
    return scores


def _num_learned(sequence: Sequence, part: Part) -> int:
    first, last = np.searchsorted(sequence.learned, (part.start, part.stop))
    return int(last - first)


def _power_of_two(number: int) -> int:
    """At least so many, so that few shapes are compiled."""
    return 1 << max(number - 1, 0).bit_length()

"""Random trajectory sets of fixed shapes, so that few programs are compiled."""

from __future__ import annotations

import numpy as np


def random_sets(seed, *, batch, rollouts, steps, alphabet, empty=0.1, levels=5):
    """Keys [B, R, T], lengths, returns (multiples of 1/(levels − 1)) and a mask, each [B, R]."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(-1, alphabet - 1, (batch, rollouts, steps)).astype(np.int32)
    # Some rollouts go along an earlier one for a while, some all the way; some are equal or empty.
    for b in range(batch):
        for r in range(1, rollouts):
            shared = rng.integers(0, steps + 1) * (rng.random() < 0.7)
            keys[b, r, :shared] = keys[b, rng.integers(r), :shared]
    lengths = rng.integers(0, steps + 1, (batch, rollouts)).astype(np.int32)
    lengths[rng.random((batch, rollouts)) < empty] = 0
    if seed % 5 == 0:
        lengths[:] = steps
    returns = (rng.integers(0, levels, (batch, rollouts)) / (levels - 1)).astype(np.float32)
    mask = rng.random((batch, rollouts)) < (0.85 if seed % 2 else 1.0)
    return keys, lengths, returns, mask


def as_lists(keys, lengths, mask):
    """The trajectories of one task as lists of keys; None where there is none."""
    return [keys[r, : lengths[r]].tolist() if mask[r] else None for r in range(keys.shape[0])]

"""The tasks of ScienceWorld, their step limits, and which variations belong to which split.

`dev` and `test` are the official folds; the official training fold is shuffled once (by a seed that
depends on its size alone, so that sibling tasks share the same houses) and cut into `pretrain` (its
first half), `demos` (the next tenth) and `train` (the rest).

`eto_train`, `eto_dev` and `eto_test` are the published lists of the ETO experiments, for comparison
with results on them. They overlap with each other and with the official folds: `overlaps` counts
where. In short: 54 of the training pairs are also dev pairs, and 357 of them lie in the official
dev fold; all test pairs lie in the official test fold, and none is in another list, so that what
was trained here on `pretrain`, `demos` and `train` may be evaluated on `eto_test`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping

from w2sjax.envs.scienceworld_eto import ETO_DEV, ETO_TRAIN

# Tasks that a short text dialogue solves: gold paths of at most 12 actions.
SHORT_TASKS = (
    "lifespan-longest-lived",
    "lifespan-shortest-lived",
    "lifespan-longest-lived-then-shortest-lived",
    "find-non-living-thing",
    "find-plant",
)

# Official task name → (variations, step limit). Limits are those of the published ETO evaluation
# (arXiv 2403.02502), and about the longest gold path for the six tasks that it leaves out.
TASKS: Mapping[str, tuple[int, int]] = {
    "boil": (30, 100),
    "change-the-state-of-matter-of": (30, 80),
    "chemistry-mix": (32, 60),
    "chemistry-mix-paint-secondary-color": (36, 15),
    "chemistry-mix-paint-tertiary-color": (36, 30),
    "find-animal": (300, 15),
    "find-living-thing": (300, 15),
    "find-non-living-thing": (300, 15),
    "find-plant": (300, 15),
    "freeze": (30, 80),
    "grow-fruit": (126, 60),
    "grow-plant": (126, 30),
    "identify-life-stages-1": (14, 30),
    "identify-life-stages-2": (10, 30),
    "inclined-plane-determine-angle": (168, 180),
    "inclined-plane-friction-named-surfaces": (1386, 180),
    "inclined-plane-friction-unnamed-surfaces": (162, 200),
    "lifespan-longest-lived": (125, 10),
    "lifespan-longest-lived-then-shortest-lived": (125, 12),
    "lifespan-shortest-lived": (125, 10),
    "measure-melting-point-known-substance": (436, 120),
    "measure-melting-point-unknown-substance": (300, 100),
    "melt": (30, 80),
    "mendelian-genetics-known-plant": (120, 150),
    "mendelian-genetics-unknown-plant": (480, 150),
    "power-component": (20, 20),
    "power-component-renewable-vs-nonrenewable-energy": (20, 30),
    "test-conductivity": (900, 30),
    "test-conductivity-of-unknown-substances": (600, 30),
    "use-thermometer": (540, 30),
}

OFFICIAL_SPLITS = ("pretrain", "demos", "train", "dev", "test")
ETO_SPLITS = ("eto_train", "eto_dev", "eto_test")
SPLITS = OFFICIAL_SPLITS + ETO_SPLITS
PUBLISHED_TASKS = tuple(ETO_TRAIN)  # the 24 of the ETO splits
_ETO_TEST_SIZE = 10  # of each task


def split_variations(task: str, split: str) -> list[int]:
    """The variations of a task in a split, ascending; the module's docstring says how it is cut.

    Args:
      task: a key of `TASKS`.
      split: one of `SPLITS`. An ETO split is empty for a task that is not in `PUBLISHED_TASKS`.
    """
    count = TASKS[task][0]
    quarter = count // 4
    if split in ETO_SPLITS and task not in PUBLISHED_TASKS:
        return []
    if split == "eto_train":
        return _numbers(ETO_TRAIN[task])
    if split == "eto_dev":
        return _numbers(ETO_DEV[task])
    if split == "dev":
        return list(range(2 * quarter, 3 * quarter))
    if split in ("test", "eto_test"):
        fold = list(range(3 * quarter, count))
        return fold if split == "test" else fold[:_ETO_TEST_SIZE]
    fold = list(range(2 * quarter))
    random.Random(len(fold)).shuffle(fold)
    half, end = len(fold) // 2, len(fold) // 2 + max(1, len(fold) // 10)
    return sorted({"pretrain": fold[:half], "demos": fold[half:end], "train": fold[end:]}[split])


def overlaps() -> dict[tuple[str, str], int]:
    """Two splits → how many (task, variation) pairs, over all tasks, belong to both; no zeros."""
    pairs = {
        split: {(task, number) for task in TASKS for number in split_variations(task, split)}
        for split in SPLITS
    }
    counts = {
        (one, other): len(pairs[one] & pairs[other])
        for one, other in itertools.combinations(SPLITS, 2)
    }
    return {names: count for names, count in counts.items() if count}


def _numbers(ranges: str) -> list[int]:
    """The numbers of a text like "0-3 7 9-12"."""
    ends = [part.split("-") for part in ranges.split()]
    return [number for pair in ends for number in range(int(pair[0]), int(pair[-1]) + 1)]

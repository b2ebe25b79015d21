"""Do rollouts that go on from nodes chosen by UCT find more than rollouts from the root?

    python benchmarks/branching.py [--quick] [--seeds N] [--workdir DIR] [--json FILE]

Runs the main job on household twice per seed, with `config.rollouts.branching` "none" and "uct",
from the same weak policy and for the same number of sampled tokens (within a few percent: the
budget of the second is estimated from its first rollouts, which are those of the first). Compared
are the tokens sampled, tasks with a success, distinct nodes of all trees, the pairs of
continuations that `tree_dpo` makes (those of `config.targets`, caps included) and the sum of their
value gaps; in the full form also PGR and success of the trained models. `--quick` is much like the
smoke config, with one seed and one short training, and says nothing about those.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from w2sjax import pipeline
from w2sjax.pipeline.storage import load_arrays, read_json

MODES = ("none", "uct")
METHODS = ("weak", "sft_success", "mcts", "tree_dpo", "ceiling")
CONFIG = Path(__file__).parents[1] / "configs" / "household.py"


def make_config(seed: int, branching: str, cache: Path, *, quick: bool) -> Any:
    """configs/household.py on its dev split, or something like its smoke variant."""
    spec = importlib.util.spec_from_file_location("household_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config("smoke" if quick else "dev").unlock()
    c.name = f"branching_{branching}"
    c.seed = seed
    c.cache_dir = str(cache)
    c.rollouts.branching = branching
    c.methods = METHODS
    c.evaluate.modes = ("sampled",)
    if quick:
        c.methods = ("weak", "sft_all")
        c.tasks.train = 32
        c.rollouts.temperature = 1.0
        c.weak.steps = 80
        c.train.steps = 5
    return c.lock()


def found(workdir: Path) -> dict[str, float]:
    """What a run's rollouts came to."""
    facts = read_json(workdir / "rollouts" / "manifest.json")["facts"]
    trees = load_arrays(workdir / "trees" / "trees.npz")
    gaps = load_arrays(workdir / "targets" / "tree_dpo.npz")["value_gap"]
    present = trees["episode"] >= 0
    return {
        "sampled_tokens": facts["sampled_tokens"],
        "rollouts": int(present.sum()),
        "tasks": len(present),
        "tasks_with_success": int(trees["success"].any(axis=1).sum()),
        "nodes": int(trees["tree_num_nodes"].sum()),
        "pairs": len(gaps),
        "sum_of_value_gaps": float(gaps.sum()),
    }


def trained(report: dict[str, Any]) -> dict[str, float]:
    """Success and PGR of the trained models, where they are defined."""
    figures = {}
    for method, row in report["methods"].items():
        figures[f"{method}: success"] = row["success"]["mean"]
        if method not in ("weak", "ceiling"):
            figures[f"{method}: PGR"] = row["pgr"]["mean"]
    return {name: value for name, value in figures.items() if value is not None}


def main() -> None:
    """Runs all and prints a table of means over seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="in a minute; one seed")
    parser.add_argument("--seeds", type=int, default=3, help="full form: how many")
    parser.add_argument("--workdir", type=Path, help="keeps the runs there, and goes on with them")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as scratch:
        base = arguments.workdir or Path(scratch)
        for seed in range(1 if arguments.quick else arguments.seeds):
            for mode in MODES:
                config = make_config(seed, mode, base / "cache", quick=arguments.quick)
                workdir = base / f"{mode}_{seed}"
                report = pipeline.run(config, workdir)
                row = found(workdir)
                rows[mode].append(row if arguments.quick else row | trained(report))
    names = [name for name in rows["none"][0] if all(name in r for m in MODES for r in rows[m])]
    means = {m: {name: float(np.mean([r[name] for r in rows[m]])) for name in names} for m in MODES}
    print(f"\n{'mean over seeds':32s} {'from the root':>14s} {'branching':>14s} {'ratio':>7s}")
    for name in names:
        none, uct = (means[mode][name] for mode in MODES)
        ratio = f"{uct / none:7.2f}" if none else "      –"
        print(f"{name:32s} {none:14.3f} {uct:14.3f} {ratio}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"seeds": rows, "means": means}, indent=2))


if __name__ == "__main__":
    main()

"""Prints one table over several finished runs of the same config with different seeds.

    python -m w2sjax.report runs/household_seed0 runs/household_seed1 runs/household_seed2

Means are over runs and tasks; 95 % intervals resample both, so that they cover the training seed as
well as the choice of tasks. With one workdir it prints that run's own table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from w2sjax import evaluate
from w2sjax.checkpoints import absolute_path
from w2sjax.report.tables import markdown_tables
from w2sjax.sampling import read_trajectories


def pooled_comparisons(workdirs: list[Path]) -> tuple[str, dict[str, dict]]:
    """Compares all methods over several runs.

    Args:
      workdirs: finished runs, each with config.json and its stages.

    Returns:
      The headline mode, and mode → method → rows as of `evaluate.compare`.

    Raises:
      ValueError: the runs differ in more than their seed, or two have the same one.
      OSError: a workdir is not a finished run.
    """
    configs = [json.loads((workdir / "config.json").read_text())["config"] for workdir in workdirs]
    first = configs[0]
    for workdir, config in zip(workdirs[1:], configs[1:], strict=True):
        differing = [k for k in first if k not in ("seed", "name") and config[k] != first[k]]
        if differing:
            raise ValueError(f"{workdir} and {workdirs[0]} differ in config.{differing[0]}")
    seeds = [config["seed"] for config in configs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"each run must have a seed of its own; the seeds are {seeds}")
    tasks = None
    comparisons = {}
    for mode in first["evaluate"]["modes"]:
        scores: dict[str, evaluate.Scores] = {}
        for method in first["methods"]:
            runs = []
            for workdir in workdirs:
                stage = workdir / "evaluate" / f"{method}.{mode}"
                found = json.loads((stage / "tasks.json").read_text())
                tasks = found if tasks is None else tasks
                if found != tasks:
                    raise ValueError(f"{stage} was evaluated on other tasks than {workdirs[0]}")
                runs.append(
                    evaluate.task_scores(read_trajectories(stage / "episodes.jsonl"), tasks)
                )
            scores[method] = evaluate.pool_runs(runs)
        comparisons[mode] = evaluate.compare(scores)
    return first["evaluate"]["headline"], comparisons


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m w2sjax.report", description=__doc__)
    parser.add_argument("workdirs", nargs="+", type=absolute_path, help="finished runs")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    arguments = parser.parse_args(argv)
    try:
        headline, comparisons = pooled_comparisons(arguments.workdirs)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(markdown_tables(comparisons, headline))
    if arguments.json:
        arguments.json.write_text(json.dumps(comparisons, indent=2) + "\n")


if __name__ == "__main__":
    main()

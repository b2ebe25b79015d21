"""The scripts of `examples/` run, and print what they are there to show."""

import pathlib
import subprocess
import sys

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def test_trees_from_trajectories_to_pairs():
    run = subprocess.run(
        [sys.executable, EXAMPLES / "trees.py"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    tree, path, pairs = run.stdout.split("\n\n")
    assert tree.startswith("(start)  [10 rollouts; mean 0.35, best 0.95, 1000 visits]")
    assert tree.count("\n") == 17  # a line per node
    assert path.splitlines()[0] == "Best path:"
    assert [line.split(". ")[1] for line in path.splitlines()[1:]] == [
        "go to kitchen",
        "take mug",
        "wash mug",
        "go to desk",
        "put mug on desk",
    ]
    blocks = pairs.split("\n  after ")[1:]
    assert len(blocks) == 6
    for block in blocks:
        gap, chosen, rejected = block.splitlines()
        assert float(gap.rsplit("gap ")[1]) >= 0.1
        assert chosen.startswith("    + ") and rejected.startswith("    − ")
    assert "wash mug → go to desk → put mug on desk" in blocks[1]

"""`examples/trees.py` prints what it promises."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "trees.py"


def test_the_example_prints_tree_path_and_pairs(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    best = "go to kitchen → take mug → wash mug → go to desk → put mug on desk"
    for part in (best, "after go to kitchen → take mug: gap", "+ wash mug → go to desk"):
        assert part in printed


def test_importing_the_example_prints_nothing(capsys):
    assert "main" in runpy.run_path(str(EXAMPLE))
    assert capsys.readouterr().out == ""

"""The table says what the numbers say, and untrusted text stays text."""

from w2sjax.evaluate import compare, task_scores
from w2sjax.report import (
    build_report,
    bytes_text,
    interval_text,
    left_out,
    render_markdown,
    terminal_tables,
)
from w2sjax.types import Status, Trajectory


def scores(rate):
    tasks = [f"t{i}" for i in range(40)]
    episodes = [
        Trajectory(
            t, 0, "e", "p", 0, "", "", (), Status.SUCCESS if ok else Status.FAILED, float(ok)
        )
        for t, ok in zip(tasks, (i < 40 * rate for i in range(40)), strict=True)
    ]
    return task_scores(episodes, tasks)


def report(**changes):
    by_method = {"weak": scores(0.2), "sft_success": scores(0.5), "ceiling": scores(0.8)}
    settings = {"name": "n", "seed": 3, "held_out": 40, "split": "test", "train_steps": 7}
    return build_report(
        {"greedy": compare(by_method), "sampled": compare(by_method)},
        headline="sampled",
        stages=[],
        room={"sampled_success": 0.2, "warnings": ["too little"]},
        settings=settings | {"left_out": {"weak: unscored": 2}} | changes,
    )


def test_an_undefined_value_is_a_dash_and_never_a_number():
    assert interval_text({"mean": None, "low": None, "high": None}) == "–"
    assert interval_text(None) == "–"
    assert interval_text({"mean": 0.5, "low": None, "high": None}) == "0.500"
    assert interval_text({"mean": 0.5, "low": 0.25, "high": 0.75}) == "0.500 [0.250, 0.750]"
    assert interval_text({"mean": 0.5, "low": -0.25, "high": 0.75}, signed=True).startswith("+0.5")


def test_markdown_has_every_method_in_every_mode_and_all_that_was_left_out():
    text = render_markdown(report())
    for needed in ("## Actions sampled", "## Actions greedy", "too little", "weak: unscored: 2"):
        assert needed in text
    assert text.index("Actions sampled") < text.index("Actions greedy")  # the headline first
    assert text.count("| ceiling |") == 2
    assert "0.500" in text and "seed 3" in text


def test_terminal_tables_have_one_row_per_method():
    tables = terminal_tables(report())
    assert [table.row_count for table in tables] == [3, 3, 0]


def test_text_in_cells_is_escaped():
    by_method = {"<script>|x": scores(0.2)}
    made = build_report(
        {"greedy": compare(by_method)},
        headline="greedy",
        stages=[],
        room={},
        settings={
            "name": "n",
            "seed": 0,
            "held_out": 40,
            "split": "test",
            "train_steps": 7,
            "left_out": {},
        },
    )
    assert "<script>" not in render_markdown(made)


def test_all_that_stages_left_out_is_counted():
    facts = {
        "rollouts": {"statuses": {"token_limit": 3, "success": 5}, "unscored": 0},
        "train/dpo": {"left_out_too_long": 4},
        "targets": {"tree_dpo": {"below_gap": 2, "pairs": 9}, "mcts": {"over_node_cap": 0}},
        "search": {"trees": 7},
    }
    assert left_out(facts) == {
        "rollouts: token limit": 3,
        "train/dpo: left out too long": 4,
        "tree_dpo: below gap": 2,
    }


def test_bytes_are_read_in_the_largest_unit_they_fill():
    texts = [bytes_text(size) for size in (0, 1023, 1024, 13 * 2**30, 2000 * 2**40)]
    assert texts == ["0 B", "1023 B", "1.0 KiB", "13.0 GiB", "2000.0 TiB"]

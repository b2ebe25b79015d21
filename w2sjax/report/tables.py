"""The table of results: `report.json` for programs, `report.md` and the terminal for people."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

_COLUMNS = (
    ("success", "success"),
    ("reward", "reward"),
    ("pgr", "PGR (reward)"),
    ("pgr_success", "PGR (success)"),
    ("difference", "against sft_success"),
    ("difference_to_weak", "against weak"),
)


def build_report(
    comparisons: Mapping[str, Mapping[str, Any]],
    *,
    headline: str,
    stages: Sequence[Any],
    room: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Joins what the stages wrote into one record.

    Args:
      comparisons: evaluation mode → the rows of `evaluate.compare`.
      headline: the mode that `methods.<name>` shows first.
      stages: finished stages (name, seconds, skipped).
      room: what the gate saw, with its warnings.
      settings: facts to state beside the numbers (seed, tasks, budget, left-out counts).

    Returns:
      JSON values: methods.<name>.{reward,success,pgr,…}.{mean,low,high} for the headline mode and
      methods.<name>.modes.<mode>.… for all, stages.<name>.{seconds,skipped}, room, settings.
    """
    methods = {
        name: {**row, "modes": {mode: rows[name] for mode, rows in comparisons.items()}}
        for name, row in comparisons[headline].items()
    }
    return {
        "headline": headline,
        "methods": methods,
        "stages": {s.name: {"seconds": s.seconds, "skipped": s.skipped} for s in stages},
        "room": dict(room),
        "settings": dict(settings),
    }


def left_out(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """What the stages skipped or could not score: "stage: what" → how many, zeros left away.

    Args:
      facts: stage name → the facts of its manifest; those of stage "targets" are by target.
    """
    counts = {}
    for name, found in facts.items():
        limited = {"token_limit": found.get("statuses", {}).get("token_limit", 0)}
        for what in ("left_out_too_long", "unscored", "token_limit", "malformed_answers"):
            counts[name, what] = (found | limited).get(what, 0)
    for target, found in facts.get("targets", {}).items():
        for what in ("left_out_episodes", "below_gap", "over_node_cap", "over_max_pairs"):
            counts[target, what] = found.get(what, 0) if isinstance(found, Mapping) else 0
    return {f"{name}: {what.replace('_', ' ')}": n for (name, what), n in counts.items() if n}


def interval_text(
    interval: Mapping[str, Any] | None, *, signed: bool = False, digits: int = 3
) -> str:
    """`0.412 [0.360, 0.465]`, or a dash where it is undefined."""
    if interval is None or interval["mean"] is None:
        return "–"
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    text = form.format(interval["mean"])
    if interval["low"] is None:
        return text
    low, high = form.format(interval["low"]), form.format(interval["high"])
    return f"{text} [{low},{'' if digits < 3 else ' '}{high}]"  # short ones must not break in two


def method_rows(
    rows: Mapping[str, Mapping[str, Any]], *, leave_out: Sequence[str] = (), digits: int = 3
) -> list[list[str]]:
    """The rows of `evaluate.compare` as text cells, one line per method.

    Args:
      rows: method → metrics.
      leave_out: keys of columns that are not wanted.
      digits: after the decimal point.

    Returns:
      Per method its name, an interval per column, mean steps, and how many were not scored.
    """
    keys = [key for key, _ in _COLUMNS if key not in leave_out]
    lines = []
    for name, row in rows.items():
        cells = [
            interval_text(row.get(key), signed=key.startswith("difference"), digits=digits)
            for key in keys
        ]
        lines.append([name, *cells, f"{row['mean_steps']:.1f}", str(row["unscored"])])
    return lines


def markdown_tables(comparisons: Mapping[str, Mapping[str, Any]], headline: str) -> str:
    """One table per evaluation mode, the headline first."""
    parts = []
    for mode in sorted(comparisons, key=lambda mode: mode != headline):
        table = _markdown_table(_header(), method_rows(comparisons[mode]))
        parts += [f"## Actions {mode}", "", table, ""]
    return "\n".join(parts)


def _header() -> list[str]:
    return ["method", *(title for _, title in _COLUMNS), "steps", "not scored"]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(html.escape(str(c)) for c in row) + " |" for row in rows]
    return "\n".join(lines)


def render_markdown(report: Mapping[str, Any]) -> str:
    """`report.md`: the tables, what was run, the room there was, and where the time went."""
    settings = report["settings"]
    parts = [f"# {settings['name']}, seed {settings['seed']}", ""]
    parts += [
        f"{settings['held_out']} held-out tasks of split `{settings['split']}`; 95 % bootstrap "
        "intervals over tasks, paired where two methods are compared. Every method had "
        f"{settings['train_steps']} optimizer steps at equal batch.",
        "",
    ]
    parts += [markdown_tables(_by_mode(report), report["headline"])]
    parts += ["## Room to show anything", ""]
    parts += [f"- {key}: {value}" for key, value in report["room"].items() if key != "warnings"]
    parts += [f"- **warning**: {line}" for line in report["room"].get("warnings", ())]
    parts += ["", "## What was left out, cut off or not understood", ""]
    parts += [f"- {key}: {value}" for key, value in settings["left_out"].items()]
    parts += ["", "## Time", ""]
    rows = [
        [name, f"{stage['seconds']:.1f}", "already there" if stage["skipped"] else ""]
        for name, stage in report["stages"].items()
    ]
    parts += [_markdown_table(["stage", "seconds", ""], rows), ""]
    return "\n".join(parts)


def _by_mode(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    methods = report["methods"]
    modes = next(iter(methods.values()))["modes"]
    return {
        mode: {name: method["modes"][mode] for name, method in methods.items()} for mode in modes
    }


def bytes_text(size: int) -> str:
    """`13.0 GiB`: a number of bytes in the largest unit of which it has one."""
    amount, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:.0f} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def plan_table(title: str, columns: Mapping[str, Mapping[str, Mapping[str, str | int]]]) -> Table:
    """What models need, side by side, for a terminal.

    Args:
      title: of the table.
      columns: header → section → label → text, or a number of bytes. All have the same labels;
        those that start with "sum" are set off.

    Returns:
      The table.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for header in columns:
        table.add_column(header, justify="right")
    first = next(iter(columns.values()))
    for section, labels in first.items():
        table.add_section()
        for label in labels:
            cells = [column[section][label] for column in columns.values()]
            texts = [bytes_text(cell) if isinstance(cell, int) else cell for cell in cells]
            table.add_row(label, *texts, style="bold" if label.startswith("sum") else None)
    return table


def terminal_tables(report: Mapping[str, Any]) -> list[Table]:
    """The same tables for a terminal."""
    tables = []
    for mode, rows in _by_mode(report).items():
        table = Table(title=f"actions {mode}", title_justify="left")
        table.add_column("method", no_wrap=True)
        for key, title in _COLUMNS:
            if key != "pgr_success":
                table.add_column(title, justify="right", min_width=14)
        for line in method_rows(rows, leave_out=("pgr_success",), digits=2):
            table.add_row(*line[:-2])
        tables.append(table)
    time = Table(title="seconds per stage", title_justify="left")
    time.add_column("stage")
    time.add_column("seconds", justify="right")
    time.add_column("")
    for name, stage in report["stages"].items():
        time.add_row(name, f"{stage['seconds']:.1f}", "already there" if stage["skipped"] else "")
    return [*tables, time]

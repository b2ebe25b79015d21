"""Progress of long stages: a bar with rate and time left on a terminal, a line now and then
elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

CONSOLE = Console(soft_wrap=True)
_LINE_EVERY_S = 15.0

Update = Callable[[int, str], None]


@contextmanager
def progress_bar(title: str, total: int, unit: str) -> Iterator[Update]:
    """Shows how far a stage is.

    Args:
      title: what is going on.
      total: number of units of work.
      unit: their name, in the plural.

    Yields:
      update(done, note): `done` units are finished; `note` is shown beside the bar.
    """
    start = time.monotonic()
    first: list[
        int
    ] = []  # units that were there before (a resumed stage), so that the rate is honest

    def rate(done: int) -> float:
        if not first:
            first.append(done if done > 1 else 0)
        return (done - first[0]) / max(1e-9, time.monotonic() - start)

    if CONSOLE.is_terminal:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=CONSOLE, transient=False) as bars:
            task = bars.add_task(title, total=total, rate="", note="")

            def update(done: int, note: str = "") -> None:
                text = f"{rate(done):.1f} {unit}/s"
                bars.update(task, completed=done, rate=text, note=note)

            yield update
        return

    last = [start]

    def update_line(done: int, note: str = "") -> None:
        now, speed = time.monotonic(), rate(done)
        if now - last[0] < _LINE_EVERY_S and done < total:
            return
        last[0] = now
        left = f"{(total - done) / speed:.0f} s left" if speed > 0 else "…"
        CONSOLE.print(
            f"  {title}: {done}/{total} {unit}, {speed:.1f}/s, {left} {note}".rstrip(),
            markup=False,
            highlight=False,
        )

    yield update_line

"""What people read: progress while a run goes on, tables when it is done."""

from w2sjax.report.progress import CONSOLE, progress_bar
from w2sjax.report.tables import (
    build_report,
    bytes_text,
    interval_text,
    left_out,
    plan_table,
    render_markdown,
    terminal_tables,
)

__all__ = [
    "CONSOLE",
    "build_report",
    "bytes_text",
    "interval_text",
    "left_out",
    "plan_table",
    "progress_bar",
    "render_markdown",
    "terminal_tables",
]

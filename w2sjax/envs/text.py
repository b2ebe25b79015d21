"""Text between agents and simulators, made harmless."""

from __future__ import annotations


def compact(text: str) -> str:
    """The text with every line's runs of white space made one space, and blank lines left out."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def one_line(action: str, max_chars: int) -> str:
    """An action as a simulator can take it: one line, no control characters, not endless."""
    start = action[: 4 * max_chars].encode(errors="replace").decode()
    printable = "".join(char if char.isprintable() else " " for char in start)
    return " ".join(printable.split())[:max_chars]

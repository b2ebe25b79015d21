"""Large JSON files, entry by entry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHUNK = 4_000_000  # characters
_MAX_ENTRY = 400_000_000  # characters; what is longer is a broken file


def read_entries(path: Path) -> Iterator[tuple[str | int, Any]]:
    """The entries of a file that holds one list or one object, without holding all of them.

    Args:
      path: a UTF-8 file.

    Yields:
      (index, value) for a list, (key, value) for an object.

    Raises:
      ValueError: the file is no such JSON; the message says where.
    """
    with open(path, encoding="utf-8", newline="") as file:
        try:
            yield from _Reader(file, path).entries()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8: {error}") from error


class _Reader:
    def __init__(self, file: Any, path: Path):
        self._file = file
        self._path = path
        self._text = ""
        self._at = 0
        self._ended = False
        self._decoder = json.JSONDecoder()

    def entries(self) -> Iterator[tuple[str | int, Any]]:
        opening = self._next_sign()
        if opening not in ("[", "{"):
            raise ValueError(f"{self._path}: expected a JSON list or object, found {opening!r}")
        closing = "]" if opening == "[" else "}"
        self._at += 1
        index = 0
        while (sign := self._next_sign()) != closing or index == 0:
            if index == 0 and sign == closing:
                break
            if index:
                self._expect(",", index)
            key = index
            if opening == "{":
                key = self._value(index)
                self._expect(":", index)
            yield key, self._value(index)
            index += 1
        self._at += 1
        if rest := self._next_sign():
            raise ValueError(f"{self._path}: {rest!r} after the end of the JSON")

    def _next_sign(self) -> str:
        """The next character that is no white space, "" at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n\ufeff":
                self._at += 1
            if self._at < len(self._text) or not self._read(_CHUNK):
                return self._text[self._at : self._at + 1]

    def _expect(self, sign: str, index: int) -> None:
        found = self._next_sign()
        if found != sign:
            raise ValueError(f"{self._path}: entry {index}: expected {sign!r}, found {found!r}")
        self._at += 1

    def _value(self, index: int) -> Any:
        self._next_sign()
        size = _CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) > _MAX_ENTRY or not self._read(size):
                    raise ValueError(f"{self._path}: entry {index} is broken: {error}") from error
                size *= 2
                continue
            # A number may go on in what was not read yet.
            goes_on = end == len(self._text) or self._text[end] in ".eE+-"
            if isinstance(value, (str, list, dict)) or not goes_on or not self._read(_CHUNK):
                self._at = end
                return value

    def _read(self, size: int) -> bool:
        """Reads on; False at the end of the file."""
        if self._ended:
            return False
        more = self._file.read(size)
        self._ended = not more
        self._text = self._text[self._at :] + more
        self._at = 0
        return bool(more)

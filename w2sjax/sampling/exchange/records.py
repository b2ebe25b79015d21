"""Other people's JSON, a record at a time: arrays, JSON Lines, single objects, and folders of them.

An array is read piece by piece, so that a file larger than memory can be gone through. What cannot
be read is a record with an error rather than an exception: the records around it still count.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

from etils import epath

_SUFFIXES = (".json", ".jsonl")
_CHUNK = 1 << 20  # characters that are read at once
# How far before the end of what was read a parser may stop without its being a mistake: the longest
# literal that can be cut in two is an escape pair (\ud83d\ude00).
_CUT = 16
_TOO_DEEP = "nested too deeply"


class Record(NamedTuple):
    """One JSON value of a file."""

    file: str
    index: int  # among the records of its file, from 0
    value: Any  # None where there is an error
    error: str = ""  # why it cannot be read
    name: str = ""  # the file's name without its suffix, where it holds this one record alone


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Reads a file, or all .json and .jsonl files below a folder in the order of their paths.

    Args:
      path: of a file that holds a JSON array, JSON Lines or one JSON object; or of a folder; also
        in a bucket (`gs://…`).

    Yields:
      All records.

    Raises:
      FileNotFoundError: no such path, or a folder without such files.
    """
    for file in _files(epath.Path(path)):
        with file.open("rb") as binary:
            text = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="\n")
            yield from _records(os.fspath(file), text, file.stem)


def _files(path: epath.Path) -> list[epath.Path]:
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        return [path]

    def below(directory: epath.Path) -> list[epath.Path]:
        found: list[epath.Path] = []
        for entry in sorted(directory.iterdir()):
            if entry.is_dir():
                found += below(entry)
            elif entry.suffix in _SUFFIXES:
                found.append(entry)
        return found

    files = below(path)
    if not files:
        raise FileNotFoundError(f"{path}: a folder without {' or '.join(_SUFFIXES)} files")
    return files


def _records(file: str, text: TextIO, stem: str) -> Iterator[Record]:
    index = 0
    try:
        start = text.read(_CHUNK)
        values = _array(text, start) if start.lstrip()[:1] == "[" else _objects(text, start)
        for value, error, alone in values:
            yield Record(file, index, value, error, stem if alone else "")
            index += 1
    except UnicodeDecodeError as error:
        yield Record(file, index, None, f"not UTF-8 text ({error.reason})")


_Found = tuple[Any, str, bool]  # value, error, whether it is the file's only one


def _array(text: TextIO, buffer: str) -> Iterator[_Found]:
    """The items of a JSON array; ends with an error where the array is broken."""
    decoder = json.JSONDecoder()
    at, first = buffer.index("[") + 1, True

    def skip_blanks() -> str:
        """Goes to the next character that says something; "" at the end of the file."""
        nonlocal buffer, at
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n":
                at += 1
            if at < len(buffer):
                return buffer[at]
            buffer, at = text.read(_CHUNK), 0
            if not buffer:
                return ""

    while True:
        sign = skip_blanks()
        if sign == "]":
            at += 1
            if skip_blanks():
                yield None, "something follows the end of the array", False
            return
        if not first:
            if sign != ",":
                what = f"{sign!r} where a comma or ']' should be" if sign else "cut off"
                yield None, f"the array is broken: {what}", False
                return
            at += 1
            sign = skip_blanks()
        if not sign:
            yield None, "the array is cut off", False
            return
        size = _CHUNK
        while True:
            try:
                value, at = decoder.raw_decode(buffer, at)
                break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string")
                more = text.read(size) if cut or error.pos >= len(buffer) - _CUT else ""
                if not more:
                    yield None, f"not JSON ({error.msg}): {buffer[at : at + 60]!r}", False
                    return
                buffer, at, size = buffer[at:] + more, 0, 2 * size
            except RecursionError:
                yield None, _TOO_DEEP, False
                return
        yield value, "", False
        first = False


def _objects(text: TextIO, start: str) -> Iterator[_Found]:
    """The objects of JSON Lines, or the one object of a file that is laid out over lines."""
    lines = (line for line in _lines(text, start) if line.strip())
    line = next(lines, None)
    if line is None:
        yield None, "the file is empty", False
        return
    value, error = _parse(line)
    if error:  # the first line of an object over several, or a broken one of many
        rest = list(lines)
        whole, trouble = _parse(line + "".join(rest))
        if not trouble:
            yield whole, "", True
            return
        if not any(isinstance(_parse(other)[0], dict) for other in rest):
            yield None, trouble, False
            return
        lines = iter(rest)
    following = next(lines, None)
    yield value, error, following is None and not error
    while following is not None:
        yield (*_parse(following), False)
        following = next(lines, None)


def _lines(text: TextIO, start: str) -> Iterator[str]:
    for line in (start + text.readline()).split("\n"):
        yield line + "\n"
    yield from text


def _parse(text: str) -> tuple[Any, str]:
    """The value, or why there is none."""
    try:
        return json.loads(text), ""
    except RecursionError:
        return None, _TOO_DEEP
    except ValueError as error:
        return None, f"not JSON ({error}): {text[:60]!r}"

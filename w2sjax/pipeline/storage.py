"""Files that a reader sees whole or not at all, in directories and in buckets alike.

A bucket (`gs://…`) has no renames, no appending and no locks, but its objects appear whole.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from etils import epath


def in_bucket(path: os.PathLike[str]) -> bool:
    """Whether a path is in cloud storage rather than on a file system."""
    return "://" in os.fspath(path)


def write_whole(path: os.PathLike[str], data: bytes) -> None:
    """Writes a file so that a reader sees the old or the new one, never a part."""
    path = epath.Path(path)
    if in_bucket(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


@contextlib.contextmanager
def whole_file(path: os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to bit by bit, which readers see whole, or not at all where writing fails."""
    path = epath.Path(path)
    with tempfile.TemporaryDirectory() as scratch:
        temporary = path.with_name(path.name + ".tmp")
        if in_bucket(path):
            temporary = epath.Path(scratch) / path.name
        try:
            with temporary.open("wb") as file:
                yield file
            if in_bucket(path):
                with temporary.open("rb") as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)
            else:
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: os.PathLike[str], record: Any) -> None:
    """Writes a JSON file whole."""
    write_whole(path, (json.dumps(record, indent=2) + "\n").encode())


def read_json(path: os.PathLike[str]) -> Any:
    """Reads a JSON file; what is wrong with it names the file and the line."""
    path = epath.Path(path)
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", "?")
        raise ValueError(
            f"{path}, line {line}: not JSON ({error}); delete its directory to make the stage anew"
        ) from error


def save_arrays(path: os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes arrays as one .npz file, whole."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def load_arrays(path: os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads what `save_arrays` wrote."""
    with (
        epath.Path(path).open("rb") as file,
        np.load(io.BytesIO(file.read()), allow_pickle=False) as arrays,
    ):
        return dict(arrays)


def size_of(path: epath.Path) -> int:
    """A file's size in bytes."""
    # The stat of epath also looks up the owner, who may have no name.
    return path.stat().length if in_bucket(path) else os.stat(path).st_size


def remove(path: epath.Path) -> None:
    """Deletes a file, or a directory with all that is in it; nothing where nothing is there."""
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)


def entries(directory: epath.Path) -> list[epath.Path]:
    """What a directory holds, by name; nothing where it is not there, as an empty one in a bucket
    never is.
    """
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []


def files_below(directory: epath.Path) -> list[epath.Path]:
    """All files of a directory and of those in it, by name."""
    found = []
    for path in entries(directory):
        found += files_below(path) if path.is_dir() else [path]
    return found


@contextlib.contextmanager
def filled_locally(directory: epath.Path, *, upload: bool = True) -> Iterator[Path]:
    """A directory on this machine, for what can only write to one.

    Args:
      directory: where the files shall be; yielded itself where it is on a file system.
      upload: whether this process is the one whose files count, of several that fill directories.

    Yields:
      An empty place of that name, whose files are copied to the bucket at the end.
    """
    if not in_bucket(directory):
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / directory.name
        yield local
        if upload:
            for path in files_below(epath.Path(local)):
                write_whole(directory / path.relative_to(local), path.read_bytes())


@contextlib.contextmanager
def read_locally(directory: epath.Path) -> Iterator[Path]:
    """A directory's files on this machine, for what can only read from one."""
    if not in_bucket(directory):
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for path in files_below(directory):
            local = Path(scratch) / path.relative_to(directory)
            local.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as source, local.open("wb") as target:
                shutil.copyfileobj(source, target)
        yield Path(scratch)

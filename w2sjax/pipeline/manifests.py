"""Stages on disk: a directory each, written atomically, skipped when its manifest matches.

A stage is known by its key: a hash of its name, the settings it reads, the keys of the stages it
reads and the format version. While it runs, it works in `<directory>.partial`, so that a run that
was cut off goes on there; when it is done, its manifest is written and the directory renamed.

Of several processes (`jax.distributed`) the first one makes the stages and the others wait for its
manifests, on a file system that all of them see; in stages that train all take part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

FORMAT = 2
_MANIFEST = "manifest.json"
_KEY = "key.json"
_HASHED_BYTES = 64 << 20
_POLL_S = 0.2  # how often a process looks for what another one makes


@dataclasses.dataclass(frozen=True)
class Stage:
    """A finished stage."""

    name: str
    directory: Path
    key: str
    digest: str  # of what it wrote
    seconds: float  # wall time, that of interrupted runs included
    skipped: bool  # whether it was there already


def stage_key(name: str, settings: Mapping[str, Any], inputs: Mapping[str, Stage]) -> str:
    """Hexadecimal key of a stage."""
    record = {
        "format": FORMAT,
        "name": name,
        "settings": settings,
        "inputs": {role: [s.key, s.digest] for role, s in sorted(inputs.items())},
    }
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=12).hexdigest()


def write_json(path: Path, record: Any) -> None:
    """Writes a JSON file so that a reader sees the old or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Reads a JSON file; what is wrong with it names the file and the line."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", "?")
        raise ValueError(
            f"{path}, line {line}: not JSON ({error}); delete its directory to make the stage anew"
        ) from error


def run_stage(
    name: str,
    directory: Path,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Stage],
    make: Callable[[Path], Mapping[str, Any] | None],
    *,
    together: bool = False,
) -> Stage:
    """Runs a stage unless it is done.

    Args:
      name: of the stage.
      directory: where its results go; created whole or not at all.
      settings: JSON values, all that `make` depends on besides the inputs.
      inputs: role → finished stage that `make` reads.
      make: fills the (possibly partly filled) directory that it is given; what it returns goes into
        the manifest.
      together: of several processes, all call `make` rather than the first one alone.

    Returns:
      The finished stage.

    Raises:
      ValueError: the directory holds another stage's results.
    """
    key = stage_key(name, settings, inputs)
    job = _job()
    if (done := _finished(name, directory, key)) is not None:
        return done
    partial = directory.with_name(directory.name + ".partial")
    if jax.process_index() > 0:
        return _follow(name, directory, partial, key, job, make if together else None)
    with _locked(partial):
        if (done := _finished(name, directory, key)) is not None:  # by the run that was waited for
            return done
        return _make_stage(name, directory, partial, key, job, settings, inputs, make)


@functools.cache
def _job() -> int:
    """A number that the processes of one job have in common, and those of no other."""
    return _as_first_process_has_it(random.SystemRandom().getrandbits(31))


def _follow(name, directory, partial, key, job, make) -> Stage:
    """What a process other than the first does: takes part if there is a `make`, then waits."""
    while (done := _finished(name, directory, key)) is None:
        if make is not None and _being_made(partial) == (key, job):
            make(partial)
            make = None
        time.sleep(_POLL_S)
    return done


def _being_made(partial: Path) -> tuple[str, int] | None:
    """The stage in work and the job that makes it; None if there is none."""
    try:
        found = read_json(partial / _KEY)
    except FileNotFoundError:
        return None
    return found["key"], found.get("job")


def _finished(name: str, directory: Path, key: str) -> Stage | None:
    manifest = directory / _MANIFEST
    if manifest.exists():
        found = read_json(manifest)
        if found["key"] == key:
            if found["digest"] != _digest(directory):
                raise ValueError(
                    f"{directory} was changed after it was made; delete it, and it is made anew, "
                    "with all that depends on it"
                )
            return Stage(name, directory, key, found["digest"], found["seconds"], skipped=True)
        raise ValueError(
            f"{directory} was made with other settings or inputs (key {found['key']}, now {key}); "
            "delete it or start over with --start_over"
        )
    if directory.exists():
        raise ValueError(f"{directory} has no {_MANIFEST}, so it is no stage's result; remove it")
    return None


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Keeps other runs out of a directory, which is created; waits while one works in it.

    The lock is on the open directory, so that it ends with its process and leaves no file behind.
    """
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:  # another run finished or gave up in between
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if partial.exists() and os.path.samestat(os.fstat(descriptor), os.stat(partial)):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not there any more, or it holds half a stage
            partial.rmdir()
        os.close(descriptor)


def _make_stage(name, directory, partial, key, job, settings, inputs, make) -> Stage:
    marker = partial / _KEY
    earlier = 0.0
    if marker.exists() and (found := read_json(marker))["key"] == key:
        earlier = found["seconds"] + max(0.0, _last_written(partial) - found["started"])
    else:
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(marker, {"key": key, "job": job, "seconds": earlier, "started": time.time()})
    start = time.monotonic()
    facts = make(partial)
    seconds = round(earlier + time.monotonic() - start, 3)
    marker.unlink()
    digest = _digest(partial)
    write_json(
        partial / _MANIFEST,
        {
            "name": name,
            "key": key,
            "digest": digest,
            "settings": settings,
            "inputs": {role: [stage.key, stage.digest] for role, stage in inputs.items()},
            "seconds": seconds,
            "facts": dict(facts or {}),
            "versions": versions(),
        },
    )
    os.replace(partial, directory)
    return Stage(name, directory, key, digest, seconds, skipped=False)


def _digest(directory: Path) -> str:
    """Hash of the names, sizes and contents of a stage's files (of large ones the size alone)."""
    total = hashlib.blake2b(digest_size=12)
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != _MANIFEST):
        size = path.stat().st_size
        total.update(f"{path.relative_to(directory)} {size}\n".encode())
        if size <= _HASHED_BYTES:
            total.update(path.read_bytes())
    return total.hexdigest()


def _last_written(directory: Path) -> float:
    """When anything in a directory was written last, in seconds since the epoch."""
    return max(path.stat().st_mtime for path in directory.rglob("*"))


def stage_facts(stage: Stage) -> dict[str, Any]:
    """What a stage reported about itself."""
    return read_json(stage.directory / _MANIFEST)["facts"]


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    packages = ("w2sjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def claim_workdir(workdir: Path, config: Mapping[str, Any], *, start_over: bool) -> None:
    """Makes a workdir this config's own; of several processes, the first one does.

    Args:
      workdir: created where it does not exist.
      config: all settings that decide results, as JSON values.
      start_over: delete what another config made there. What this config made stays, so that the
        same command goes on after an interruption.

    Raises:
      ValueError: it belongs to another config (the message shows the difference field by field), or
        holds files that no run made.
      OSError: it cannot be written; the message names it.
    """
    problem = None
    if jax.process_index() == 0:
        try:
            _claim_workdir(workdir, config, start_over)
        except (ValueError, OSError) as error:
            problem = error
    failed = bool(_as_first_process_has_it(problem is not None))
    if problem is not None:
        raise problem
    if failed:
        raise ValueError(f"--workdir {workdir}: process 0 was refused; its message says why")


def _as_first_process_has_it(value: int) -> int:
    """The value of process 0, in all of them."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _claim_workdir(workdir: Path, config: Mapping[str, Any], start_over: bool) -> None:
    record = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"--workdir {workdir} cannot be written: {error.strerror or error}; choose another one"
        ) from error
    if any(workdir.iterdir()):
        found = read_json(record) if record.exists() else {}
        if "w2sjax" not in found:
            raise ValueError(
                f"--workdir {workdir} holds files that no run of w2sjax made; choose an empty one"
            )
        differences = _differences(found["config"], config)
        if differences and not start_over:
            lines = "\n".join(f"  {line}" for line in differences)
            raise ValueError(
                f"{workdir} was made by another config:\n{lines}\n"
                "Choose another --workdir, or pass --start_over to delete what is there."
            )
        if differences:
            shutil.rmtree(workdir)
            workdir.mkdir()
    write_json(record, {"w2sjax": FORMAT, "config": config})


def _differences(old: Any, new: Any, path: str = "config") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in sorted(set(old) | set(new)):
            here = f"{path}.{key}"
            if key not in old:
                lines.append(f"{here}: not there before, now {new[key]!r}")
            elif key not in new:
                lines.append(f"{here}: was {old[key]!r}, now not there")
            else:
                lines += _differences(old[key], new[key], here)
        return lines
    return [] if old == new else [f"{path}: was {old!r}, now {new!r}"]

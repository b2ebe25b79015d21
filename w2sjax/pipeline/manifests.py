"""Stages on disk: a directory each, complete once its manifest is there, skipped when that matches.

A stage is known by its key: a hash of its name, the settings it reads, the keys of the stages it
reads and the format version. While it runs, it works in `<directory>.partial`, so that a run that
was cut off goes on there; when it is done, its manifest is written and the directory renamed. In a
bucket, which has neither renames nor locks, it works in its place, and the manifest comes last.

Of several processes (`jax.distributed`) the first one begins and ends every stage, on a file system
or in a bucket that all of them see; the others do their share where a stage has shares, and wait
for its manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from w2sjax.checkpoints import absolute_path
from w2sjax.pipeline.processes import FAILED, Processes
from w2sjax.pipeline.storage import (
    entries,
    files_below,
    in_bucket,
    read_json,
    remove,
    size_of,
    write_json,
)

FORMAT = 2
CACHE = "cache"  # of a workdir in a bucket; what is there is right for any config
MANIFEST = "manifest.json"
_KEY = "key.json"
_SHARE = "share.{}.json"  # what another process than the first returned
_HASHED_BYTES = 64 << 20

Facts = Mapping[str, Any]
Make = Callable[[epath.Path], Facts | None]  # fills a directory, returns facts for the manifest
Finish = Callable[[epath.Path, Sequence[Facts]], Facts]  # the same, from the facts of all shares


@dataclasses.dataclass(frozen=True)
class Stage:
    """A finished stage."""

    name: str
    directory: epath.Path
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


def run_stage(
    name: str,
    directory: os.PathLike[str],
    settings: Mapping[str, Any],
    inputs: Mapping[str, Stage],
    make: Make,
    *,
    finish: Finish | None = None,
    together: bool = False,
    processes: Processes | None = None,
) -> Stage:
    """Runs a stage unless it is done.

    Args:
      name: of the stage.
      directory: where its results go; created whole or not at all.
      settings: JSON values, all that `make` depends on besides the inputs.
      inputs: role → finished stage that `make` reads.
      make: fills the (possibly partly filled) directory that it is given; what it returns goes into
        the manifest.
      finish: called in the first process, with the directory and what `make` returned in each
        process, once it has returned in all; its result goes into the manifest instead.
      together: of several processes, all call `make` rather than the first one alone; they do where
        there is a `finish`.
      processes: where there are several.

    Returns:
      The finished stage.

    Raises:
      ValueError: the directory holds another stage's results.
      OtherProcessFailed: one of several processes failed, in this stage or elsewhere.
    """
    directory = absolute_path(directory)
    processes = processes or Processes(directory.parent)
    processes.stage = name
    key = stage_key(name, settings, inputs)
    if (done := _finished(name, directory, key)) is not None:
        return done
    partial = directory
    if not in_bucket(directory):
        partial = directory.with_name(directory.name + ".partial")
    together = together or finish is not None
    if processes.index > 0:
        return _follow(name, directory, partial, key, make if together else None, processes)
    with _locked(partial, processes):
        if (done := _finished(name, directory, key)) is not None:  # by the run that was waited for
            return done
        earlier = _begin(partial, key, processes.job)
        start = time.monotonic()
        facts = make(partial) or {}
        if together:
            others = range(1, processes.count)
            facts = [facts, *(_share_of(process, partial, processes) for process in others)]
            facts = finish(partial, facts) if finish is not None else facts[0]
        seconds = round(earlier + time.monotonic() - start, 3)
        digest = _digest(partial)
        record = {
            "name": name,
            "key": key,
            "digest": digest,
            "settings": settings,
            "inputs": {role: [stage.key, stage.digest] for role, stage in inputs.items()},
            "seconds": seconds,
            "facts": dict(facts),
            "versions": versions(),
        }
        _end(partial, directory, record)
        return Stage(name, directory, key, digest, seconds, skipped=False)


def _begin(partial: epath.Path, key: str, job: int) -> float:
    """Marks a stage as being made; returns the seconds that earlier runs spent on it."""
    marker = partial / _KEY
    earlier = 0.0
    if marker.exists() and (found := read_json(marker))["key"] == key:
        earlier = found["seconds"] + max(0.0, _last_written(partial) - found["started"])
    else:
        for path in entries(partial):
            remove(path)
    write_json(marker, {"key": key, "job": job, "seconds": earlier, "started": time.time()})
    return earlier


def _end(partial: epath.Path, directory: epath.Path, record: Mapping[str, Any]) -> None:
    """Makes a stage's directory what the others see as finished."""
    for path in entries(partial):
        if path.match(_SHARE.format("*")):
            path.unlink()
    if partial == directory:
        write_json(partial / MANIFEST, record)
        remove(partial / _KEY)
    else:
        remove(partial / _KEY)
        write_json(partial / MANIFEST, record)
        partial.replace(directory)


def _follow(
    name: str,
    directory: epath.Path,
    partial: epath.Path,
    key: str,
    make: Make | None,
    processes: Processes,
) -> Stage:
    """What a process other than the first does: its share, if there is a `make`, then it waits."""
    if make is not None:

        def begun() -> Stage | bool | None:
            done = _finished(name, directory, key)
            return done or _being_made(partial) == (key, processes.job) or None

        if isinstance(done := processes.wait(begun), Stage):
            return done
        facts = dict(make(partial) or {})
        share = {"job": processes.job, "facts": facts}
        write_json(partial / _SHARE.format(processes.index), share)
    return processes.wait(lambda: _finished(name, directory, key))


def _share_of(process: int, partial: epath.Path, processes: Processes) -> Facts:
    """What another process's share came to, once it is done."""

    def find() -> Facts | None:
        try:
            found = read_json(partial / _SHARE.format(process))
        except FileNotFoundError:
            return None
        return found["facts"] if found["job"] == processes.job else None

    return processes.wait(find)


def _being_made(partial: epath.Path) -> tuple[str, int] | None:
    """The stage in work and the job that makes it; None if there is none."""
    try:
        found = read_json(partial / _KEY)
    except FileNotFoundError:
        return None
    return found["key"], found.get("job")


def _finished(name: str, directory: epath.Path, key: str) -> Stage | None:
    # Asked before the manifest is: another process may rename a whole stage to this at any moment.
    was_there = not in_bucket(directory) and directory.exists()
    manifest = directory / MANIFEST
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
    if was_there:
        raise ValueError(f"{directory} has no {MANIFEST}, so it is no stage's result; remove it")
    return None


@contextlib.contextmanager
def _locked(partial: epath.Path, processes: Processes) -> Iterator[None]:
    """Keeps other runs out of a directory, which is created; waits while one works in it.

    The lock is on the open directory, so that it ends with its process and leaves no file behind.
    A bucket has no locks: there, two runs must not share a workdir or a cache.
    """
    if in_bucket(partial):
        partial.mkdir(parents=True, exist_ok=True)
        yield
        return
    descriptor = processes.wait(lambda: _lock(partial))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not there any more, or it holds half a stage
            os.rmdir(partial)
        os.close(descriptor)


def _lock(directory: epath.Path) -> int | None:
    """The descriptor of a locked directory, which is created; None while another one holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:  # another run finished or gave up in between
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _digest(directory: epath.Path) -> str:
    """Hash of the names, sizes and contents of a stage's files (of large ones the size alone)."""
    total = hashlib.blake2b(digest_size=12)
    for path in files_below(directory):
        name = path.relative_to(directory)
        if name.name == MANIFEST or str(name) == _KEY or name.match(_SHARE.format("*")):
            continue
        size = size_of(path)
        total.update(f"{name} {size}\n".encode())
        if size <= _HASHED_BYTES:
            total.update(path.read_bytes())
    return total.hexdigest()


def _last_written(directory: epath.Path) -> float:
    """When anything in a directory was written last, in seconds since the epoch; 0 in a bucket."""
    if in_bucket(directory):
        return 0.0
    return max(os.stat(path).st_mtime for path in files_below(directory))


def stage_facts(stage: Stage) -> dict[str, Any]:
    """What a stage reported about itself."""
    return read_json(stage.directory / MANIFEST)["facts"]


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


def claim_workdir(
    workdir: os.PathLike[str], config: Mapping[str, Any], *, start_over: bool
) -> None:
    """Makes a workdir this config's own; of several processes, the first one does.

    Args:
      workdir: created where it does not exist.
      config: all settings that decide results, as JSON values.
      start_over: delete what another config made there, apart from a cache. What this config made
        stays, so that the same command goes on after an interruption.

    Raises:
      ValueError: it belongs to another config (the message shows the difference field by field), or
        holds files that no run made.
      OSError: it cannot be written; the message names it.
    """
    workdir = absolute_path(workdir)
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
    if entries(workdir):
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
            for path in entries(workdir):
                if path.name != CACHE:
                    remove(path)
    remove(workdir / FAILED)
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

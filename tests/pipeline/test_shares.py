"""Two processes in one stage: both do their share, and neither outlives the other's failure.

Here two threads stand for them; tests/pipeline/test_processes_job.py runs real ones.
"""

import concurrent.futures
import json
import threading
import time

import pytest
from etils import epath

from w2sjax.pipeline.manifests import MANIFEST, run_stage, stage_facts
from w2sjax.pipeline.processes import FAILED, OtherProcessFailed, Processes, agree

JOB = 5


def process(index, workdir):
    one = Processes(workdir)
    one.index, one.count, one.job = index, 2, JOB
    return one


def both(workdir, make, **options):
    """What the stage "s" came to in each of two processes: itself, or what was raised."""

    def one(index):
        me = process(index, workdir)

        def mine(directory):
            return make(index, directory)

        try:
            return run_stage("s", workdir / "s", {}, {}, mine, processes=me, **options)
        except Exception as error:
            return me.told(error)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def add_up(directory, shares):
    return {"sum": sum(share["number"] for share in shares), "order": [s["by"] for s in shares]}


@pytest.mark.parametrize("slow", [0, 1])
def test_a_stage_ends_when_all_shares_are_there(tmp_path, slow):
    def make(index, directory):
        time.sleep(0.5 * (index == slow))
        (directory / f"made.{index}").write_text("x")
        return {"number": 10 + index, "by": index}

    first, second = both(tmp_path, make, finish=add_up)
    assert first.digest == second.digest and stage_facts(first) == {"sum": 21, "order": [0, 1]}
    names = [path.name for path in sorted((tmp_path / "s").iterdir())]
    assert names == ["made.0", "made.1", "manifest.json"]
    again = both(tmp_path, lambda *_: pytest.fail("made twice"), finish=add_up)
    assert all(stage.skipped for stage in again)


def test_a_share_of_an_earlier_job_is_not_taken_for_one_of_this(tmp_path):
    begun = threading.Event()

    def make(index, directory):
        if index == 0:
            stale = {"job": JOB - 1, "facts": {"number": 100, "by": "another job"}}
            (directory / "share.1.json").write_text(json.dumps(stale))
            begun.set()
        else:
            begun.wait()
            time.sleep(0.5)
        return {"number": index, "by": index}

    first, _ = both(tmp_path, make, finish=add_up)
    assert stage_facts(first) == {"sum": 1, "order": [0, 1]}


def test_without_shares_the_first_process_alone_makes_a_stage(tmp_path):
    made = []

    def make(index, directory):
        made.append(index)
        return {"by": index}

    first, second = both(tmp_path, make)
    assert made == [0] and first.digest == second.digest and stage_facts(second) == {"by": 0}


def test_a_stage_may_end_while_another_process_looks_for_it(tmp_path, monkeypatch):
    """Renamed right after its manifest was not found."""
    directory, ready = epath.Path(tmp_path / "s"), tmp_path / "ready"
    made = run_stage("s", ready, {}, {}, lambda _: {"by": 0})
    plain = type(directory).exists

    def exists(path):
        found = plain(path)
        if path.name == MANIFEST and not found and ready.exists():
            ready.rename(tmp_path / "s")
        return found

    monkeypatch.setattr(type(directory), "exists", exists)
    found = run_stage("s", directory, {}, {}, pytest.fail, processes=process(1, tmp_path))
    assert not plain(epath.Path(ready)) and found.skipped and found.digest == made.digest


@pytest.mark.parametrize(
    ("failing", "options"),
    [
        (0, {"finish": add_up}),
        (1, {"finish": add_up}),
        (0, {"together": True}),
        (1, {"together": True}),
        (0, {}),
    ],
)
def test_where_one_fails_the_other_says_so(tmp_path, failing, options):
    def make(index, directory):
        if index == failing:
            raise OSError("the disk is full")
        return {"number": 1, "by": index}

    ends = both(tmp_path, make, **options)
    assert isinstance(ends[failing], OSError)
    assert isinstance(ends[1 - failing], OtherProcessFailed)
    wanted = f"process {failing} failed in stage s: OSError: the disk is full"
    assert str(ends[1 - failing]) == wanted
    assert not (tmp_path / "s").exists()
    assert json.loads((tmp_path / FAILED).read_text())["process"] == failing


def test_a_failure_of_an_earlier_job_stops_nobody(tmp_path):
    record = {"job": JOB - 1, "process": 1, "stage": "s", "error": "OSError: long ago"}
    (tmp_path / FAILED).write_text(json.dumps(record))
    first, second = both(tmp_path, lambda index, _: {"number": 1, "by": index}, finish=add_up)
    assert first.digest == second.digest


def test_one_process_agrees_with_itself():
    agree(None)
    with pytest.raises(ValueError, match="mine"):
        agree(ValueError("mine"))

"""A stage appears whole or not at all, is skipped when it matches, and never silently replaced."""

import json
import subprocess
import sys

import pytest

from w2sjax.pipeline.manifests import claim_workdir, read_json, run_stage, stage_facts


def make_counter(calls):
    def make(directory):
        calls.append(1)
        (directory / "out.txt").write_text("done")
        return {"calls": len(calls)}

    return make


def test_a_finished_stage_is_skipped_and_keeps_its_facts(tmp_path):
    calls = []
    first = run_stage("s", tmp_path / "s", {"a": 1}, {}, make_counter(calls))
    second = run_stage("s", tmp_path / "s", {"a": 1}, {}, make_counter(calls))
    assert calls == [1] and not first.skipped and second.skipped
    assert first.key == second.key and stage_facts(second) == {"calls": 1}


def test_a_stage_that_broke_goes_on_in_its_own_directory(tmp_path):
    def breaks(directory):
        (directory / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage("s", tmp_path / "s", {}, {}, breaks)
    assert not (tmp_path / "s").exists()
    seen = []
    run_stage("s", tmp_path / "s", {}, {}, lambda d: seen.append((d / "half.txt").read_text()))
    assert seen == ["half"]


def test_half_a_stage_of_other_settings_is_not_gone_on_with(tmp_path):
    def breaks(directory):
        (directory / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage("s", tmp_path / "s", {"a": 1}, {}, breaks)
    seen = []
    run_stage("s", tmp_path / "s", {"a": 2}, {}, lambda d: seen.append((d / "half.txt").exists()))
    assert seen == [False]


def test_a_result_of_other_settings_is_refused(tmp_path):
    run_stage("s", tmp_path / "s", {"a": 1}, {}, lambda d: None)
    with pytest.raises(ValueError, match="--start_over"):
        run_stage("s", tmp_path / "s", {"a": 2}, {}, lambda d: None)


def test_a_changed_input_changes_the_key(tmp_path):
    inputs = [run_stage("i", tmp_path / f"i{a}", {"a": a}, {}, lambda d: None) for a in (1, 2)]
    keys = {
        run_stage("s", tmp_path / f"s{n}", {}, {"i": stage}, lambda d: None).key
        for n, stage in enumerate(inputs)
    }
    assert len(keys) == 2


def test_a_workdir_of_another_config_is_refused_with_the_difference(tmp_path):
    workdir = tmp_path / "w"
    claim_workdir(workdir, {"train": {"steps": 1}, "seed": 0}, start_over=False)
    claim_workdir(workdir, {"train": {"steps": 1}, "seed": 0}, start_over=False)
    with pytest.raises(ValueError, match=r"config\.train\.steps: was 1, now 2") as caught:
        claim_workdir(workdir, {"train": {"steps": 2}, "seed": 0}, start_over=False)
    assert "seed" not in str(caught.value)
    claim_workdir(workdir, {"train": {"steps": 2}, "seed": 0}, start_over=True)
    assert read_json(workdir / "config.json")["config"]["train"]["steps"] == 2


def test_start_over_keeps_what_the_same_config_made(tmp_path):
    workdir = tmp_path / "w"
    claim_workdir(workdir, {"seed": 0}, start_over=True)
    (workdir / "stage").mkdir()
    claim_workdir(workdir, {"seed": 0}, start_over=True)
    assert (workdir / "stage").exists()


@pytest.mark.parametrize("start_over", [False, True])
def test_a_model_directory_is_never_taken_for_a_workdir(tmp_path, start_over):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="no run of w2sjax made"):
        claim_workdir(tmp_path, {}, start_over=start_over)


def test_a_result_that_was_changed_afterwards_is_noticed(tmp_path):
    run_stage("s", tmp_path / "s", {}, {}, make_counter([]))
    (tmp_path / "s" / "out.txt").write_text("edited")
    with pytest.raises(ValueError, match="was changed after it was made"):
        run_stage("s", tmp_path / "s", {}, {}, make_counter([]))


def test_other_results_of_an_input_change_the_key(tmp_path):
    def key(text, number):
        inputs = {
            "i": run_stage(
                "i", tmp_path / f"i{number}", {}, {}, lambda d: (d / "x").write_text(text) and None
            )
        }
        return run_stage("s", tmp_path / f"s{number}", {}, inputs, lambda d: None).key

    assert key("a", 0) == key("a", 1) != key("b", 2)


def test_start_over_never_deletes_what_no_run_made(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="no run of w2sjax made"):
        claim_workdir(tmp_path, {}, start_over=True)
    assert (tmp_path / "precious.txt").exists()


def test_an_unwritable_workdir_is_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        claim_workdir(blocker / "w", {}, start_over=False)


def test_a_broken_manifest_names_file_and_line(tmp_path):
    run_stage("s", tmp_path / "s", {}, {}, lambda d: None)
    manifest = tmp_path / "s" / "manifest.json"
    manifest.write_text(json.dumps({"key": 1})[:-3])
    with pytest.raises(ValueError, match=r"manifest\.json, line 1"):
        run_stage("s", tmp_path / "s", {}, {}, lambda d: None)


def test_two_runs_make_a_shared_stage_once(tmp_path):
    code = (
        "import sys, time, pathlib; from w2sjax.pipeline.manifests import run_stage\n"
        "log = pathlib.Path(sys.argv[1]) / 'log'\n"
        "def make(directory):\n"
        "    with log.open('a') as out: out.write('made\\n')\n"
        "    time.sleep(1)\n"
        "stage = run_stage('s', pathlib.Path(sys.argv[1]) / 's', {}, {}, make)\n"
        "print(stage.key)\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    keys = {run.communicate(timeout=120)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0] and len(keys) == 1
    assert (tmp_path / "log").read_text() == "made\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "s"]

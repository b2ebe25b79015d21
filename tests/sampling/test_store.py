"""What was written is read back; what is damaged is named."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2sjax.sampling.store import TrajectoryFileError, TrajectoryWriter, read_trajectories
from w2sjax.types import Status, Step, Trajectory

EPISODE = Trajectory(
    task_id="train-7",
    rollout=1,
    env="household",
    policy="weak",
    seed=3,
    instruction="Act.",
    first_observation="You see a mug 1.",
    steps=(
        Step("Action: take mug 1", "take mug 1", "Taken.", 0.5, (5, 6, 4), -1.25),
        Step("Äh\u2028", None, "No action.", 0.0, None, None),
    ),
    status=Status.STEP_LIMIT,
    score=0.5,
)

_floats = st.floats(allow_nan=False, allow_infinity=False)
_any_text = st.text() | st.just("half a pair \ud800")
_steps = st.builds(
    Step,
    answer=_any_text,
    action=st.none() | _any_text,
    observation=_any_text,
    reward=_floats,
    answer_ids=st.none() | st.lists(st.integers(0, 2**31 - 1)).map(tuple),
    answer_logp=st.none() | _floats,
)
_episodes = st.builds(
    Trajectory,
    task_id=_any_text,
    rollout=st.integers(0, 2**40),
    env=_any_text,
    policy=_any_text,
    seed=st.integers(),
    instruction=_any_text,
    first_observation=_any_text,
    steps=st.lists(_steps, max_size=4).map(tuple),
    status=st.sampled_from(Status),
    score=st.floats(0, 1),
    error=_any_text,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_episodes, max_size=3), st.integers(0, 4))
def test_round_trip(tmp_path_factory, episodes, start):
    episodes = [dataclasses.replace(t, start=min(start, len(t.steps))) for t in episodes]
    path = tmp_path_factory.mktemp("store") / "a.jsonl"
    with TrajectoryWriter(path) as writer:
        for episode in episodes:
            writer.write(episode)
    assert read_trajectories(path) == episodes
    assert path.read_bytes().count(b"\n") == len(episodes)


def _written(path, count=3):
    episodes = [dataclasses.replace(EPISODE, rollout=i) for i in range(count)]
    with TrajectoryWriter(path) as writer:
        for episode in episodes:
            writer.write(episode)
    return episodes


def test_every_episode_is_on_disk_once_write_returns(tmp_path):
    writer = TrajectoryWriter(tmp_path / "a.jsonl")
    writer.write(EPISODE)
    assert read_trajectories(tmp_path / "a.jsonl") == [EPISODE]
    writer.close()
    writer.close()


def test_a_file_cut_anywhere_is_resumed_at_a_line(tmp_path):
    """The file of a process killed at any byte, resumed, holds whole episodes only."""
    path = tmp_path / "a.jsonl"
    episodes = _written(path)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in {0, 1, ends[0] - 1, ends[0], ends[0] + 1, ends[1] + 100, len(whole) - 1, len(whole)}:
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        torn = cut - ([0, *ends][kept])
        assert read_trajectories(path, allow_torn_tail=True) == episodes[:kept]
        if torn:
            with pytest.raises(TrajectoryFileError, match=rf"a\.jsonl:{kept + 1}: .*no newline"):
                read_trajectories(path)
        with TrajectoryWriter(path) as writer:
            assert writer.torn_bytes == torn
            for episode in episodes[kept:]:
                writer.write(episode)
        assert path.read_bytes() == whole


def test_a_torn_line_longer_than_the_read_buffer(tmp_path):
    path = tmp_path / "a.jsonl"
    (episode,) = _written(path, 1)
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" * 200_000)
    with TrajectoryWriter(path) as writer:
        assert writer.torn_bytes == 200_000
    assert read_trajectories(path) == [episode]
    path.write_bytes(b"x" * 200_000)
    TrajectoryWriter(path).close()
    assert path.read_bytes() == b""


def _change(**fields):
    return lambda record: {**record, **fields}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change(format=2), "reads format 1, got 2"),
        (_change(start=0), "'start': wanted a whole number from 1 to the 2 steps, got 0"),
        (_change(start=3), "'start'"),
        (_change(format=True), "reads format 1, got True"),
        (lambda r: {k: v for k, v in r.items() if k != "seed"}, "missing fields: seed"),
        (_change(colour="red"), "unknown fields: colour"),
        (_change(task_id=7), "'task_id': wanted a string, got 7"),
        (_change(rollout=-1), "'rollout'"),
        (_change(rollout=1.5), "'rollout'"),
        (_change(seed=True), "'seed'"),
        (_change(score=1.5), r"'score': wanted a number in \[0, 1\], got 1.5"),
        (_change(score=None), "'score'"),
        (_change(status="won"), "'status': wanted one of success"),
        (_change(messages=[]), "'messages'"),
        (_change(messages="none"), "'messages'"),
        (lambda r: {**r, "messages": r["messages"][:-1]}, "'messages'.*5 messages"),
        (
            lambda r: {**r, "messages": [*r["messages"][:2], *reversed(r["messages"][2:])]},
            r"'messages\[2\]'.*'assistant'",
        ),
        (_change(actions=["look"]), "'actions': wanted 2 entries"),
        (_change(actions=["look", 3]), r"'actions\[1\]'"),
        (_change(rewards=["a", 0]), r"'rewards\[0\]'"),
        (_change(answer_ids=[[1, -2], None]), r"'answer_ids\[0\]'"),
        (_change(answer_ids=[[1, 2.5], None]), r"'answer_ids\[0\]'"),
        (_change(answer_logps=["x", None]), r"'answer_logps\[0\]'"),
        (_change(error=None), "'error'"),
        (lambda r: [r], "wanted a JSON object, got list"),
    ],
)
def test_damaged_fields_are_named_with_file_and_line(tmp_path, change, message):
    path = tmp_path / "a.jsonl"
    _written(path)
    lines = path.read_text().split("\n")[:-1]
    lines[1] = json.dumps(change(json.loads(lines[1])))
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(TrajectoryFileError, match=rf"a\.jsonl:2: .*{message}"):
        read_trajectories(path)


@pytest.mark.parametrize("line", [b"", b"{", b"\xff\xfe", b"null", b'{"format": NaN}', b"[" * 5000])
def test_lines_that_are_no_episode_are_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    _written(path, 1)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(TrajectoryFileError, match=r"a\.jsonl:2: "):
        read_trajectories(path)


@pytest.mark.parametrize(
    "change", [{"score": float("nan")}, {"score": 2.0}, {"rollout": -1}, {"seed": 1.5}]
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, change):
    path = tmp_path / "a.jsonl"
    with (
        TrajectoryWriter(path) as writer,
        pytest.raises(ValueError, match="train-7"),
    ):
        writer.write(dataclasses.replace(EPISODE, **change))
    assert path.read_bytes() == b""


def test_a_line_is_what_a_person_can_read(tmp_path):
    path = tmp_path / "a.jsonl"
    _written(path, 1)
    record = json.loads(path.read_text())
    assert [m["role"] for m in record["messages"]] == ["system", "user", *["assistant", "user"] * 2]
    assert record["actions"] == ["take mug 1", None]
    assert "Äh" in path.read_text()


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_trajectories(tmp_path / "none.jsonl")

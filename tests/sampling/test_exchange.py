"""Other people's records become trajectories or say why not; ours become messages and come back."""

import dataclasses
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2sjax.chat import parse_answer
from w2sjax.sampling.exchange import (
    ContextsDifferError,
    ImportOptions,
    ImportReport,
    Record,
    episode_record,
    import_records,
    preference_record,
    read_records,
    sft_record,
    to_messages,
)
from w2sjax.sampling.exchange import records as record_files
from w2sjax.types import Status, Step, Trajectory

# ------------------------------------------------------------------------------------- helpers


def talk(*turns, keys=("from", "value"), roles=("human", "gpt")):
    """Turns of a user and an assistant."""
    return [{keys[0]: roles[i % 2], keys[1]: text} for i, text in enumerate(turns)]


def eto(actions, *, examples=2, meta=(), **fields):
    """A record as ETO's evaluation writes them."""
    turns = ["Do science.", "OK"]
    for i in range(examples // 2):
        turns += [f"Observation: seen {i}" if i else "Make paint.", f"Thought: e\nAction: e{i}"]
    turns.append("Task Description:\nBoil water.")
    for action in actions:
        turns += [f"Thought: I want {action}.\nAction: {action}", f"Observation: did {action}"]
    facts = {"steps": len(actions), "reward": 0.4, "finished": True, "success": True,
             "terminate_reason": "success", "error": None}  # fmt: skip
    return {"id": 7, "conversations": talk(*turns), "meta": facts | dict(meta)} | fields


def chat(*turns, system="Act.", **fields):
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += talk(*turns, keys=("role", "content"), roles=("user", "assistant"))
    return {"id": "t", "messages": messages, "score": 1.0} | fields


def convert(*values, format="sharegpt", **options):
    """(trajectories, report) of records."""
    report = ImportReport()
    records = [Record("f.json", index, value) for index, value in enumerate(values)]
    return list(import_records(records, ImportOptions(format, **options), report)), report


def one(value, **options):
    found, report = convert(value, **options)
    assert not report.refused, report.refused[0]
    return found[0]


def refusal(value, **options):
    found, report = convert(value, **options)
    assert not found and len(report.refused) == 1 == report.records
    return str(report.refused[0])


# --------------------------------------------------------------------------------- sharegpt in


def test_an_evaluation_record_of_eto():
    value = eto(["open door", "go"], examples=4)
    got = one(value, env="scienceworld", policy="sft", task_prefix="Task Description:")
    assert (got.task_id, got.rollout, got.env, got.policy) == ("7", 0, "scienceworld", "sft")
    assert (got.instruction, got.first_observation) == ("Do science.", "Boil water.")
    assert [s.answer for s in got.steps] == [
        "Thought: I want open door.\nAction: open door",
        "Thought: I want go.\nAction: go",
    ]
    assert [(s.action, s.observation) for s in got.steps] == [
        ("open door", "did open door"),
        ("go", "did go"),
    ]
    assert [s.reward for s in got.steps] == [0.0, 0.4] and got.score == 0.4
    assert got.status is Status.FAILED  # "success" there says that the environment ended it


def test_examples_are_kept_as_text_of_the_instruction():
    value = eto(["go"], examples=4)
    got = one(value, examples="keep")
    texts = [m["value"] for m in value["conversations"]]
    assert got.instruction.startswith("Do science.") and got.first_observation == texts[6]
    at = [got.instruction.index(text) for text in texts[2:6]]
    assert at == sorted(at) and got.steps == one(value).steps


@pytest.mark.parametrize("number", [0, 2, 6])
def test_the_number_of_examples_is_found_or_told(number):
    value = eto(["a", "b"], examples=number)
    found, report = convert(value, value)
    assert report.example_messages == {number: 2} and [t.rollout for t in found] == [0, 1]
    assert one(value, example_messages=number) == found[0]
    wrong = refusal(value, example_messages=number + 2)
    assert "f.json, record 0, field 'conversations[" in wrong and "example_messages" in wrong


def test_a_wrong_number_of_examples_is_noticed_by_the_steps_too():
    """An observation without its prefix looks like a task; meta.steps says that it is none."""
    odd, plain = eto(["a", "b"], examples=0), eto(["a", "b"], examples=0)
    odd["conversations"][4]["value"] = "did a"
    found, report = convert(odd, plain, odd)
    assert report.example_messages == {0: 2} and found[0].steps == found[1].steps
    assert [(r.record, r.field) for r in report.refused] == [(0, "meta.steps")]
    assert report.notes["observations without the prefix"] == 1
    del odd["meta"]["steps"]  # without it the first record decides, and the others object
    found, report = convert(odd, plain, plain)
    assert report.example_messages == {2: 1}
    assert [(r.record, r.field) for r in report.refused] == [
        (1, "conversations[4]"), (2, "conversations[4]"),
    ]  # fmt: skip
    assert len(convert(odd, plain, example_messages=0)[0]) == 2


def test_sources_of_different_layouts_go_into_one_report():
    report = ImportReport()
    options = ImportOptions("sharegpt")
    found = []
    for number in (14, 0):
        record = Record("f.json", 0, eto(["a"], examples=number))
        found += import_records([record], options, report)
    assert [t.rollout for t in found] == [0, 1] and report.tasks == 1
    assert report.example_messages == {14: 1, 0: 1} and not report.refused


def test_expert_records_have_no_score_of_their_own():
    value = {"id": "e", "conversations": talk("I.", "OK", "Task.", "Action: a", "Observation: x")}
    assert "default_score" in refusal(value)
    got, report = convert(value, value | {"reward": 0.5}, default_score=1.0)
    assert [(t.score, t.status) for t in got] == [(1.0, Status.SUCCESS), (0.5, Status.FAILED)]
    assert report.notes["without a score of their own (default_score)"] == 1


def test_an_episode_may_end_with_an_answer():
    value = eto(["a", "b"])
    value["conversations"].pop()
    got, report = convert(value)
    assert [s.observation for s in got[0].steps] == ["did a", ""]
    assert sum(n for note, n in report.notes.items() if "end with an answer" in note) == 1


@pytest.mark.parametrize(
    ("meta", "options", "status", "score"),
    [
        ({"reward": 1.0}, {}, Status.SUCCESS, 1.0),
        ({"reward": True}, {}, Status.SUCCESS, 1.0),
        ({"reward": 0.7}, {"success_score": 0.7}, Status.SUCCESS, 0.7),
        ({"reward": 0.7}, {"success_from": "field"}, Status.SUCCESS, 0.7),
        ({"success": False, "terminate_reason": "max_steps"}, {}, Status.STEP_LIMIT, 0.4),
        ({"success": False, "terminate_reason": "exceeding maximum input length"}, {},
         Status.TOKEN_LIMIT, 0.4),
        ({"reward": 40, "success": False}, {"score_scale": 100.0}, Status.FAILED, 0.4),
        ({"reward": -1.0}, {"clip_scores": True}, Status.FAILED, 0.0),
    ],
)  # fmt: skip
def test_score_and_status(meta, options, status, score):
    got = one(eto(["a"], meta=meta), **options)
    assert (got.status, got.score) == (status, score)


def test_a_success_field_of_the_record_itself_is_believed():
    value = chat("Task.", "Action: a", "Done.", score=0.5, success=True)
    for options, status in (({}, Status.SUCCESS), ({"success_from": "score"}, Status.FAILED)):
        assert one(value, format="messages", **options).status is status


def test_task_ids_and_numbers_of_rollouts():
    game = {"game_file": "/data/put-Mug/trial_T1", "id": "alfworld_3"}
    error = {"error": "/elsewhere/put-Mug/trial_T1/game.tw-pddl"}
    expert = one(eto(["a"], **game), id_field="game_file")
    assert (
        expert.task_id == "trial_T1" == one(eto(["a"], meta=error), id_field="meta.error").task_id
    )
    values = [eto(["a"], id=i) for i in ("x", 1, "x", "1", "x")]
    found, report = convert(*values)
    numbers = [(t.task_id, t.rollout) for t in found]
    assert numbers == [("x", 0), ("1", 0), ("x", 1), ("1", 1), ("x", 2)] and report.tasks == 2
    nameless = eto(["a"])
    del nameless["id"]
    assert "choose one as id_field" in refusal(nameless)


# ------------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"messages": None}, "'messages'", "is missing"),
        ({"messages": "hello"}, "'messages'", "wanted a list"),
        ({"score": "high"}, "'score'", "wanted a number"),
        ({"score": float("nan")}, "'score'", "wanted a number"),
        ({"score": 70}, "'score'", "score_scale"),
        ({"score": 0.5, "reward": 0.6}, "'score'", "differ"),
        ({"status": "won"}, "'status'", "env_error"),
        ({"status": "failed", "success": True}, "'success'", "status is 'failed'"),
        ({"success": "yes"}, "'success'", "true or false"),
        ({"rewards": [1.0, 2.0]}, "'rewards'", "2 of them for 1"),
        ({"rewards": ["x"]}, "'rewards[0]'", "wanted a number"),
        ({"rollout": -1}, "'rollout'", "negative"),
        ({"rollout": True}, "'rollout'", "whole number"),
        ({"id": ["t"]}, "'id'", "a string or a whole number"),
        ({"meta": []}, "'meta'", "wanted an object"),
        ({"system": "Be."}, "'system'", "messages[0]"),
    ],
)
def test_a_field_that_is_wrong_is_named(change, field, says):
    text = refusal(chat("Task.", "Action: a", "Done.") | change, format="messages")
    assert text.startswith(f"f.json, record 0, field {field}: ") and says in text


@pytest.mark.parametrize(
    ("at", "message", "field", "says"),
    [
        (1, "hello", "messages[1]", "wanted an object"),
        (1, {"role": "tool", "content": "x"}, "messages[1].role", "'tool'"),
        (1, {"role": "assistant", "content": "x"}, "messages[1]", "wanted a message of the user"),
        (3, {"role": "assistant", "content": "x"}, "messages[3]", "wanted a message of the user"),
        (2, {"role": "assistant", "content": None, "tool_calls": [1]}, "messages[2].content",
         "wanted text, got None"),
        (1, {"role": "user", "content": [{"type": "text", "text": "x"},
                                         {"type": "image_url", "image_url": {"url": "x"}}]},
         "messages[1].content[1]", "is not text but a part of type 'image_url'"),
        (1, {"role": "user", "content": []}, "messages[1].content", "wanted text"),
    ],
)  # fmt: skip
def test_a_message_that_is_wrong_is_named(at, message, field, says):
    value = chat("Task.", "Action: a", "Done.")
    value["messages"][at] = message
    text = refusal(value, format="messages")
    assert f"field '{field}': " in text and says in text


def test_parts_of_text_are_text():
    value = chat("Task.", "Action: a", "Done.")
    value["messages"][1]["content"] = [{"type": "text", "text": t} for t in ("Ta", "sk.")]
    plain = chat("Task.", "Action: a", "Done.")
    assert one(value, format="messages") == one(plain, format="messages")


def test_what_was_refused_or_not_used_is_counted():
    good = eto(["a"], tags=["x"])
    good["conversations"][3]["loss"] = False
    pair = {"id": 1, "prompt": [], "chosen": [], "rejected": []}
    bad = eto(["a"], meta={"reward": 3})
    answers = [*talk("I.", "OK", "T.", "Action: go\nthen wait", "Observation: x", "Hm.")]
    odd = {"id": 2, "conversations": answers, "score": 0.2}
    found, report = convert(good, pair, bad, "text", odd, example_messages=None)
    assert (report.records, report.imported, len(found)) == (5, 1, 1)  # `odd` has no examples
    assert [(r.record, r.field) for r in report.refused] == [
        (1, "conversations"), (2, "meta.reward"), (3, ""), (4, "conversations[4]"),
    ]  # fmt: skip
    assert "chosen, id, prompt, rejected" in report.refused[0].reason
    assert report.unused_fields == {"tags": 1, "meta.finished": 1, "conversations[].loss": 1}
    assert json.loads(json.dumps(report.facts()))["refused"][2]["record"] == 3
    (got,), report = convert(odd)
    assert [s.action for s in got.steps] == ["go", None]
    assert report.notes["malformed answers (no action)"] == 1
    assert sum(n for note, n in report.notes.items() if "lines after the action" in note) == 1


def test_the_same_rollout_twice_is_refused():
    value = chat("Task.", "Action: a", "Done.", rollout=3)
    found, report = convert(value, value, format="messages")
    assert [t.rollout for t in found] == [3] and report.refused[0].field == "rollout"


@pytest.mark.parametrize(
    "options",
    [{"format": "csv"}, {"examples": "both"}, {"success_from": "luck"}, {"example_messages": 3},
     {"score_scale": 0.0}, {"default_score": 2.0}],
)  # fmt: skip
def test_options_that_cannot_be(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ImportOptions(**{"format": "messages"} | options)


# --------------------------------------------------------------------------------- round trips

_text = st.text(max_size=20)
_floats = st.floats(allow_nan=False, allow_infinity=False)
_steps = st.lists(
    st.tuples(_text | st.just("OK") | st.just("Action: a"), _text, _floats), max_size=4
)


@settings(max_examples=150, deadline=None)
@given(_text, _text, _steps, st.sampled_from(Status), st.floats(0, 1), st.integers(0, 9))
def test_messages_come_back_as_they_were(instruction, first, steps, status, score, rollout):
    if not steps and status.scored:
        steps = [("Action: a", "seen", 0.0)]
    episode = Trajectory(
        task_id="t-1",
        rollout=rollout,
        env="e",
        policy="p",
        seed=5,
        instruction=instruction,
        first_observation=first,
        steps=tuple(Step(a, parse_answer(a).action, o, r, (1,), -0.5) for a, o, r in steps),
        status=status,
        score=score,
        error="" if status.scored else "broke",
    )
    record = json.loads(json.dumps(episode_record(episode)))
    found, report = convert(record, format="messages")
    bare = [dataclasses.replace(s, answer_ids=None, answer_logp=None) for s in episode.steps]
    assert found == [dataclasses.replace(episode, steps=tuple(bare))]
    assert not report.unused_fields


# --------------------------------------------------------------------------------------- files


def values(path):
    return [r.value for r in read_records(path)]


RECORDS = [{"a": "x\u2028" * n, "b": [1.5, {"c": '"]}\\'}], "n": n} for n in range(40)]


@pytest.mark.parametrize("indent", [None, 4])
@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_arrays_lines_and_objects_read_alike(tmp_path, monkeypatch, indent, ascii, chunk):
    monkeypatch.setattr(record_files, "_CHUNK", chunk)
    array, lines, single = (tmp_path / name for name in ("a.json", "b.jsonl", "c.json"))
    array.write_text(json.dumps(RECORDS, indent=indent, ensure_ascii=ascii), "utf-8-sig")
    text = "\r\n\n".join(json.dumps(r, ensure_ascii=ascii) for r in RECORDS)
    lines.write_bytes(text.encode())
    single.write_text(json.dumps(RECORDS[9], indent=indent, ensure_ascii=ascii))
    assert values(array) == RECORDS == values(lines)
    assert [(r.value, r.name) for r in read_records(single)] == [(RECORDS[9], "c")]
    assert {r.name for r in read_records(array)} == {r.name for r in read_records(lines)} == {""}
    assert [r.index for r in read_records(array)] == list(range(40))


def test_a_folder_is_read_in_the_order_of_its_paths_and_names_its_tasks(tmp_path):
    for run in ("run1", "run0"):
        (tmp_path / run).mkdir()
        for task in ("b", "a"):
            value = eto([run])
            del value["id"]
            (tmp_path / run / f"{task}.json").write_text(json.dumps(value, indent=2))
    (tmp_path / "log.txt").write_text("not ours")
    report = ImportReport()
    found = list(import_records(read_records(tmp_path), ImportOptions("sharegpt"), report))
    assert [(t.task_id, t.rollout, t.steps[0].action) for t in found] == [
        ("a", 0, "run0"), ("b", 0, "run0"), ("a", 1, "run1"), ("b", 1, "run1"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "good", "says"),
    [
        ('[{"n": 0}, {"n": 1}', 2, "broken: cut off"),
        ('[{"n": 0}, {"n": 1},', 2, "cut off"),
        ('[{"n": 0}, {"n": 1}, {"n', 2, "Unterminated string"),
        ('[{"n": 0} {"n": 1}]', 1, "comma"),
        ('[{"n": 0}, {"n": }, {"n": 2}]', 1, "Expecting value"),
        ('[{"n": 0}] []', 1, "follows the end"),
        ('{"n": 0}\n{"n": \n{"n": 2}\n', 2, "Expecting value"),
        ('{"n": \n{"n": 1}\n', 1, "Expecting value"),
        ('{\n"n": 0,\n', 0, "not JSON"),
        ("", 0, "empty"),
        ("[" * 100_000, 0, "nested too deeply"),
        ("\xff", 0, "UTF-8"),
    ],
)
def test_a_damaged_file_gives_what_is_whole_and_says_where_it_breaks(tmp_path, text, good, says):
    path = tmp_path / "d.json"
    path.write_bytes(text.encode("latin-1"))
    found = list(read_records(path))
    errors = [r for r in found if r.error]
    assert len(found) - len(errors) == good and says in errors[0].error and len(errors) == 1
    assert (errors[0].file, errors[0].value) == (str(path), None)


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            list(read_records(path))


def test_an_array_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "_CHUNK", 1 << 14)
    path = tmp_path / "big.json"
    path.write_text(json.dumps([{"text": "x" * 1000} for _ in range(5000)]))
    tracemalloc.start()
    assert sum(1 for _ in read_records(path)) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 10


# ----------------------------------------------------------------------------------- records out


def episode(*answers, rollout=0, score=1.0, instruction="Act."):
    steps = tuple(Step(a, parse_answer(a).action, f"after {a}") for a in answers)
    return Trajectory(
        "t", rollout, "e", "p", 0, instruction, "See.", steps, Status.FAILED, score
    )  # fmt: skip


def contents(messages):
    return [(m["role"][0], m["content"]) for m in messages]


def test_a_pair_parts_where_it_says():
    good = episode("Action: a", "Action: b", "Action: c")
    bad = episode("Action: a", "Action: x", "Action: y", "Action: z", rollout=1, score=0.2)
    record = preference_record(good, bad, start=1, chosen_end=3, rejected_end=3, value_gap=0.8)
    assert contents(record["prompt"]) == [
        ("s", "Act."), ("u", "See."), ("a", "Action: a"), ("u", "after Action: a"),
    ]  # fmt: skip
    assert [m["content"] for m in record["chosen"]] == ["Action: b", "after Action: b", "Action: c"]
    rejected = ["Action: x", "after Action: x", "Action: y"]
    assert [m["content"] for m in record["rejected"]] == rejected
    assert (record["value_gap"], record["chosen_score"], record["rejected_score"]) == (0.8, 1, 0.2)
    merged = preference_record(
        good, bad, start=1, chosen_end=3, rejected_end=3, value_gap=0.8, system="user"
    )
    assert contents(merged["prompt"])[0] == ("u", "Act.\n\nSee.")
    assert (merged["prompt"][1:], merged["chosen"]) == (record["prompt"][2:], record["chosen"])


def test_sides_that_thought_differently_before_have_no_common_prompt():
    good = episode("Thought: 1\nAction: a", "Action: b")
    bad = episode("Thought: 2\nAction: a", "Action: c", rollout=1)
    ends = {"start": 1, "chosen_end": 2, "rejected_end": 2, "value_gap": 1.0}
    with pytest.raises(ContextsDifferError, match="before step 1"):
        preference_record(good, bad, **ends)
    record = preference_record(good, bad, **ends, context="chosen")
    assert record["prompt"] == to_messages(good)[:4]
    assert record["rejected"] == [{"role": "assistant", "content": "Action: c"}]


def test_a_weighted_episode_ends_with_the_last_answer_that_counts():
    whole = episode("Action: a", "Action: b", "Action: c")
    record = sft_record(whole, [0.5, 2.0, 0.0, 9.0])
    assert record["step_weights"] == [0.5, 2.0]
    assert record["messages"] == to_messages(whole)[:5]
    assert record["messages"][-1] == {"role": "assistant", "content": "Action: b"}
    assert sft_record(whole, [0.0, 0.0, 0.0]) is None

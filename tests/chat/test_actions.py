"""The parser reads back what the writer wrote, and nothing else counts as an action."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w2sjax.chat import MALFORMED_OBSERVATION, format_answer, parse_answer

_line = st.text(min_size=1).filter(
    lambda s: s == s.strip() and not set(s) & {"\n", "\r"} and "Action:" not in s
)


@given(_line, st.none() | _line)
def test_written_answers_are_read_back(action, thought):
    assert parse_answer(format_answer(action, thought)) == (thought, action)


@pytest.mark.parametrize(
    ("text", "thought", "action"),
    [
        ("Action: go to desk 1", None, "go to desk 1"),
        ("Action:go", None, "go"),
        ("Thought: hm.\nor not\nAction:  look  \nmore", "hm.\nor not", "look"),
        ("I say Action: look", None, "look"),
        ("Action: a\nAction: b", None, "a"),
        ("Action: a Action: b", None, "a Action: b"),
        ("Action: a\r\nb", None, "a"),
        ("Action: a\nThought: late", None, "a"),
        ("Action:", None, None),
        ("Action: \nlook", None, None),
        ("Thought: only", None, None),
        ("look", None, None),
        ("action: look", None, None),
        ("", None, None),
        ("Thought: t\nAction:", "t", None),
    ],
)
def test_first_action_line_counts(text, thought, action):
    assert parse_answer(text) == (thought, action)


@given(st.text())
def test_any_text_is_parsed(text):
    action = parse_answer(text).action
    assert action is None or (action and action in text and "\n" not in action)


@pytest.mark.parametrize(
    ("action", "thought"),
    [("", None), (" go", None), ("go\nnow", None), ("go", "first Action: think"), ("go", " t")],
)
def test_an_answer_that_would_not_be_read_back_is_refused(action, thought):
    with pytest.raises(ValueError, match="cannot be written"):
        format_answer(action, thought)


def test_the_malformed_observation_is_short():
    assert len(MALFORMED_OBSERVATION) < 80

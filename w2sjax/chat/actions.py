"""What an agent's answer looks like, and the one parser that reads it."""

from __future__ import annotations

from typing import NamedTuple

THOUGHT_MARK = "Thought:"
ACTION_MARK = "Action:"

MALFORMED_OBSERVATION = 'No action was read. Answer "Action: ...".'


class Answer(NamedTuple):
    """What was read from an agent's answer."""

    thought: str | None  # None where there was none
    action: str | None  # None where the answer is malformed


def format_answer(action: str, thought: str | None = None) -> str:
    """Writes an answer that `parse_answer` reads back.

    Args:
      action: one line, without spaces at its ends.
      thought: what the agent thinks before it acts; leave out for agents that only act.

    Returns:
      "Action: {action}", with a line "Thought: {thought}" before it where a thought is given.

    Raises:
      ValueError: the answer would not be read back as it was written.

    >>> format_answer("go to desk 1")
    'Action: go to desk 1'
    """
    text = f"{ACTION_MARK} {action}"
    if thought is not None:
        text = f"{THOUGHT_MARK} {thought}\n{text}"
    if parse_answer(text) != (thought, action):
        raise ValueError(
            f"action {action!r} with thought {thought!r} cannot be written as an answer: an action "
            f"is one non-empty line, a thought does not contain {ACTION_MARK!r}, and neither has "
            "spaces at its ends"
        )
    return text


def parse_answer(text: str) -> Answer:
    """Reads an agent's answer: the only place where an answer becomes an action.

    The first "Action:" counts and the rest of its line is the action. The thought is what stands
    between the first "Thought:" and that "Action:".

    Args:
      text: the answer, without the end-of-turn token.

    Returns:
      The thought and the action, stripped. `action` is None where there is no "Action:" or nothing
      behind it on its line.

    >>> parse_answer("Thought: a pen is likely there.\\nAction: go to desk 1")
    Answer(thought='a pen is likely there.', action='go to desk 1')
    """
    before, mark, after = text.partition(ACTION_MARK)
    line = after.replace("\r", "\n").partition("\n")[0].strip()
    _, thought_mark, thought = before.partition(THOUGHT_MARK)
    return Answer(
        thought=thought.strip() if mark and thought_mark else None,
        action=line if mark and line else None,
    )

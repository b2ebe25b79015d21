"""A conversation taken apart: instruction, worked examples, the task, and the turns after it."""

from __future__ import annotations

from typing import Any, NamedTuple

from w2sjax.sampling.exchange.fields import Fields, RefusedError, shown

LAYOUTS = {  # format → the fields of a record's messages, and of a message's role and text
    "sharegpt": ("conversations", "from", "value"),
    "messages": ("messages", "role", "content"),
}
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant",
          "assistant": "assistant"}  # fmt: skip
_EXAMPLE_TITLE = "An example:"


class Conversation(NamedTuple):
    """What a record's messages say."""

    instruction: str
    examples: tuple[str, ...]  # texts of worked examples, a user's and an assistant's in turn
    task: str
    turns: tuple[str, ...]  # texts after the task, an assistant's and a user's in turn
    task_at: int  # index of the message that is the task


def read_messages(fields: Fields, layout: str) -> list[tuple[str, str]]:
    """(role, text) of every message; roles are system, user and assistant."""
    name, role_key, text_key = LAYOUTS[layout]
    found = fields.take(name, list, "a list")
    if found is None:
        raise RefusedError(name, f"is missing; the record's fields are: {fields.names()}")
    messages = []
    for index, message in enumerate(found):
        where = f"{name}[{index}]"
        if not isinstance(message, dict):
            raise RefusedError(where, f"wanted an object, got {shown(message)}")
        role = message.get(role_key)
        if not isinstance(role, str) or role not in _ROLES:
            known = ", ".join(_ROLES)
            raise RefusedError(f"{where}.{role_key}", f"wanted {known}, got {shown(role)}")
        messages.append((_ROLES[role], _text(message.get(text_key), f"{where}.{text_key}")))
        for key, value in message.items():
            if key not in (role_key, text_key) and value is not None:
                fields.unused_in_messages.add(f"{name}[].{key}")
    return messages


def _text(content: Any, where: str) -> str:
    """A message's text; parts of text are joined, anything else is refused."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        for index, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                what = f"a part of type {kind!r}" if isinstance(kind, str) else shown(part)
                raise RefusedError(f"{where}[{index}]", f"is not text but {what}")
        return "".join(part["text"] for part in content)
    raise RefusedError(where, f"wanted text, got {shown(content)}")


def divide(
    fields: Fields,
    messages: list[tuple[str, str]],
    name: str,
    prefix: str,
    num_examples: int | None,
) -> Conversation:
    """Finds the task among the messages.

    Args:
      fields: of the record, which may bring its system message in a field of its own.
      messages: (role, text) of each.
      name: of the field that they are in.
      prefix: what the environment's messages begin with, and a task's text does not; "" where that
        tells nothing.
      num_examples: messages of worked examples before the task; None: up to the last user message
        without the prefix.

    Raises:
      RefusedError: the roles do not take turns, or the task is not where it should be.
    """
    instruction, start = _opening(fields, messages, name)
    for index, (role, _) in enumerate(messages[start:]):
        wanted = ("user", "assistant")[index % 2]
        if role != wanted:
            raise RefusedError(
                f"{name}[{start + index}]", f"wanted a message of the {wanted}, got the {role}'s"
            )
    texts = [text for _, text in messages[start:]]
    if num_examples is None:
        plain = [i for i in range(0, len(texts), 2) if not texts[i].startswith(prefix)]
        num_examples = plain[-1] if plain else 0
    if len(texts) <= num_examples:
        raise RefusedError(
            name,
            f"no task: {len(texts)} messages after the instruction, and {num_examples} are taken "
            "for worked examples (example_messages)",
        )
    task, at = texts[num_examples], start + num_examples
    if prefix and task.startswith(prefix):
        raise RefusedError(
            f"{name}[{at}]",
            f"the task should be here, after {num_examples} messages of worked examples, but it "
            f"begins with {prefix!r}; say how many they are (example_messages)",
        )
    examples = tuple(texts[:num_examples])
    return Conversation(instruction, examples, task, tuple(texts[num_examples + 1 :]), at)


def with_examples(conversation: Conversation) -> str:
    """The instruction with the worked examples as text at its end."""
    if not conversation.examples:
        return conversation.instruction
    parts = (conversation.instruction, _EXAMPLE_TITLE, *conversation.examples)
    return "\n\n".join(filter(None, parts))


def _opening(fields: Fields, messages: list[tuple[str, str]], name: str) -> tuple[str, int]:
    """The instruction, and how many messages it takes."""
    parts = []
    if (system := fields.take("system", str, "a string")) is not None:
        parts.append(system)
    start = 0
    if messages and messages[0][0] == "system":
        if parts:
            raise RefusedError("system", f"is there beside a system message, {name}[0]")
        parts.append(messages[0][1])
        start = 1
    if (
        not parts  # else "OK" is the agent's own answer
        and len(messages) > 2
        and [role for role, _ in messages[:2]] == ["user", "assistant"]
        and messages[1][1].strip().rstrip(".").upper() == "OK"
    ):
        parts.append(messages[0][1])
        start = 2
    return "\n\n".join(parts), start

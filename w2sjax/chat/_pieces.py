"""Takes chat templates apart; makes ids of control text and plain text side by side."""

from __future__ import annotations

import datetime
import enum
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import transformers


class TextSlot(enum.Enum):
    """Where a text goes; the values are the markers that stand for it in the renderings."""

    INSTRUCTION = "XsysQ7m"
    OBSERVATION = "XusrQ7m"
    ANSWER = "XastQ7m"


_ROLES = {
    TextSlot.INSTRUCTION: "system",
    TextSlot.OBSERVATION: "user",
    TextSlot.ANSWER: "assistant",
}

# A segment: control ids, control text, and places for texts.
Piece = tuple[int, ...] | str | TextSlot
Pieces = tuple[Piece, ...]
# The same before control text was tokenised.
RawPieces = tuple[str | TextSlot, ...]

# Environments repeat themselves: most observations and actions are tokenised once.
_CACHED_TEXTS, _LONGEST_CACHED = 1 << 15, 400

_PAD_LEFT, _PAD_RIGHT = "\t \n\t", "\t\n \t"  # to see whether a template strips texts


class Strip(NamedTuple):
    """What a template does to the ends of a text."""

    left: bool
    right: bool

    def apply(self, text: str) -> str:
        """The text as the template would write it."""
        text = text.lstrip() if self.left else text
        return text.rstrip() if self.right else text


class Structure(NamedTuple):
    """A chat template, taken apart."""

    start: RawPieces  # up to and including the generation prompt
    answer_and_observation: RawPieces  # from there to the next generation prompt
    strips: Mapping[TextSlot, Strip]
    system_role: bool
    controls: tuple[str, ...]  # all control texts


def learn_structure(
    tokenizer: transformers.PreTrainedTokenizerBase, date: datetime.date
) -> Structure:
    """Takes a chat template apart by rendering it with markers for texts.

    Raises:
      ValueError: no chat template, or one whose rendering is not a sequence of turns that stay as
        they are when the conversation goes on.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "tokenizer: it has no chat template; use a chat model's tokenizer or set "
            "`chat_template`"
        )
    reasons = []
    for system_role in (True, False):
        try:
            return _learn(tokenizer, date, system_role)
        except _Unsuitable as reason:
            reasons.append(f"{'with' if system_role else 'without'} a system message: {reason}")
    raise ValueError(f"chat template cannot be used: {'; '.join(reasons)}")


class _Unsuitable(ValueError):
    """Why a template cannot be taken apart in one of the two ways."""


def _learn(
    tokenizer: transformers.PreTrainedTokenizerBase, date: datetime.date, system_role: bool
) -> Structure:
    order = [TextSlot.OBSERVATION, *[TextSlot.ANSWER, TextSlot.OBSERVATION] * 2]
    if system_role:
        order.insert(0, TextSlot.INSTRUCTION)
    first = 2 if system_role else 1
    template = _freeze_date(tokenizer.get_chat_template(), date)

    def render(count: int, contents: Sequence[str]) -> str:
        messages = [
            {"role": _ROLES[slot], "content": content}
            for slot, content in zip(order[:count], contents, strict=False)
        ]
        return _render(tokenizer, template, messages)

    markers = [f"{slot.value}{index}z" for index, slot in enumerate(order)]
    start, middle, whole = (render(count, markers) for count in (first, first + 2, first + 4))
    if not middle.startswith(start) or not whole.startswith(middle):
        raise _Unsuitable(
            "earlier turns are rendered differently once the conversation goes on, so an episode "
            "cannot be built turn by turn"
        )
    head = _cut(start, markers[:first], order[:first])
    turn = _cut(middle[len(start) :], markers[first : first + 2], order[first : first + 2])
    again = _cut(whole[len(middle) :], markers[first + 2 :], order[first + 2 :])
    if turn != again:
        raise _Unsuitable(f"the second turn is rendered differently from the first: {turn} {again}")

    # The same structure has to hold for other texts; their padding shows what is stripped.
    padded = [f"{_PAD_LEFT}{marker}: 1.\n{marker}{_PAD_RIGHT}" for marker in markers]
    rendered = render(len(order), padded)
    strips = {
        slot: Strip(
            left=f"{_PAD_LEFT}{marker}:" not in rendered,
            right=f"{marker}{_PAD_RIGHT}" not in rendered,
        )
        for slot, marker in zip(order[: first + 1], markers, strict=False)
    }
    texts = iter(strips[slot].apply(text) for slot, text in zip(order, padded, strict=True))
    assembled = "".join(p if isinstance(p, str) else next(texts) for p in (*head, *turn, *again))
    if assembled != rendered:
        raise _Unsuitable(
            f"texts are changed, or decide what is written around them: {rendered!r} instead of "
            f"{assembled!r}"
        )
    controls = tuple(piece for piece in (*head, *turn) if isinstance(piece, str))
    return Structure(head, turn, strips, system_role, controls)


def _freeze_date(template: str, date: datetime.date) -> str:
    """The template with the clock that Hugging Face gives it replaced by a date."""
    if "strftime_now" not in template:
        return template
    replaced = "".join(
        f" | replace('%{code}', '{date.strftime('%' + code)}')" for code in "aAbBdmyYjUwWHIpMSxXcZ"
    )
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}{template}"


def _render(
    tokenizer: transformers.PreTrainedTokenizerBase, template: str, messages: list[dict[str, str]]
) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except (jinja2.TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise _Unsuitable(f"it refuses {roles}: {error}") from error


def _cut(text: str, markers: Sequence[str], slots: Sequence[TextSlot]) -> RawPieces:
    pieces: list[str | TextSlot] = []
    for marker, slot in zip(markers, slots, strict=True):
        if text.count(marker) != 1:
            raise _Unsuitable(
                f"the {_ROLES[slot]} text is written {text.count(marker)} times, or out of order, "
                "instead of once"
            )
        before, _, text = text.partition(marker)
        pieces += [before, slot] if before else [slot]
    return (*pieces, text) if text else tuple(pieces)


class PieceTokenizer:
    """Tokenises control text with, and plain text without, the tokenizer's special tokens."""

    def __init__(
        self, tokenizer: transformers.PreTrainedTokenizerBase, controls: Sequence[str]
    ) -> None:
        """Makes private copies of the tokenizer: the caller's is never changed.

        Args:
          tokenizer: backed by the `tokenizers` library.
          controls: the template's control texts. Added tokens that occur in them are control tokens
            also where the tokenizer does not call them special.

        Raises:
          ValueError: another kind of tokenizer, or one that makes control tokens of plain text.
        """
        import tokenizers

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise ValueError(
                f"tokenizer: {type(tokenizer).__name__} is not backed by the `tokenizers` library; "
                "load its fast version (a directory with tokenizer.json)"
            )
        state = json.loads(backend.to_str())
        state["truncation"] = state["padding"] = None
        self._control_ids: dict[int, str] = {}
        for token in state["added_tokens"]:
            if token["special"] or any(token["content"] in control for control in controls):
                token["special"] = True
                self._control_ids[token["id"]] = token["content"]
        serialised = json.dumps(state)
        self._control = tokenizers.Tokenizer.from_str(serialised)
        self._plain = tokenizers.Tokenizer.from_str(serialised)
        self._plain.encode_special_tokens = True
        self._cached_text_ids = functools.lru_cache(_CACHED_TEXTS)(self._compute_text_ids)
        self._check_plain(tokenizer.unk_token_id)
        self._anchor_ids = self._plain_ids("\n")
        self._anchor_in_text = self._plain_ids("\nx") != self._anchor_ids + self._plain_ids("x")
        self._anchor_after_control = self._anchor_in_text and any(
            self._control.encode(f"{content}x", add_special_tokens=False).ids
            != [token_id, *self._plain_ids("x")]
            for token_id, content in self._control_ids.items()
        )

    def compile(self, raw: RawPieces) -> Pieces:
        """Turns a segment's control text into ids.

        What stands before its first or after its last control token stays text: it is tokenised
        together with its neighbours, as it is in a whole rendering.
        """
        pieces: list[Piece] = []
        for piece in raw:
            if isinstance(piece, TextSlot):
                pieces.append(piece)
                continue
            encoded = self._control.encode(piece, add_special_tokens=False)
            at = [i for i, token_id in enumerate(encoded.ids) if token_id in self._control_ids]
            if not at:
                pieces.append(piece)
                continue
            before = piece[: encoded.offsets[at[0]][0]]
            after = piece[encoded.offsets[at[-1]][1] :]
            ids = tuple(encoded.ids[at[0] : at[-1] + 1])
            pieces += [part for part in (before, ids, after) if part]
        return tuple(pieces)

    def encode(
        self, pieces: Pieces, texts: Mapping[TextSlot, str], *, in_text: bool = False
    ) -> list[int]:
        """Token ids of a segment.

        Args:
          pieces: the segment.
          texts: what goes into its slots.
          in_text: whether text, not a control token, comes right before the segment.

        Returns:
          Token ids; control tokens come from the segment's control ids only.
        """
        ids: list[int] = []
        run = ""
        anchored = self._anchor_in_text if in_text else self._anchor_after_control
        for piece in pieces:
            if isinstance(piece, tuple):
                ids += self._text_ids(run, anchored)
                ids += piece
                run, anchored = "", self._anchor_after_control
            else:
                run += piece if isinstance(piece, str) else texts[piece]
        return ids + self._text_ids(run, anchored)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens are written out."""
        return self._control.decode(ids, skip_special_tokens=False)

    def _plain_ids(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def _text_ids(self, text: str, anchored: bool) -> list[int]:
        """Ids of plain text. Anchored: without the space that some tokenizers put before a text."""
        if not text:
            return []
        if len(text) > _LONGEST_CACHED:
            return self._compute_text_ids(text, anchored)
        return self._cached_text_ids(text, anchored)

    def _compute_text_ids(self, text: str, anchored: bool) -> list[int]:
        if anchored:
            ids = self._plain_ids("\n" + text)
            if ids[: len(self._anchor_ids)] == self._anchor_ids:
                return ids[len(self._anchor_ids) :]
        return self._plain_ids(text)

    def _check_plain(self, unk_token_id: int | None) -> None:
        for token_id, content in self._control_ids.items():
            found = {
                i for t in (content, f" {content}", f"a{content}b") for i in self._plain_ids(t)
            }
            if token_id != unk_token_id and token_id in found:
                raise ValueError(
                    f"tokenizer: the text {content!r} becomes the control token {token_id} even "
                    "with special tokens switched off, so an observation could end a turn; use a "
                    "tokenizer whose model does not make its special tokens of plain text"
                )

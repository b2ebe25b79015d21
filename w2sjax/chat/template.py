"""From turns to token ids and back, for any Hugging Face chat template.

A template is rendered a few times with markers in place of the texts; what stands between the
markers is the template's control text. An episode is then built from segments (start, answer,
observation, answer, …) that are tokenised one by one, so that what a sampler sees turn by turn is,
id for id, what is trained on. Texts are tokenised apart from control text: nothing that an
environment or a model writes becomes a control token.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from w2sjax.chat._pieces import Pieces, PieceTokenizer, TextSlot, learn_structure
from w2sjax.types import Trajectory

if TYPE_CHECKING:
    import transformers

_DATE = datetime.date(2024, 7, 26)  # what Llama 3 templates say where nobody tells them the date


class TokenizedTrajectory(NamedTuple):
    """An episode as token ids."""

    tokens: np.ndarray  # int32 [L]
    loss_mask: np.ndarray  # bool [L], the agent's own tokens, end of turn included
    turn_start: np.ndarray  # int32 [T], first token of each answer
    turn_end: np.ndarray  # int32 [T], one past its last token


class ChatTemplate:
    """A tokenizer's chat template, taken apart into segments.

    An episode's tokens are `encode_start`, then for each step an answer (`encode_answer`, or the
    sampled ids) and, except after the last, `close_answer` of those ids and `encode_observation`.

    Attributes:
      tokenizer: the tokenizer given.
      stop_ids: token ids that end an answer; the first is the one that `encode_answer` writes.
      system_role: whether the instruction is a system message; else it opens the first user
        message.
      vocab_size: number of tokens, added ones included.
    """

    def __init__(
        self, tokenizer: transformers.PreTrainedTokenizerBase, *, date: datetime.date = _DATE
    ):
        """Learns the template's structure.

        Args:
          tokenizer: a tokenizer with a chat template, backed by the `tokenizers` library.
          date: what templates that write today's date get, so that an episode's tokens don't depend
            on the day.

        Raises:
          ValueError: no chat template, or one that cannot be taken apart; the message says why.
        """
        self.tokenizer = tokenizer
        structure = learn_structure(tokenizer, date)
        self._pieces = PieceTokenizer(tokenizer, structure.controls)
        self._strips = structure.strips
        self.system_role = structure.system_role
        self.vocab_size = len(tokenizer)

        self._start = self._pieces.compile(structure.start)
        answer_and_observation = self._pieces.compile(structure.answer_and_observation)
        text_at = answer_and_observation.index(TextSlot.ANSWER)
        end_at = next(
            (
                i
                for i, piece in enumerate(answer_and_observation)
                if i > text_at and isinstance(piece, tuple)
            ),
            None,
        )
        observation_at = answer_and_observation.index(TextSlot.OBSERVATION)
        if end_at is None or end_at > observation_at:
            raise ValueError(
                "chat template: no special token stands between an answer and the next user "
                "message, so nothing would tell where an answer ends; use a template that closes "
                "the assistant's turns"
            )
        end_ids = answer_and_observation[end_at]
        self._answer = (*answer_and_observation[:end_at], end_ids[:1])
        self._closing = (*answer_and_observation[text_at + 1 : end_at], end_ids[:1])
        rest = (end_ids[1:],) if len(end_ids) > 1 else ()
        self._observation = (*rest, *answer_and_observation[end_at + 1 :])
        self._answer_head = "".join(p for p in self._answer[:text_at] if isinstance(p, str))
        self._answer_tail = "".join(p for p in self._closing if isinstance(p, str))
        eos = tokenizer.eos_token_id
        self.stop_ids: tuple[int, ...] = tuple(
            dict.fromkeys((end_ids[0],) if eos is None else (end_ids[0], eos))
        )

    def encode_start(self, instruction: str, first_observation: str) -> list[int]:
        """Token ids up to and including what asks for the first answer."""
        if not self.system_role:
            joined = f"{instruction}\n\n{first_observation}" if instruction else first_observation
            return self._encode(self._start, {TextSlot.OBSERVATION: joined}, in_text=False)
        texts = {TextSlot.INSTRUCTION: instruction, TextSlot.OBSERVATION: first_observation}
        return self._encode(self._start, texts, in_text=False)

    def encode_answer(self, answer: str) -> list[int]:
        """Token ids of an answer, end of turn included."""
        return self._encode(
            self._answer, {TextSlot.ANSWER: answer}, in_text=isinstance(self._start[-1], str)
        )

    def encode_observation(self, observation: str) -> list[int]:
        """Token ids between the end of an answer and the next one."""
        return self._encode(self._observation, {TextSlot.OBSERVATION: observation}, in_text=False)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text on its own; nothing in it becomes a control token."""
        return tuple(self._pieces.encode((text,), {}, in_text=True))

    def close_answer(self, answer_ids: Sequence[int]) -> list[int]:
        """Token ids that end a turn which was cut off before it ended itself; [] where it has
        ended."""
        if len(answer_ids) and answer_ids[-1] in self.stop_ids:
            return []
        return self._encode(self._closing, {}, in_text=True)

    def decode_answer(self, ids: Iterable[int]) -> str:
        """The text of sampled ids, without the end of turn and what the template puts around a
        text."""
        ids = [int(i) for i in ids]
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        text = self._pieces.decode(ids)
        return text.removeprefix(self._answer_head).removesuffix(self._answer_tail)

    def encode_trajectory(self, trajectory: Trajectory) -> TokenizedTrajectory:
        """Tokenises a whole episode; sampled ids are used as they are where a step has them.

        What followed the last answer is not encoded: nobody answers it.
        """
        tokens = self.encode_start(trajectory.instruction, trajectory.first_observation)
        starts, ends = [], []
        for index, step in enumerate(trajectory.steps):
            if index:
                tokens += self.close_answer(tokens[starts[-1] : ends[-1]])
                tokens += self.encode_observation(trajectory.steps[index - 1].observation)
            starts.append(len(tokens))
            tokens += (
                self.encode_answer(step.answer) if step.answer_ids is None else step.answer_ids
            )
            ends.append(len(tokens))
        mask = np.zeros(len(tokens), bool)
        for start, end in zip(starts, ends, strict=True):
            mask[start:end] = True
        return TokenizedTrajectory(
            tokens=np.asarray(tokens, np.int32),
            loss_mask=mask,
            turn_start=np.asarray(starts, np.int32),
            turn_end=np.asarray(ends, np.int32),
        )

    def _encode(self, pieces: Pieces, texts: dict[TextSlot, str], *, in_text: bool) -> list[int]:
        texts = {slot: self._strips[slot].apply(text) for slot, text in texts.items()}
        return self._pieces.encode(pieces, texts, in_text=in_text)

"""Chat: the only room where text becomes token ids."""

from w2sjax.chat.actions import MALFORMED_OBSERVATION, Answer, format_answer, parse_answer
from w2sjax.chat.template import ChatTemplate, TokenizedTrajectory
from w2sjax.chat.tokenizer import load_tokenizer, save_tokenizer, train_bpe

__all__ = [
    "MALFORMED_OBSERVATION",
    "Answer",
    "ChatTemplate",
    "TokenizedTrajectory",
    "format_answer",
    "load_tokenizer",
    "parse_answer",
    "save_tokenizer",
    "train_bpe",
]

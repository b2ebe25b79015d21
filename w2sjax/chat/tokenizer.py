"""Tokenizers: train a byte-level BPE on an environment's own text, save it, load any with a chat
template."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from w2sjax.chat.actions import ACTION_MARK, THOUGHT_MARK

if TYPE_CHECKING:
    import transformers

PAD, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)

# Only the assistant's turns are closed: the next turn's own token closes the others.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

# A word takes the space before it and a number after it along (" mug 1"), so that the name of one
# thing can become one token, which small models need to bind names. Whatever no branch matches is a
# piece of its own.
_PIECES = r" ?\p{L}+(?: \d+)?| ?\d+| ?[^\s\p{L}\d]+|\s+(?!\S)|\s+"

_MARKS = (THOUGHT_MARK, ACTION_MARK)
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS) + len(_MARKS)


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """Trains a lossless byte-level BPE whose chat template is compact.

    "Thought:" and "Action:" are one token each, always; a word with its number may be one.

    Args:
      texts: what the tokenizer will have to write: instructions, observations, answers.
      vocab_size: most tokens there may be, all included; fewer where the texts have no more merges.

    Returns:
      A tokenizer with a chat template; `decode(encode(text)) == text` for any Unicode text. It
      depends on nothing but the arguments.

    Raises:
      ValueError: `vocab_size` does not hold the bytes and the special tokens.
    """
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(
            f"vocab_size is {vocab_size}; at least {SMALLEST_VOCAB} are needed for 256 bytes, "
            f"{len(SPECIAL_TOKENS)} special tokens and {len(_MARKS)} marks"
        )
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([tokenizers.AddedToken(mark, normalized=False) for mark in _MARKS])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(
    tokenizer: transformers.PreTrainedTokenizerBase, directory: str | os.PathLike[str]
) -> None:
    """Writes a tokenizer, its chat template included, as Hugging Face files into a directory."""
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(directory))


def load_tokenizer(directory: str | os.PathLike[str]) -> transformers.PreTrainedTokenizerBase:
    """Loads a tokenizer from a directory of Hugging Face files. Never runs code from it, asks no
    network.

    Args:
      directory: what `save_tokenizer` wrote, or a downloaded model.

    Raises:
      FileNotFoundError: no such directory.
      ValueError: the tokenizer has no chat template.
    """
    import transformers

    path = pathlib.Path(directory)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such directory; a tokenizer is loaded from local files"
        )
    config_file = path / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    # The generic class is what `train_bpe` makes; naming it spares seconds of imports that Auto
    # classes cost.
    generic = config.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    loader = transformers.PreTrainedTokenizerFast if generic else transformers.AutoTokenizer
    tokenizer = loader.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{path}: this tokenizer has no chat template; use the model's chat version, or put "
            "its template into chat_template.jinja in that directory"
        )
    return tokenizer

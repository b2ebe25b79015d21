"""The BPE is lossless, keeps names whole, and never lets plain text become a control token."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2sjax.chat import format_answer, load_tokenizer, save_tokenizer, train_bpe
from w2sjax.chat.tokenizer import SPECIAL_TOKENS

TEXTS = tuple(
    f"You are at desk {i % 4}. You see a mug {i % 3} and a pen {i % 5}, {name}."
    for i in range(200)
    for name in ("a book 1", "a lamp 2")
)


@functools.cache
def _bpe():
    return train_bpe(TEXTS, vocab_size=400)


def _ids(text):
    return _bpe().encode(text, add_special_tokens=False, split_special_tokens=True)


_texts = st.text() | st.lists(
    st.sampled_from(
        [*SPECIAL_TOKENS, "Action:", " ", "  ", "\n", "mug 1", " mug 12", "7", "é", "🙂"]
    )
).map("".join)


@settings(max_examples=300)
@given(_texts)
def test_round_trip_is_exact_and_has_no_control_tokens(text):
    ids = _ids(text)
    assert _bpe().decode(ids) == text
    assert not {_bpe().convert_tokens_to_ids(token) for token in SPECIAL_TOKENS} & set(ids)


def test_names_and_marks_are_single_tokens():
    tokens = _bpe().tokenize("Thought: look\nAction: take mug 1 from desk 2")
    assert tokens[0] == "Thought:"
    assert {"Action:", "ĠmugĠ1", "ĠdeskĠ2"} <= set(tokens)


@pytest.mark.parametrize("thought", [None, "a pen"])
def test_the_first_word_of_an_action_is_written_the_same_everywhere(thought):
    ids = _ids(format_answer("mug 1", thought))
    assert ids[-2:] == [_bpe().convert_tokens_to_ids("Action:"), *_ids(" mug 1")]


def test_training_depends_on_its_arguments_only():
    again = train_bpe(iter(TEXTS), vocab_size=400)
    assert again.backend_tokenizer.to_str() == _bpe().backend_tokenizer.to_str()


def test_vocab_size_is_an_upper_bound():
    assert len(_bpe()) <= 400
    assert len(train_bpe(TEXTS, vocab_size=300)) == 300
    with pytest.raises(ValueError, match="vocab_size is 100; at least 263"):
        train_bpe(TEXTS, vocab_size=100)


def test_saved_and_loaded_tokenizers_are_equal(tmp_path):
    save_tokenizer(_bpe(), tmp_path / "tok")
    loaded = load_tokenizer(tmp_path / "tok")
    assert loaded.backend_tokenizer.to_str() == _bpe().backend_tokenizer.to_str()
    assert loaded.chat_template == _bpe().chat_template
    assert (loaded.eos_token, loaded.pad_token_id) == ("<|end|>", 0)


def test_loading_errors_name_the_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    save_tokenizer(_bpe(), tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"bare.*no chat template"):
        load_tokenizer(tmp_path / "bare")

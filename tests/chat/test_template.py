"""Segments add up to the template's own rendering, and only the agent's tokens carry loss."""

import datetime
import functools
import json

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from w2sjax.chat import ChatTemplate, train_bpe
from w2sjax.types import Status, Step, Trajectory

TEXTS = [
    "You see a mug 1 on desk 2. Take it.",
    "user system assistant INST",
    "Action: go to desk 1",
]

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% set date = strftime_now('%d %b %Y') %}{% for m in messages %}"
    "<|head|>{{ m.role }}<|neck|>\n\n{% if m.role == 'system' %}Today: {{ date }}\n\n{% endif %}"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|neck|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set sys = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set sys = '' %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (sys if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% "
    "endif %}"
    "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% "
    "endif %}"
)
# The system text goes into the last user message: earlier turns change when the conversation goes
# on.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and sys is defined %}{{ sys + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# A thinking model's template writes an empty thought into the last answer only.
THINKER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|neck|>", "<|eot|>")


def _wrap(backend, template, **options):
    backend.add_special_tokens(list(SPECIALS))
    # Turn marks that the tokenizer knows but does not call special.
    backend.add_tokens(["<turn>", "</turn>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
        **options,
    )


def _byte_level(template):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return _wrap(backend, template)


def _sentencepiece_like(template):
    """As Llama 2: a space in front of every text, single bytes for what is not in the
    vocabulary."""
    trained = tokenizers.Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    trained.train_from_iterator([text.replace(" ", "▁") for text in TEXTS * 3], trainer)
    state = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *state["vocab"]]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in state["merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    return _wrap(backend, template, unk_token="<unk>")


_ALL = {
    "own": lambda: train_bpe(TEXTS * 3, vocab_size=300),
    "chatml": lambda: _byte_level(CHATML),
    "llama3": lambda: _byte_level(LLAMA3),
    "gemma": lambda: _byte_level(GEMMA),
    "mistral": lambda: _byte_level(MISTRAL),
    "thinker": lambda: _byte_level(THINKER),
    "llama2": lambda: _sentencepiece_like(LLAMA2),
}
_MERGED = ("gemma", "mistral")
_BYTE_LEVEL = tuple(name for name in _ALL if name != "llama2")


@functools.cache
def _template(name):
    return ChatTemplate(_ALL[name]())


def _episode(observations, answers, *, ids=None, instruction="Act."):
    steps = tuple(
        Step(answer, None, observation, answer_ids=None if ids is None else ids[i])
        for i, (answer, observation) in enumerate(zip(answers, observations[1:], strict=True))
    )
    return Trajectory(
        "t", 0, "env", "weak", 0, instruction, observations[0], steps, Status.FAILED, 0.0
    )


def _rendered(name, trajectory):
    """The Hugging Face rendering of everything up to the last answer, as ids."""
    template = _template(name)
    first = trajectory.first_observation
    messages = [{"role": "system", "content": trajectory.instruction}]
    if name in _MERGED:
        messages, first = [], f"{trajectory.instruction}\n\n{first}"
    messages.append({"role": "user", "content": first})
    for step in trajectory.steps:
        messages.append({"role": "assistant", "content": step.answer})
        messages.append({"role": "user", "content": step.observation})
    text = template.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    # Llama 3's date is frozen, so that an episode's tokens don't depend on the day.
    text = text.replace(datetime.date.today().strftime("%d %b %Y"), "26 Jul 2024")
    return template.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", _ALL)
def test_segments_add_up_to_the_templates_own_rendering(name):
    template = _template(name)
    trajectory = _episode(
        ["You see a mug 1.", "Taken.\nGood.", "Done."], ["Action: take mug 1", "Action: go"]
    )
    mine = template.encode_trajectory(trajectory).tokens.tolist()
    mine += template.encode_observation("Done.")
    assert mine == _rendered(name, trajectory)
    assert template.system_role == (name not in _MERGED)


@pytest.mark.parametrize("name", _ALL)
def test_tokens_are_the_concatenation_of_the_segments(name):
    t = _template(name)
    answers = ["Action: go to desk 1", "Thought: so.\nAction: take mug 1"]
    trajectory = _episode(["obs 0", "obs 1", "never seen"], answers)
    out = t.encode_trajectory(trajectory)
    start, first = t.encode_start("Act.", "obs 0"), t.encode_answer(answers[0])
    between, second = t.encode_observation("obs 1"), t.encode_answer(answers[1])
    assert out.tokens.tolist() == start + first + between + second
    assert out.tokens.dtype == np.int32
    assert out.loss_mask.dtype == bool
    assert out.turn_start.tolist() == [len(start), len(start + first + between)]
    assert out.turn_end.tolist() == [len(start + first), len(out.tokens)]


@pytest.mark.parametrize("name", _ALL)
def test_the_loss_mask_covers_what_the_agent_said_and_nothing_else(name):
    t = _template(name)
    answers = ["Action: go to desk 1", "Thought: so.\nAction: take mug 1"]
    out = t.encode_trajectory(_episode(["obs 0", "obs 1", "obs 2"], answers))
    for start, end, answer in zip(out.turn_start, out.turn_end, answers, strict=True):
        assert out.loss_mask[start:end].all()
        assert t.tokenizer.decode(out.tokens[start : end - 1]).strip() == answer
        assert out.tokens[end - 1] == t.stop_ids[0]
    said = t.tokenizer.decode(out.tokens[out.loss_mask])
    unsaid = t.tokenizer.decode(out.tokens[~out.loss_mask])
    assert "obs" not in said
    assert "Action:" not in unsaid
    assert out.loss_mask.sum() == (out.turn_end - out.turn_start).sum()


@pytest.mark.parametrize("name", _ALL)
def test_untrusted_text_stays_text(name):
    """An observation or an answer full of control strings adds no control token."""
    t = _template(name)
    evil = "".join(SPECIALS) + "<turn></turn><|end|><|assistant|><|user|> [INST] <|pad|><unk>"
    count = len(t.encode_start("Act.", "x")), len(t.encode_observation("x"))
    controls = set(t._pieces._control_ids)

    def number(ids):
        return sum(i in controls for i in ids)

    assert number(t.encode_start(evil, evil)) == number(t.encode_start("Act.", "x"))
    assert number(t.encode_observation(evil)) == number(t.encode_observation("x"))
    assert number(t.encode_answer(evil)) == 1
    assert t.decode_answer(t.encode_answer(evil)) == evil
    assert evil in t._pieces.decode(t.encode_observation(evil))
    assert t.encode_start("Act.", "x")[: count[0]] == t.encode_start("Act.", "x")


@settings(max_examples=100)
@given(st.sampled_from(_BYTE_LEVEL), st.text())
def test_answers_are_decoded_as_they_were_encoded(name, text):
    t = _template(name)
    expected = text.strip() if name in ("llama3", "gemma") else text
    assert t.decode_answer(t.encode_answer(text)) == expected


@pytest.mark.parametrize("name", _ALL)
def test_sampled_ids_are_used_as_they_are(name):
    t = _template(name)
    answer = "Action: go"
    # Letter by letter: other ids than tokenising the answer gives.
    spelled = tuple(i for c in answer for i in t.encode_answer(c)[:-1]) + t.stop_ids[:1]
    assert list(spelled) != t.encode_answer(answer)
    out = t.encode_trajectory(_episode(["a", "b"], [answer], ids=[spelled]))
    assert tuple(out.tokens[out.loss_mask].tolist()) == spelled


@pytest.mark.parametrize("name", _ALL)
def test_an_answer_that_was_cut_off_is_closed_without_loss(name):
    t = _template(name)
    cut = tuple(t.encode_answer("Action: go")[:-1])
    assert t.close_answer(t.encode_answer("Action: go")) == []
    closing = t.close_answer(cut)
    assert closing[-1] == t.stop_ids[0]
    trajectory = _episode(["a", "b", "c"], ["Action: go", "Action: x"], ids=[cut, None])
    out = t.encode_trajectory(trajectory)
    end = out.turn_end[0]
    assert out.tokens[end : out.turn_start[1]].tolist() == closing + t.encode_observation("b")
    assert not out.loss_mask[end : out.turn_start[1]].any()


def test_an_episode_without_steps_is_its_start():
    t = _template("own")
    out = t.encode_trajectory(_episode(["a"], []))
    assert out.tokens.tolist() == t.encode_start("Act.", "a")
    assert not out.loss_mask.any()
    assert out.turn_start.shape == (0,)


def test_our_template_closes_the_assistants_turns_only():
    t = _template("own")
    text = t.tokenizer.decode(t.encode_trajectory(_episode(["o0", "o1"], ["Action: a"])).tokens)
    assert text == "<|system|>Act.<|user|>o0<|assistant|>Action: a<|end|>"
    assert t.tokenizer.decode(t.encode_observation("o1")) == "<|user|>o1<|assistant|>"


def test_the_callers_tokenizer_is_left_alone():
    tokenizer = _ALL["chatml"]()
    before = tokenizer.backend_tokenizer.to_str()
    ChatTemplate(tokenizer).encode_start("a", "b")
    assert tokenizer.backend_tokenizer.to_str() == before
    assert not tokenizer.backend_tokenizer.encode_special_tokens


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no special"),
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", "0 times"),
        ("{% for m in messages %}{{ m.content * 2 }}</s>{% endfor %}", "2 times"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}",
            "earlier",
        ),
        (
            "{% for m in messages %}{{ loop.index }}{{ m.content }}</s>{% endfor %}",
            "second turn is rendered differently",
        ),
        (
            "{% for m in messages %}{{ m.content | replace('\n', ' ') }}</s>{% endfor %}",
            "texts are changed",
        ),
        ("{{ raise_exception('never') }}", "refuses"),
    ],
)
def test_templates_that_cannot_be_used_are_named(template, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(_byte_level(template))


def test_tokenizers_that_make_control_tokens_of_text_are_refused():
    vocab = {token: i for i, token in enumerate(("<unk>", "</s>", "a", "b", "<s>"))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = _wrap(backend, "{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    with pytest.raises(ValueError, match="becomes the control token"):
        ChatTemplate(tokenizer)

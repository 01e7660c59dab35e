# ruff: noqa: E402 - the packages are looked for first
"""What messages and replies say never becomes a control token, and ordinary text keeps the ids it always had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the student needs the train extra")
pytest.importorskip("transformers", reason="the student needs the train extra")

from student_tiny import spm_tokenizer, tiny_model, tiny_tokenizer, write_rows

from selfinstruct.errors import UsageError
from selfinstruct.student.control_tokens import controls_of, encode_texts
from selfinstruct.student.dialogue import encode_dialogue
from selfinstruct.student.examples import Example
from selfinstruct.student.models import weights
from selfinstruct.student.prompt import ALPACA, CHAT, load_template, named_template, save_template
from selfinstruct.student.train.finetune import finetune
from selfinstruct.student.train.recipes import Recipe, Runtime
from selfinstruct.student.train.tokens import tokenise

pytestmark = pytest.mark.filterwarnings("default")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token "
    "}}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# A template, the control tokens in its tokenizer, and the one that ends a reply.
TEMPLATES: dict[str, tuple[str, list[str], str]] = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "smollm2": (SMOLLM2, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "llama-3": (LLAMA_3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "mistral": (MISTRAL, [], "</s>"),
    "mistral-v3": (MISTRAL, ["[INST]", "[/INST]"], "</s>"),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "zephyr": (ZEPHYR, [], "</s>"),
    "phi-3": (PHI_3, ["<|user|>", "<|assistant|>", "<|end|>"], "<|end|>"),
}
ORDINARY = ["  say <red> | blue?\n\nol\u00e1 \u2014 \U0001f600 ", "blue\n", "and\tred <|im_ </ s>"]
EVERY = [(name, kind, special) for name in TEMPLATES for kind in ("bytes", "spm") for special in (True, False)]


def tokenizer_of(kind: str, name: str, folder: Path, special: bool = True) -> Any:
    """A byte BPE or SentencePiece-like tokenizer with a template's control tokens, which some makers do not flag."""
    from tokenizers import AddedToken

    template, tokens, _ = TEMPLATES[name]
    made = tiny_tokenizer() if kind == "bytes" else spm_tokenizer(folder)
    made.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens], special_tokens=special)
    made.chat_template = template
    return made


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def controls_in(tokenizer: Any, ids: list[int]) -> list[int]:
    return [i for i in ids if i in tokenizer.added_tokens_decoder]


@pytest.mark.parametrize(("name", "kind", "special"), EVERY)
def test_ordinary_conversations_have_the_ids_of_apply_chat_template(
    name: str, kind: str, special: bool, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(kind, name, tmp_path, special)
    template = named_template("chat", tokenizer)
    for messages in (turns(*ORDINARY), turns(ORDINARY[0])):
        wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert encode_dialogue(template, tokenizer, messages) == wanted
    prompt = tokenizer.apply_chat_template(turns("a\n\nb"), add_generation_prompt=True, return_dict=False)
    assert template.encode_prompts(tokenizer, [("a", "b"), ("a", "b")]) == [prompt, prompt]


@pytest.mark.parametrize(("name", "kind", "special"), EVERY)
def test_messages_add_no_control_token_to_those_of_the_template(
    name: str, kind: str, special: bool, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(kind, name, tmp_path, special)
    template = named_template("chat", tokenizer)
    tokens = [*TEMPLATES[name][1], "</s>", "<s>", "<unk>"]
    evil = [token + "\n" + "red ".join(tokens) + "x" + "".join(reversed(tokens)) for token in tokens[:3]]
    evil.append("</s")
    messages = turns(evil[0], evil[1], evil[2])
    ids = encode_dialogue(template, tokenizer, messages)
    harmless = encode_dialogue(template, tokenizer, turns("a", "b", "c"))
    assert controls_in(tokenizer, ids) == controls_in(tokenizer, harmless)
    rendered, decoded = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
        tokenizer.decode(ids),
    )
    # Nothing of the text is lost; SentencePiece has spaces of its own behind control tokens.
    assert decoded.replace(" ", "") == rendered.replace(" ", "")
    if kind == "bytes":
        assert decoded == rendered


@pytest.mark.parametrize(("name", "kind", "special"), EVERY)
def test_a_reply_ends_as_the_template_ends_it_and_only_there(
    name: str, kind: str, special: bool, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(kind, name, tmp_path, special)
    template = named_template("chat", tokenizer)
    assert template.eos == TEMPLATES[name][2]
    end = tokenizer.convert_tokens_to_ids(template.eos)
    save_template(template, tmp_path)
    assert end in weights.end_ids(load_template(tmp_path), tokenizer, None)
    assert template.eos_id(tokenizer) == end
    hostile = f"{template.eos} no {template.eos}\n" + "".join(TEMPLATES[name][1]) + "</s>"
    tokens = tokenise([Example("a", "", hostile), Example("b", "", "")], template, tokenizer, max_length=900)
    reply = tokens.row(0)[tokens.loss_from[0] :].tolist()
    assert controls_in(tokenizer, reply) == [end]
    assert tokenizer.decode(reply[:-1]).strip() == hostile
    assert tokens.row(1)[tokens.loss_from[1] :].tolist() == [end]


def test_a_trained_model_tells_other_programs_where_its_replies_end(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    model = tiny_model(tmp_path / "model")
    tokenizer = tokenizer_of("bytes", "chatml", tmp_path)
    tokenizer.save_pretrained(model)
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    ends = [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    for template, wanted in (("chat", ends), ("alpaca", 2)):
        recipe = Recipe("test", template=template, batch=8, epochs=1)
        outcome = finetune(str(rows), str(model), tmp_path / template, recipe, Runtime(device="cpu"))
        assert outcome.folder is not None
        assert GenerationConfig.from_pretrained(outcome.folder).eos_token_id == wanted


def test_a_template_without_one_end_of_replies_leaves_it_to_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|a|>", "<|b|>", "<|user|>"], special_tokens=True)
    for after in ("", "\n", "<|a|><|b|>", "{% if loop.last %}<|a|>{% else %}<|b|>{% endif %}"):
        tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}" + after + "{% endfor %}"
        assert named_template("chat", tokenizer).eos == "</s>"
    tokenizer.chat_template = "{{ raise_exception('one message only') if messages[1:] }}{{ messages[0].content }}"
    assert named_template("chat", tokenizer).eos == "</s>"


def test_a_tokenizer_without_a_chat_template_is_told() -> None:
    with pytest.raises(UsageError, match="no chat template"):
        CHAT.encode_messages(tiny_tokenizer(), turns("a"))


def test_thoughts_that_a_template_does_not_write_stay_tokens() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHATML
    thought = tokenizer.convert_tokens_to_ids("<think>")
    template = named_template("chat", tokenizer)
    assert thought in template.encode_replies(tokenizer, ["<think>why</think>yes"])[0]
    assert thought in template.encode_prompt(tokenizer, "continue <think>")


def vocabulary_tokenizer(kind: str, normalizer: Any = None) -> Any:
    """A tokenizer whose very vocabulary holds its special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "<|im_end|>", "<pad>"]
    letters = [*"<>/|_abcdeimnpsy", "\u2581", "red", "blue"]
    model: Any
    if kind == "unigram":
        model = models.Unigram([(piece, 0.0) for piece in pieces] + [(piece, -3.0) for piece in letters], 0, False)
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        model = models.WordLevel({piece: i for i, piece in enumerate([*pieces, *letters])}, unk_token="<unk>")
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Metaspace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<|im_end|>"],
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["unigram", "wordlevel"])
def test_special_tokens_of_the_vocabulary_are_no_ids_of_texts(kind: str) -> None:
    tokenizer = vocabulary_tokenizer(kind)
    texts = ["</s>", "<s>", "red </s> blue", "<|im_end|></s></s>", "<</s>s>", "say <pad> ", "\u2603 <unk> </s>"]
    assert 2 in tokenizer("</s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]  # or why all this
    found = encode_texts(tokenizer, texts)
    barred = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert not barred & {i for ids in found for i in ids}
    assert all(found)
    if kind == "unigram":
        assert tokenizer.decode(found[2]) == "red </s> blue"
        assert [tokenizer.decode(ids) for ids in found[:2]] == ["</s>", "<s>"]
    tokens = tokenise([Example("</s>", "<s>", "red </s>")], ALPACA, tokenizer, max_length=900)
    assert tokens.row(0).tolist().count(2) == 1
    ordinary = ["red blue", "blue", ""]
    plain = tokenizer(ordinary, add_special_tokens=False)["input_ids"]
    assert encode_texts(tokenizer, ordinary) == plain


def test_characters_that_a_normaliser_turns_into_a_special_token_stay_characters() -> None:
    from tokenizers import normalizers

    tokenizer = vocabulary_tokenizer("unigram", normalizers.NFKC())
    tokenizer.chat_template = CHATML
    template = named_template("chat", tokenizer)
    wide = "\uff1c/s\uff1e red"
    assert 2 in tokenizer(wide, add_special_tokens=False)["input_ids"]
    assert 2 not in encode_texts(tokenizer, [wide])[0]
    assert 2 not in template.encode_messages(tokenizer, turns(wide))


def test_the_unknown_token_stands_for_characters_unless_it_ends_texts() -> None:
    tokenizer = vocabulary_tokenizer("unigram")
    assert encode_texts(tokenizer, ["\u2603"])[0][-1] == tokenizer.unk_token_id
    same = tiny_tokenizer()
    same.unk_token = "</s>"  # as GPT-2 has it
    assert same.eos_token_id in controls_of(same).ids
    assert controls_of(tokenizer).ids == {1, 2, 3, 4}


def test_a_padding_token_of_one_character_stays_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "!"
    assert tokenizer.decode(encode_texts(tokenizer, ["hi!"])[0]) == "hi!"

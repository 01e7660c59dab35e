"""The training template: one place for the words around a task, used by fine-tuning and inference.

A template is stored beside the model that was trained with it (``selfinstruct_template.json``), because models tuned
with ``### Response:`` and with ``### Response:\\n`` do not understand each other's prompts.

Prompt and completion are always tokenised apart and their ids joined. Tokenised as one text, ``### Response:``
followed by ``- milk`` becomes the single token ``:-`` in 3.3 % of the rows of the 52K (LLaMA tokenizer), which no
prompt at inference time ever ends with.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selfinstruct.errors import ModelFileError, UsageError
from selfinstruct.student import chat_turns
from selfinstruct.student.control_tokens import Controls, controls_of, cut, encode_pieces, encode_texts, new_mark

TEMPLATE_FILE = "selfinstruct_template.json"

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

# A text template as a chat template. "\n" and quotes are all that llama.cpp's Jinja needs to unescape.
_JINJA = string.Template("""\
{%- set ns = namespace(said="") -%}
{%- for message in messages -%}
{%- if message["role"] in ["system", "developer"] and message["content"] -%}
{%- set ns.said = ns.said + message["content"] + "\\n\\n" -%}
{%- endif -%}
{%- endfor -%}
{{- $begins -}}
{%- for message in messages -%}
{%- if message["role"] == "user" -%}
{{- $before + ns.said + message["content"] + $after -}}
{%- set ns.said = "" -%}
{%- elif message["role"] == "assistant" -%}
{{- message["content"] + $ends -}}
{%- endif -%}
{%- endfor -%}
""")


@dataclass(frozen=True, slots=True)
class Template:
    """The words around a task.

    ``kind`` is "text" (``with_input`` and ``without_input`` hold ``{instruction}`` and ``{input}``) or "chat" (the
    tokenizer's own chat template; both texts are then ""). ``eos`` is the text of the token that ends a response,
    "" for the tokenizer's own. ``chat_template`` is the tokenizer's Jinja text when the template was chosen, used even
    if the tokenizer's files change later; "" for what the tokenizer has now.
    """

    name: str
    kind: str
    with_input: str = ""
    without_input: str = ""
    eos: str = ""
    chat_template: str = ""

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt as text; nothing follows its last character before the response.

        For a chat template this is the user's message alone: the tokenizer adds the rest (see ``encode_prompt``).
        """
        if self.kind == "chat":
            return f"{instruction}\n\n{input}" if input else instruction
        # One pass of replacement: a task that contains "{input}" must stay as it is.
        shape = self.with_input if input else self.without_input
        before, _, after = shape.partition("{instruction}")
        return before + instruction + after.replace("{input}", input, 1)

    def encode_prompt(self, tokenizer: Any, instruction: str, input: str = "") -> list[int]:
        """The ids of the prompt, beginning with BOS where the tokenizer uses one, ending where the response begins."""
        return self.encode_prompts(tokenizer, [(instruction, input)])[0]

    def encode_prompts(self, tokenizer: Any, tasks: Sequence[tuple[str, str]]) -> list[list[int]]:
        """``encode_prompt`` for many (instruction, input) pairs at once: one pass of the fast tokenizer."""
        texts = [self.render(*task) for task in tasks]
        if self.kind == "chat":
            return self._encode_chats(tokenizer, [[{"role": "user", "content": text}] for text in texts])
        bos = _bos(tokenizer)
        return [bos + ids for ids in encode_texts(tokenizer, texts)]

    def encode_replies(self, tokenizer: Any, replies: Sequence[str]) -> list[list[int]]:
        """The ids of responses, without the token that ends them and without any that would."""
        return encode_texts(tokenizer, replies, self._controls(tokenizer))

    def encode_messages(self, tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation by the chat template, up to where the reply begins; UsageError if it refuses.

        Control tokens are the template's own alone: what the messages say is text.
        """
        return self._encode_chats(tokenizer, [messages])[0]

    def _controls(self, tokenizer: Any) -> Controls:
        if self.kind != "chat":
            return controls_of(tokenizer)
        return controls_of(tokenizer, chat_turns.turn_tokens(tokenizer, self._chat_text(tokenizer)))

    def _chat_text(self, tokenizer: Any) -> str:
        try:
            return self.chat_template or str(tokenizer.get_chat_template())
        except ValueError as error:
            raise UsageError("the tokenizer has no chat template", hint="use --template alpaca") from error

    def _encode_chats(self, tokenizer: Any, chats: Sequence[Sequence[Mapping[str, str]]]) -> list[list[int]]:
        mark = new_mark()
        contents = [message["content"] for chat in chats for message in chat]
        shielded = iter(cut(tokenizer, contents, self._controls(tokenizer), mark) if contents else ())
        return [
            self._encode_shielded(tokenizer, [{**message, "content": next(shielded)} for message in chat], mark)
            for chat in chats
        ]

    def _encode_shielded(self, tokenizer: Any, messages: Sequence[Mapping[str, str]], mark: str) -> list[int]:
        """The ids of a conversation in whose contents ``mark`` stands where they must be tokenised apart."""
        from jinja2 import TemplateError

        text = self._chat_text(tokenizer)
        try:
            if not any(mark in message["content"] for message in messages):
                return [int(i) for i in chat_turns.apply(tokenizer, text, messages, tokenize=True)]
            return encode_pieces(tokenizer, chat_turns.apply(tokenizer, text, messages, tokenize=False).split(mark))
        except (TemplateError, ValueError) as error:
            raise UsageError(
                f"the model's chat template refuses these messages ({error})", hint="use --template alpaca"
            ) from error

    def jinja(self, tokenizer: Any) -> str:
        """The same conversation as a chat template for other programs (llama.cpp, vLLM, transformers).

        As ``dialogue`` renders it: what the system says goes before the first task, each response ends with EOS.
        """
        if self.kind == "chat":
            return self._chat_text(tokenizer)
        before, _, after = self.without_input.partition("{instruction}")
        ends = self.eos or str(tokenizer.eos_token or "")
        begins = str(tokenizer.bos_token) if _bos(tokenizer) else ""
        parts = {"begins": begins, "ends": ends, "before": before, "after": after}
        return _JINJA.substitute({name: json.dumps(text, ensure_ascii=False) for name, text in parts.items()})

    def eos_id(self, tokenizer: Any) -> int:
        """The id of the token that ends a response; UsageError when the tokenizer has none."""
        found = tokenizer.convert_tokens_to_ids(self.eos) if self.eos else tokenizer.eos_token_id
        if found is None or (self.eos and found == tokenizer.unk_token_id):
            raise UsageError(
                f"template {self.name!r}: the tokenizer has no end token {self.eos or '(eos_token is not set)'}",
                hint="set eos_token in the model's tokenizer_config.json",
            )
        return int(found)

    def fingerprint(self) -> str:
        """SHA-256 of all fields: the template's identity in a training manifest."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


ALPACA = Template("alpaca", "text", _WITH_INPUT, _WITHOUT_INPUT)
ALPACA_LORA = Template("alpaca-lora", "text", _WITH_INPUT + "\n", _WITHOUT_INPUT + "\n")
CHAT = Template("chat", "chat")
TEMPLATES = {template.name: template for template in (ALPACA, ALPACA_LORA, CHAT)}


def named_template(name: str, tokenizer: Any = None) -> Template:
    """A template by name. "chat" is frozen with the tokenizer's own chat template; UsageError without one."""
    if name not in TEMPLATES:
        raise UsageError(f"no template {name!r}", hint=f"known: {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    if template.kind != "chat" or tokenizer is None:
        return template
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("this model's tokenizer has no chat template", hint="use --template alpaca")
    text = str(tokenizer.get_chat_template())
    ends = chat_turns.reply_end(tokenizer, text) or str(tokenizer.eos_token or "")
    return Template("chat", "chat", eos=ends, chat_template=text)


def save_template(template: Template, model_dir: Path) -> None:
    """Store the template beside the model."""
    text = json.dumps(asdict(template), indent=2, ensure_ascii=False) + "\n"
    (model_dir / TEMPLATE_FILE).write_text(text, encoding="utf-8", newline="\n")


def load_template(model_dir: Path) -> Template:
    """The template stored beside a model, or Alpaca's when none is; ModelFileError if damaged."""
    path = model_dir / TEMPLATE_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        template = Template(**{str(name): str(value) for name, value in found.items()})
    except (FileNotFoundError, NotADirectoryError):
        return ALPACA
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{path}: is no template ({error})", hint="restore the file, or remove it") from error
    whole = "{instruction}" in template.with_input and "{instruction}" in template.without_input
    if template.kind not in ("text", "chat") or (template.kind == "text" and not whole):
        raise ModelFileError(f"{path}: is no template (no {{instruction}} in it)", hint="restore the file")
    return template


def is_unicode(text: str) -> bool:
    """Whether a text is whole: JSON can carry half a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bos(tokenizer: Any) -> list[int]:
    """[BOS] where the tokenizer begins a text with it by itself (LLaMA), else [] (SmolLM2, GPT-2)."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    first = tokenizer("a", return_attention_mask=False)["input_ids"][:1]
    return [int(bos)] if first == [bos] else []

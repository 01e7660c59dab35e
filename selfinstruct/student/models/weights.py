"""Loading a model, or its words and settings alone, from where it lies (``source.py``).

Weights come from safetensors or GGUF only: a pickle can run code while it is read, and so can a model's own Python.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfinstruct.errors import MissingPackage, ModelFileError, UsageError
from selfinstruct.student.models import model_folder, quantised
from selfinstruct.student.models.source import Source, locate
from selfinstruct.student.prompt import TEMPLATE_FILE, Template, load_template, named_template

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "bf16", "fp16", "fp32")
_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run. ``end_ids``: tokens that end a reply."""

    source: Source
    model: Any
    tokenizer: Any
    template: Template
    end_ids: frozenset[int]


def load_tokenizer(source: Source) -> Any:
    """The tokenizer, padding on the left. Raises ModelFileError."""
    from transformers import AutoTokenizer

    own = source.adapter if source.adapter and (source.adapter / "tokenizer_config.json").exists() else None
    where, options = (str(own), {}) if own else _address(source)
    try:
        found = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
    except _refusals() as error:
        hint = "the model's folder needs tokenizer.json and tokenizer_config.json"
        raise _unreadable(source, "its tokenizer cannot be read", error, hint) from error
    found.padding_side = "left"
    return found


def template_of(source: Source, tokenizer: Any, wanted: str | None = None) -> Template:
    """The template to use: the named one, else the one stored with the model, else the tokenizer's chat template,
    else Alpaca's."""
    if wanted is not None:
        return named_template(wanted, tokenizer)
    if (source.words / TEMPLATE_FILE).exists():
        return load_template(source.words)
    return named_template("chat" if getattr(tokenizer, "chat_template", None) else "alpaca", tokenizer)


def load(
    name: str, *, dtype: str = "auto", quant: str | None = None, template: str | None = None, device: str = "auto"
) -> Loaded:
    """Load model, tokenizer and template; LoRA adapters are merged into the weights.

    ``dtype`` "auto" is bf16 on a GPU and fp32 on a CPU. ``quant`` (8bit, 4bit) needs bitsandbytes and, with an adapter,
    keeps the adapter apart. Raises UsageError, MissingPackage, ModelFileError.
    """
    source = locate(name)
    tokenizer = load_tokenizer(source)
    chosen = template_of(source, tokenizer, template)
    model = load_weights(source, dtype=dtype, quant=quant, device=device)
    return Loaded(source, model, tokenizer, chosen, end_ids(chosen, tokenizer, model.generation_config))


def load_weights(source: Source, *, dtype: str = "auto", quant: str | None = None, device: str = "auto") -> Any:
    """The model alone, in eval mode, on its device."""
    import torch

    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of {', '.join(DTYPES)}")
    if source.adapter:
        _require_its_base(source, source.adapter)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    options = {}
    if quant is not None:
        options["quantization_config"] = quantised.asked_for(quant, place, gguf=source.gguf is not None)
    try:
        model = read_model(source, _dtype(dtype, place), place, **options)
        if source.adapter:
            model = _with_adapter(model, source.adapter, merge=quant is None)
    except torch.OutOfMemoryError as error:
        raise ModelFileError(f"{source.name} does not fit the GPU", hint="use --quant 8bit or 4bit") from error
    model.eval().requires_grad_(False)
    return model


def read_model(source: Source, dtype: torch.dtype, place: torch.device, **options: Any) -> Any:
    """The base model as it is stored, on its device; never runs code from its folder, never reads pickles.

    ``options`` go to ``from_pretrained``. Raises ModelFileError, or torch.OutOfMemoryError as it comes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    where, more = _address(source)
    if not source.gguf:
        more["use_safetensors"] = True
    straight = place.type == "cuda" and importlib.util.find_spec("accelerate") is not None
    if straight:
        more["device_map"] = {"": place.index or 0}  # to the GPU shard by shard: little memory on the host
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, trust_remote_code=False, **more, **options
        )
    except torch.OutOfMemoryError:
        raise
    except _refusals() as error:
        hint = "give a folder with config.json and .safetensors files, a .gguf file, or a name on the Hub"
        raise _unreadable(source, "cannot be loaded", error, hint) from error
    if source.gguf:
        _forget_gguf(model)
    return model if straight else model.to(place)


def load_config(source: Source) -> Any:
    """The model's configuration alone; reads no weights (of a GGUF file, its header)."""
    from transformers import AutoConfig

    where, options = _address(source)
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
    except _refusals() as error:
        raise _unreadable(source, "its configuration cannot be read", error, "") from error


def made_for(config: Any) -> int:
    """The longest text that a model was made for, in tokens; 4,096 where it does not say."""
    return int(getattr(config, "max_position_embeddings", None) or _CONTEXT)


def load_generation_config(source: Source) -> Any:
    """The model's generation settings alone, as they come with its weights."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source.base)
    except _refusals():  # most models that were trained here have none of their own
        return GenerationConfig.from_model_config(load_config(source))


def _address(source: Source) -> tuple[str, dict[str, Any]]:
    """Where transformers finds the base, and what it must be told about it."""
    return (str(source.gguf.parent), {"gguf_file": source.gguf.name}) if source.gguf else (source.base, {})


def end_ids(template: Template, tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """Tokens that end a reply: the template's, the tokenizer's and those of the model's generation settings."""
    found: set[int] = {template.eos_id(tokenizer)}
    configured = getattr(generation_config, "eos_token_id", None)
    for one in (tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])):
        if one is not None:
            found.add(int(one))
    return frozenset(found)


def _dtype(name: str, place: torch.device) -> torch.dtype:
    import torch

    if name == "auto":
        return torch.bfloat16 if place.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def _require_its_base(source: Source, adapter: Path) -> None:
    """ModelFileError when the files of the base are not those that the adapter was trained on, where that is known."""
    recorded = adapter / model_folder.PROVENANCE
    if not recorded.is_file():
        return
    about = model_folder.read_json(recorded).get("model")
    trained_on = about.get("weights") if isinstance(about, dict) else None
    found = Source(source.name, source.base).weights()
    if not isinstance(trained_on, list) or trained_on == found:
        return
    if [one[0] for one in found] == [one[0] for one in trained_on if one]:  # else it may be the same in another form
        raise ModelFileError(
            f"{adapter}: was trained on other weights than {source.base} holds now",
            hint=f"restore them, or name the true base in adapter_config.json; to use these, remove {recorded}",
        )


def _with_adapter(model: Any, folder: Path, *, merge: bool) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise MissingPackage("LoRA adapters need the package peft", hint="pip install 'selfinstruct[train]'")
    import torch
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelFileError(f"{folder}: the adapter does not fit its base: {_short(error)}") from error
    return adapted.merge_and_unload() if merge else adapted.get_base_model()


def _forget_gguf(model: Any) -> None:
    """The weights are plain now, but the configuration still says gguf, and could not be saved."""
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.is_quantized = False
    model.quantization_method = None


def _refusals() -> tuple[type[Exception], ...]:
    """What transformers raises, by no system, for a folder whose files do not say what they should."""
    from huggingface_hub.errors import StrictDataclassError

    kinds = (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, RuntimeError, RecursionError)
    return (*kinds, StrictDataclassError)


def _unreadable(source: Source, what: str, error: Exception, hint: str) -> ModelFileError:
    what = f"{source.name}: {what}"
    if not Path(source.base).exists():
        what = f"there is no folder {source.base} here; as a name on the Hub, {what}"
        hint = "check the path, or the name and the connection"
    if "trust_remote_code" in str(error):
        return ModelFileError(
            f"{what}: it comes with Python code of its own, which is never run here",
            hint="choose a model of an architecture that transformers has itself",
        )
    return ModelFileError(f"{what} ({_short(error)})", hint=hint)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

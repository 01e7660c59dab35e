"""A model folder as one GGUF file for llama.cpp: Llama family, 16 or 8 bits, written tensor by tensor.

Linear maps and embeddings are stored in the chosen type, norms in 32 bits. llama.cpp turns neighbouring pairs of a
head where transformers turns its two halves: rows of the query and key maps are reordered accordingly.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selfinstruct.durable import sync
from selfinstruct.errors import MissingPackage, ModelFileError, OutputError, UsageError
from selfinstruct.student.models import model_folder
from selfinstruct.student.models.gguf_config import describe, head_sizes, llama3_frequencies, read_config
from selfinstruct.student.models.gguf_words import Words, read_words
from selfinstruct.student.models.source import Source, locate
from selfinstruct.student.prompt import TEMPLATE_FILE, load_template

KINDS = ("f16", "q8_0")
_BLOCK = 32  # values that share a scale in q8_0
_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def export(name: str, out: Path, kind: str = "f16", *, log: Callable[[str], None] = lambda _line: None) -> Path:
    """Write MODEL (a folder, a run, an adapter, which is merged first) to the file ``out``.

    Raises UsageError for an unknown kind and for what llama.cpp would read or compute otherwise, MissingPackage
    without gguf, OutputError when the file is there already or cannot be written. ``out`` appears whole or not at all;
    what a killed export leaves beside it, the next one removes.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown kind {kind!r}", hint=f"--gguf {' or '.join(KINDS)}")
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackage("writing GGUF needs the package gguf", hint="pip install 'selfinstruct[gguf]'")
    if out.exists():
        raise OutputError(f"{out}: is there already", hint="name another file with -o")
    source = locate(name)
    if source.gguf:
        raise UsageError(f"{name} is a GGUF file already", hint=f"cp {source.gguf} {out}")
    from safetensors import SafetensorError

    try:
        with model_folder.work_folder(out.absolute()) as work:
            part = work / "part.gguf"
            folder = _merged(source, name, work, log)
            log(f"writing {out}")
            _write(folder, part, kind, log)
            sync(part)
            part.replace(out)
    except SafetensorError as error:
        raise ModelFileError(f"{source.base}: its weights cannot be read ({error})", hint="copy them again") from error
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror or error})", hint="free some space") from error
    return out


def _merged(source: Source, name: str, work: Path, log: Callable[[str], None]) -> Path:
    if source.adapter:
        from selfinstruct.student.models.merge import merge

        return merge(name, work / "merged", dtype="fp16", log=log)
    if not Path(source.base).is_dir():
        raise UsageError(f"{name} is not on this machine", hint="give the model's folder")
    return Path(source.base)


def _write(folder: Path, path: Path, kind: str, log: Callable[[str], None]) -> None:
    import gguf

    config = read_config(folder)
    names = _tensors(folder)
    embedding = _shape(folder, names, "model.embed_tokens.weight")
    words = read_words(folder, embedding[0])
    if words.remark:
        log(words.remark)
    writer = gguf.GGUFWriter(path, "llama")
    describe(writer, config, kind, name=folder.name)
    _add_words(writer, words, folder)
    plan = [(name, target, file) for name, (target, file) in sorted(names.items(), key=lambda pair: pair[1][0])]
    for name, target, file in plan:
        shape = _shape(folder, {name: (target, file)}, name)
        _announce(writer, target, shape, _type_of(shape, kind))
    frequencies = llama3_frequencies(config)
    if frequencies is not None:
        _announce(writer, "rope_freqs.weight", frequencies.shape, gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in _arrays(folder, plan, config):
        chosen = _type_of(array.shape, kind)
        writer.write_tensor_data(gguf.quants.quantize(array, chosen) if array.ndim > 1 else array)
    if frequencies is not None:
        writer.write_tensor_data(frequencies)
    writer.close()


def _announce(writer: Any, name: str, shape: tuple[int, ...], chosen: Any) -> None:
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[chosen]
    size = int(np.prod(shape)) // block * block_bytes
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=chosen)


def _type_of(shape: tuple[int, ...], kind: str) -> Any:
    import gguf

    types = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    return types.Q8_0 if kind == "q8_0" and shape[-1] % _BLOCK == 0 else types.F16


def _add_words(writer: Any, words: Words, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    writer.add_tokenizer_model(words.kind)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(list(words.pieces))
    writer.add_token_types(list(words.kinds))
    if words.kind == "llama":
        writer.add_token_scores(list(words.scores))
    else:
        writer.add_token_merges(list(words.merges))
    writer.add_add_space_prefix(words.space_prefix)
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            add(int(number))
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    writer.add_add_eos_token(False)
    if (folder / TEMPLATE_FILE).is_file():
        writer.add_chat_template(load_template(folder).jinja(tokenizer))
    elif isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(folder: Path) -> dict[str, tuple[str, Path]]:
    """transformers' name -> (llama.cpp's name, file). Raises ModelFileError for a tensor that nobody knows."""
    from safetensors import safe_open

    found: dict[str, tuple[str, Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                if not name.endswith("rotary_emb.inv_freq"):
                    found[name] = (_target(name, file), file)
    if _ties(folder):
        found.pop("lm_head.weight", None)
    return found


def _ties(folder: Path) -> bool:
    return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings"))


def _target(name: str, file: Path) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{suffix}"
    number, _, part = stem.removeprefix("model.layers.").partition(".")
    if stem.startswith("model.layers.") and part in _PARTS:
        return f"blk.{number}.{_PARTS[part]}.{suffix}"
    raise ModelFileError(f"{file}: the tensor {name!r} belongs to no Llama model")


def _shape(folder: Path, names: Mapping[str, tuple[str, Path]], name: str) -> tuple[int, ...]:
    from safetensors import safe_open

    if name not in names:
        raise ModelFileError(f"{folder}: has no tensor {name}")
    with safe_open(names[name][1], "pt") as opened:
        return tuple(opened.get_slice(name).get_shape())


def _arrays(folder: Path, plan: list[tuple[str, str, Path]], config: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """The tensors in the order of the plan, in 32 bits, one at a time."""
    from safetensors import safe_open

    heads, kv_heads, _dim = head_sizes(config)
    for name, target, file in plan:
        with safe_open(file, "pt") as opened:
            array = opened.get_tensor(name).float().numpy()
        if ".attn_q." in target:
            array = _interleave(array, heads)
        elif ".attn_k." in target:
            array = _interleave(array, kv_heads)
        yield np.ascontiguousarray(array)


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head, first half and second half, become pairs."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)

"""A model's configuration as GGUF metadata, and what a Llama file cannot say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selfinstruct.errors import ModelFileError, UsageError

_FAMILIES = ("llama", "mistral")
_ACTIVATIONS = ("silu", "swish")  # two names of one function
_ELSEWHERE = "convert the folder with llama.cpp's own convert_hf_to_gguf.py"


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``. Raises UsageError for a model that llama.cpp would compute otherwise as a Llama."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{folder}/config.json: cannot be read ({error})", hint="copy the model again") from error
    if config.get("model_type") not in _FAMILIES:
        raise UsageError(
            f"{folder}: export writes models of the Llama family, this is {config.get('model_type')!r}", hint=_ELSEWHERE
        )
    if window := config.get("sliding_window"):
        raise UsageError(
            f"{folder}: this {config['model_type']} looks back {window} tokens only (sliding_window), and a Llama file "
            "cannot say that",
            hint=f"for texts of less than {window} tokens, write null there in config.json; else use vLLM",
        )
    act = config.get("hidden_act", "silu")
    if act not in _ACTIVATIONS:
        raise UsageError(f"{folder}: hidden_act is {act!r}, and llama.cpp computes a Llama with silu", hint=_ELSEWHERE)
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise UsageError(f"{folder}: export does not know positions of type {rope['rope_type']!r}", hint=_ELSEWHERE)
    return dict(config)


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Position settings, as transformers 5 writes them, and 4 did."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found.setdefault("rope_type", found.get("type", "default"))
    return found


def head_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(query heads, key heads, dimensions of each)."""
    heads = int(config["num_attention_heads"])
    return (
        heads,
        int(config.get("num_key_value_heads") or heads),
        int(config.get("head_dim") or config["hidden_size"] // heads),
    )


def describe(writer: Any, config: Mapping[str, Any], kind: str, *, name: str) -> None:
    """Write sizes and positions."""
    import gguf

    heads, kv_heads, dim = head_sizes(config)
    rope = _rope(config)
    writer.add_name(name)
    writer.add_context_length(int(config.get("max_position_embeddings", 2048)))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(int(config["vocab_size"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    types = gguf.LlamaFileType
    writer.add_file_type(types.MOSTLY_Q8_0 if kind == "q8_0" else types.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def llama3_frequencies(config: Mapping[str, Any]) -> np.ndarray | None:
    """Llama 3's stretched positions: the factor by which each frequency is divided, (dim / 2,) float32."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    dim = head_sizes(config)[2]
    frequencies = 1.0 / float(rope["rope_theta"]) ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    length = float(rope["original_max_position_embeddings"])
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    waves = 2 * math.pi / frequencies
    smooth = (length / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    chosen = np.where(waves < length / high, 1.0, np.where(waves > length / low, factor, between))
    return chosen.astype(np.float32)

"""A tiny random LLaMA with a byte tokenizer, and rows to train it on: for the tests of the student room."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = "red blue green small large house tree river moon star count list name write explain sort".split()


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        instruction = " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))
        context = " ".join(rng.choices(WORDS, k=3)) if rng.random() < 0.3 else ""
        rows.append({"instruction": instruction, "input": context, "output": instruction[::-1][: rng.randint(2, 30)]})
    return rows


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(count, seed)), encoding="utf-8")
    return path


def tiny_tokenizer() -> Any:
    """One token a byte, BOS (added by itself, as LLaMA's does) and EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {char: 3 + i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def tiny_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    shape = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024, "bos_token_id": 1,
        "eos_token_id": 2, "attn_implementation": "sdpa",
    }  # fmt: skip
    return LlamaConfig(**{**shape, **changes})


def tiny_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random model with its tokenizer, saved as safetensors."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def other_model(folder: Path, kind: str, **changes: Any) -> Path:
    """A random model of another type, with the byte tokenizer."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    shape = {name: value for name, value in tiny_config().to_dict().items() if name in _SHAPE}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**shape, **changes}))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


_SHAPE = frozenset(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
    "max_position_embeddings bos_token_id eos_token_id".split()
)


def spm_tokenizer(folder: Path) -> Any:
    """A SentencePiece-like tokenizer as LLaMA's is converted: byte fallback, merges, a space in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = [("r", "e"), ("re", "d"), ("▁", "red"), ("l", "u"), ("b", "lu"), ("▁", "b"), ("blu", "e"), ("▁", "blue")]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["".join(pair) for pair in merges] + list("▁redblu"):
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    made.save_pretrained(folder)
    return made

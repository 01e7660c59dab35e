# ruff: noqa: E402 - the packages are looked for first
"""A model whose loss would come out wrong on joined rows is refused before it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the student needs the train extra")
pytest.importorskip("transformers", reason="the student needs the train extra")

from student_tiny import tiny_tokenizer, write_rows

from selfinstruct.errors import UsageError
from selfinstruct.student.train import attention, exactness
from selfinstruct.student.train.finetune import finetune
from selfinstruct.student.train.recipes import Recipe, Runtime
from selfinstruct.student.train.trainee import Trainee

pytestmark = pytest.mark.filterwarnings("default")
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 512, "initializer_range": 0.1,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SDPA = attention.Choice("sdpa", "asked for")


def model_of(kind: str, **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SHAPE, **changes}))


def required(model: Any) -> None:
    attention.register()
    model.set_attn_implementation(SDPA.implementation)
    exactness.require(Trainee(model), SDPA, 64)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3", "olmo2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_compute_on_joined_rows_what_they_compute_on_separate_ones_pass(kind: str, dtype: Any) -> None:
    model = model_of(kind).to(dtype)
    required(model)
    assert model.training
    assert model.config._attn_implementation == SDPA.implementation


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("granite", {"logits_scaling": 8.0}, "joined rows give other logits"),
        ("cohere", {}, "joined rows give other logits"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "joined rows give other logits"),
        ("phi", {}, "output layer has a bias"),
        ("stablelm", {}, "do not take rows joined"),
        ("gpt2", {}, "do not take rows joined"),
    ],
)
def test_models_that_would_be_trained_wrongly_are_refused_with_the_reason(
    kind: str, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        required(model_of(kind, **changes))
    assert kind in str(caught.value)


def test_a_run_asks_before_its_first_step(tmp_path: Path) -> None:
    model_of("granite", logits_scaling=8.0).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    with pytest.raises(UsageError, match="'granite' are not supported"):
        finetune(str(rows), str(tmp_path / "model"), tmp_path / "run", Recipe("test"), Runtime(device="cpu"))
    assert not (tmp_path / "run" / "log.jsonl").exists()

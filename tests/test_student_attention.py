# ruff: noqa: E402 - the packages are looked for first
"""What a model's layers ask of attention in training is done or refused: dropout, and windows over the last tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the student needs the train extra")
pytest.importorskip("transformers", reason="the student needs the train extra")

from student_tiny import tiny_config, tiny_tokenizer

from selfinstruct.errors import UsageError
from selfinstruct.student.train import attention, batches
from selfinstruct.student.train.finetune import finetune
from selfinstruct.student.train.recipes import Recipe, Runtime
from selfinstruct.student.train.tokens import from_rows
from selfinstruct.student.train.trainee import Trainee

pytestmark = pytest.mark.filterwarnings("default")


def model_of(kind: str, kernel: str = "sdpa", **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    attention.register()
    torch.manual_seed(0)
    shape = tiny_config().to_dict()
    del shape["model_type"], shape["rope_parameters"]
    return AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[kind](**{**shape, "pad_token_id": 0, **changes}), attn_implementation=attention.PREFIX + kernel
    )


def one_row() -> batches.MicroBatch:
    """A row that fills a micro-batch: nothing is joined to it."""
    row = [[(7 * place + 3) % 320 for place in range(batches.ALIGNMENT)]]
    return batches.join(from_rows(row, [1], eos=row[0][-1], max_length=64), [0], longest=64)


@pytest.mark.parametrize("kind", ["llama", "starcoder2", "seed_oss"])
def test_dropout_draws_what_transformers_own_attention_draws(kind: str) -> None:
    model = model_of(kind, attention_dropout=0.3, residual_dropout=0.2)
    trainee, batch = Trainee(model).train(), one_row()
    torch.manual_seed(5)
    ours = trainee.hidden_states(batch)
    again = trainee.hidden_states(batch)
    model.set_attn_implementation("sdpa")
    torch.manual_seed(5)
    theirs = model.get_decoder()(input_ids=batch.ids).last_hidden_state[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, again, atol=1e-3)


def test_nothing_is_dropped_outside_training() -> None:
    trainee, batch = Trainee(model_of("llama", attention_dropout=0.3)).eval(), one_row()
    assert torch.equal(trainee.hidden_states(batch), trainee.hidden_states(batch))


def test_a_kernel_without_dropout_is_not_chosen_and_refuses() -> None:
    dropout = attention.dropout_of(tiny_config(attention_dropout=0.1))
    for kernel in ("varlen", "flex"):
        with pytest.raises(UsageError, match=r"no dropout, and the model's attention_dropout is 0\.1") as caught:
            attention.choose(torch.device("cuda"), torch.bfloat16, kernel, dropout=dropout)
        assert "--attention auto" in caught.value.hint
    trainee = Trainee(model_of("llama", "flex", attention_dropout=0.1))
    with torch.no_grad():
        trainee.eval().hidden_states(one_row())
    with pytest.raises(UsageError, match=r"drops attention weights in training \(by 0\.1\)") as caught:
        trainee.train().hidden_states(one_row())
    assert "--attention sdpa" in caught.value.hint
    assert "attention_dropout" in caught.value.hint


@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
def test_a_window_shorter_than_the_rows_is_refused(kernel: str) -> None:
    trainee = Trainee(model_of("mistral", kernel, sliding_window=63)).eval()
    with pytest.raises(UsageError, match="attends to 63 tokens only, and rows have up to 64") as caught:
        trainee.hidden_states(one_row())
    assert caught.value.hint == "use --max-length 63"


def test_rows_cut_at_the_window_are_trained_on_as_the_refusal_advises(tmp_path: Path) -> None:
    model, rows = model_of("mistral", sliding_window=99), tmp_path / "rows.jsonl"
    model.save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    rows.write_text(json.dumps({"instruction": "say it", "output": "it " * 100}) + "\n")

    def trained(longest: int) -> int:
        recipe = Recipe("test", template="chat", batch=1, max_length=longest, epochs=1)
        return finetune(str(rows), str(tmp_path / "model"), tmp_path / str(longest), recipe, Runtime(device="cpu")).step

    with pytest.raises(UsageError, match="attends to 99 tokens only, and rows have up to 120") as caught:
        trained(120)
    assert caught.value.hint == "use --max-length 99"
    assert trained(99) == 1

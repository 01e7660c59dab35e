# ruff: noqa: E402 - the packages are looked for first
"""Templates, rows and batches: what the student is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the student needs the train extra")
pytest.importorskip("transformers", reason="the student needs the train extra")

import numpy as np
from student_tiny import make_rows, tiny_tokenizer, write_rows

from selfinstruct.errors import ModelFileError, UsageError
from selfinstruct.student import examples
from selfinstruct.student.examples import Example
from selfinstruct.student.prompt import ALPACA, ALPACA_LORA, load_template, named_template, save_template
from selfinstruct.student.train import batches
from selfinstruct.student.train.tokens import from_rows, tokenise

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def some_examples(count: int = 50) -> list[Example]:
    return [Example(row["instruction"], row["input"], row["output"]) for row in make_rows(count)]


def test_the_alpaca_prompt_is_stanfords_word_for_word() -> None:
    assert ALPACA.render("Sort.", "b a") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nSort.\n\n### Input:\nb a\n\n### Response:"
    )
    assert ALPACA.render("Sort.").endswith("### Instruction:\nSort.\n\n### Response:")
    assert ALPACA_LORA.render("Sort.").endswith("### Response:\n")


def test_braces_in_a_task_stay_as_they_are() -> None:
    assert "say {input} and {instruction}" in ALPACA.render("say {input} and {instruction}", "x")


def test_prompt_and_completion_are_tokenised_apart(tokenizer: Any) -> None:
    tokens = tokenise([Example("do", "", "- milk")], ALPACA, tokenizer, max_length=512)
    prompt = ALPACA.encode_prompt(tokenizer, "do")
    assert prompt[0] == tokenizer.bos_token_id
    assert tokens.row(0)[: len(prompt)].tolist() == prompt
    assert tokens.loss_from[0] == len(prompt)
    assert tokens.row(0)[len(prompt) : -1].tolist() == tokenizer("- milk", add_special_tokens=False)["input_ids"]


def test_every_whole_row_ends_with_eos_and_cut_rows_are_counted(tokenizer: Any) -> None:
    rows = [Example("a", "", "x" * n) for n in (3, 40, 200)] + [Example("b" * 300, "", "never seen")]
    tokens = tokenise(rows, ALPACA, tokenizer, max_length=250)
    assert [int(tokens.row(i)[-1]) for i in range(3)] == [2, 2, tokens.row(2)[-1]]
    assert tokens.row(2)[-1] != 2
    assert (len(tokens), tokens.truncated, tokens.dropped) == (3, 1, 1)
    assert tokens.lengths.max() == 250


def test_a_row_that_would_not_teach_to_stop_is_refused() -> None:
    with pytest.raises(UsageError, match="never learn to stop"):
        from_rows([[1, 5, 6]], [1], eos=2, max_length=10)


def test_loss_on_the_prompt_leaves_out_only_the_first_token(tokenizer: Any) -> None:
    tokens = tokenise(some_examples(3), ALPACA_LORA, tokenizer, max_length=512, loss_on_prompt=True)
    assert tokens.loss_from.tolist() == [1, 1, 1]


def test_the_template_travels_with_the_model(tmp_path: Path) -> None:
    assert load_template(tmp_path) == ALPACA
    save_template(ALPACA_LORA, tmp_path)
    assert load_template(tmp_path) == ALPACA_LORA
    (tmp_path / "selfinstruct_template.json").write_text('{"name": 1, "colour": 2}')
    with pytest.raises(ModelFileError):
        load_template(tmp_path)


def test_the_chat_template_is_the_models_own(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        named_template("chat", tokenizer)
    own = tiny_tokenizer()
    own.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    template = named_template("chat", own)
    assert own.decode(template.encode_prompt(own, "hi", "there")) == "<user>hi\n\nthere<bot>"
    assert template.chat_template == own.chat_template


def test_a_chat_template_gives_the_same_ids_whatever_the_day_and_the_tokenizers_files() -> None:
    own = tiny_tokenizer()
    own.chat_template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    template = named_template("chat", own)
    own.chat_template = "something else"
    assert own.decode(template.encode_prompt(own, "hi")) == "26 Jul 2024hi"


def test_a_chat_template_that_refuses_is_told(tokenizer: Any) -> None:
    own = tiny_tokenizer()
    own.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(UsageError, match="no system messages"):
        named_template("chat", own).encode_prompt(own, "hi")


def test_an_end_token_in_a_task_is_text(tokenizer: Any) -> None:
    tokens = tokenise([Example("a</s>", "</s>", "b</s>c")], ALPACA, tokenizer, max_length=512)
    assert tokens.row(0).tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokens.row(0), skip_special_tokens=True).endswith("### Response:b</s>c")


def test_rows_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = make_rows(5)
    lines = write_rows(tmp_path / "rows.jsonl", 5)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = [examples.read(str(tmp_path / f"rows.{kind}")) for kind in ("jsonl", "json", "parquet")]
    assert found[0].train == found[1].train == found[2].train
    assert found[0].identity["files"].keys() == {lines.name}


def test_all_bad_rows_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": "a", "output": "b"},
        {"output": "b"},
        {"instruction": "a"},
        {"instruction": " ", "output": ""},
        {"instruction": "a \ud83d", "output": ""},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError) as caught:
        examples.read(str(path))
    assert "4 bad rows" in str(caught.value)
    assert "rows.jsonl:5: holds half a character" in str(caught.value)
    assert "rows.jsonl:2: has no text 'instruction'" in str(caught.value)
    assert "rows.jsonl:4: has an empty instruction" in str(caught.value)


def test_steps_draw_the_rows_that_the_trainers_sampler_draws() -> None:
    accelerate = pytest.importorskip("accelerate.data_loader")
    sampler = accelerate.SeedableRandomSampler(range(53), data_seed=7, generator=torch.Generator())
    for epoch in range(3):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        ours = [int(r) for step in range(7) for r in batches.step_rows(53, 8, 7, epoch * 7 + step)]
        assert ours == drawn


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_step_is_cut_into_even_parts_and_no_row_is_lost(world: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(5, 400, size=int(rng.integers(1, 128))).tolist()
        parts = batches.cut(lengths, 1000, world)
        assert len(parts) == world
        assert len({len(own) for own in parts}) == 1
        assert sorted(i for own in parts for b in own for i in b) == list(range(len(lengths)))
        assert max(sum(lengths[i] for i in b) for own in parts for b in own) <= 1000


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_heaviest_step_of_all_epochs_is_found(world: int) -> None:
    rng = np.random.default_rng(world)
    for seed in range(20):
        lengths = rng.integers(5, 400, size=int(rng.integers(1, 60)))
        labels = rng.integers(0, lengths + 1)
        batch, steps = int(rng.integers(1, 12)), int(rng.integers(1, 25))
        most, share = batches.heaviest(lengths, labels, batch, seed, steps, world)
        drawn = [batches.step_rows(len(lengths), batch, seed, step) for step in range(steps)]
        assert share == max(labels[rows].sum() / lengths[rows].sum() for rows in drawn)
        # Every step fits micro-batches of that size, one for each process, and one does not fit smaller ones.
        assert all(len(batches.cut(lengths[rows].tolist(), most, world)[0]) == 1 for rows in drawn)
        smaller = [rows for rows in drawn if lengths[rows].max() < most]
        assert len(smaller) < len(drawn) or any(
            len(batches.cut(lengths[rows].tolist(), most - 1, world)[0]) > 1 for rows in smaller
        )


def test_a_row_beyond_the_budget_is_refused_with_the_remedy() -> None:
    with pytest.raises(UsageError) as caught:
        batches.cut([100, 600], 512)
    assert "--tokens-per-micro-batch" in caught.value.hint


def test_joined_rows_restart_positions_and_predict_only_their_own_labels() -> None:
    tokens = from_rows([[1, 10, 11, 2], [1, 20, 2]], [2, 1], eos=2, max_length=9)
    batch = batches.join(tokens, [1, 0], longest=64)
    assert batch.ids.shape == (1, 64)
    assert batch.positions[0, :8].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert batch.bounds.tolist() == [0, 3, 7, 64]
    assert batch.predicting.tolist() == [0, 1, 4, 5]
    assert batch.targets.tolist() == [20, 2, 11, 2]

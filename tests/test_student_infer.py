"""``infer``: rows in, answers out, nothing asked twice; and what fits which card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the student room needs torch")
pytest.importorskip("transformers", reason="the student room needs transformers")

from safetensors import safe_open
from safetensors.numpy import save_file
from student_tiny import tiny_model, write_rows

from selfinstruct.errors import DamagedFile, EnvironmentFault, IdentityError, OutputError, UsageError
from selfinstruct.student.infer import answers, infer_plan, questions
from selfinstruct.student.infer.infer import InferOptions, Outcome, infer
from selfinstruct.student.infer.questions import Question
from selfinstruct.student.memory import CARDS, LLAMA_7B
from selfinstruct.student.models import weights
from selfinstruct.student.models.source import locate

SHORT = InferOptions(max_new_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer(folder: Path, out: Path, rows: list[Question], options: InferOptions = SHORT) -> Outcome:
    return infer(str(folder), rows, out, options)


def test_answers_stand_in_the_order_of_the_rows(folder: Path, tmp_path: Path) -> None:
    rows = questions.read(str(write_rows(tmp_path / "rows.jsonl", 7)))
    outcome = answer(folder, tmp_path / "out.jsonl", rows)
    found = lines(tmp_path / "out.jsonl")
    assert [row["row"] for row in found] == list(range(7))
    assert [row["instruction"] for row in found] == [row.instruction for row in rows]
    assert (outcome.rows, outcome.answered) == (7, 7)
    assert found[0]["reference"] == rows[0].reference
    assert found[0]["generator"] == "tiny"


def test_a_killed_command_goes_on_and_ends_as_an_unbroken_one(folder: Path, tmp_path: Path) -> None:
    rows = questions.read(str(write_rows(tmp_path / "rows.jsonl", 6)))
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    sampled = InferOptions(max_new_tokens=6, temperature=1.0, seed=3)
    answer(folder, whole, rows, sampled)
    content = whole.read_bytes().splitlines(keepends=True)
    broken.write_bytes(content[4] + content[1] + content[0][:20])
    assert answer(folder, broken, rows, sampled).answered == 4
    assert broken.read_bytes() == whole.read_bytes()
    assert answer(folder, broken, rows, sampled).answered == 0


def test_parquet_gathers_beside_and_ends_in_one_file(folder: Path, tmp_path: Path) -> None:
    rows = questions.read(str(write_rows(tmp_path / "rows.jsonl", 5)))
    out = tmp_path / "out.parquet"
    with answers.opened(out, "0", rows) as (file, left):
        file.add(left[0], "said", "tiny", "stop", (1, 2))
    assert not out.exists()
    (tmp_path / "out.parquet.partial.jsonl").unlink()
    answer(folder, out, rows)
    assert not (tmp_path / "out.parquet.partial.jsonl").exists()
    assert [row.instruction for row in questions.read(str(out))] == [row.instruction for row in rows]
    assert answer(folder, out, rows).answered == 0


def test_rows_of_other_settings_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    rows = questions.read(str(write_rows(tmp_path / "rows.jsonl", 2)))
    out = tmp_path / "out.jsonl"
    answer(folder, out, rows)
    with pytest.raises(IdentityError):
        answer(folder, out, rows, InferOptions(max_new_tokens=7))
    answer(folder, out, rows, InferOptions(max_new_tokens=6, batch=1, engine="transformers"))


def test_a_changed_row_is_answered_again(folder: Path, tmp_path: Path) -> None:
    rows = questions.read(str(write_rows(tmp_path / "rows.jsonl", 3)))
    answer(folder, tmp_path / "out.jsonl", rows)
    rows[0], rows[1] = Question(0, rows[0].instruction, rows[0].input, "a better one"), Question(1, "another one")
    assert answer(folder, tmp_path / "out.jsonl", rows).answered == 1
    assert lines(tmp_path / "out.jsonl")[1]["instruction"] == "another one"
    assert lines(tmp_path / "out.jsonl")[0]["reference"] == "a better one"


def test_answers_to_other_questions_are_not_destroyed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    answer(folder, out, [Question(0, "first"), Question(1, "second")])
    before = out.read_bytes()
    with pytest.raises(IdentityError, match="2 answers to rows"):
        answer(folder, out, [Question(0, "quite another")])
    assert out.read_bytes() == before


def test_answers_to_rows_that_are_not_asked_any_more_are_not_destroyed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    rows = questions.read(str(write_rows(tmp_path / "rows.jsonl", 4)))
    answer(folder, out, rows)
    before = out.read_bytes()
    with pytest.raises(IdentityError, match="1 answers to rows"):
        answer(folder, out, rows[:3])
    assert out.read_bytes() == before


@pytest.mark.parametrize("content", ['{"my": "notes"}', "notes", '{"row"', "{", '\n{"row": 1', '{"row": 0}\nnotes'])
def test_a_file_without_a_line_end_is_not_cut_unless_it_is_ours(folder: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    ours = '{"row": '.startswith(content) or content.startswith('{"row": ')
    if ours and "\n" not in content:
        assert answer(folder, out, [Question(0, "hello")]).answered == 1
    else:
        with pytest.raises((DamagedFile, IdentityError)):
            answer(folder, out, [Question(0, "hello")])
        assert out.read_text() == content


@pytest.mark.parametrize(("name", "planted"), [("a.jsonl", ".a.jsonl.tmp"), ("b.parquet", ".b.parquet.tmp"),
                                               ("c.parquet", "c.parquet.partial.jsonl")])  # fmt: skip
def test_a_planted_link_is_not_followed(folder: Path, tmp_path: Path, name: str, planted: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / planted).symlink_to(victim)
    answer(folder, tmp_path / name, [Question(0, "hello")])
    assert victim.read_text() == "precious"
    assert not (tmp_path / name).is_symlink()


def test_a_model_that_was_trained_anew_or_ends_otherwise_is_another(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny", hidden_size=256, intermediate_size=768, num_hidden_layers=3)
    weights_file = model / "model.safetensors"
    assert weights_file.stat().st_size > 5 << 20  # a sample is read
    before, files = locate(str(model)).fingerprint(), locate(str(model)).weights()
    with safe_open(weights_file, framework="np") as opened:
        names = [name for name in opened.keys() if "layers.1.mlp" in name]  # noqa: SIM118
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert len(names) == 3
    for name in names:
        save_file({**tensors, name: tensors[name] + 0.01}, weights_file, metadata={"format": "pt"})
        assert locate(str(model)).weights() != files
    save_file(tensors, weights_file, metadata={"format": "pt"})
    assert locate(str(model)).fingerprint() == before
    settings = model / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": 5}))
    assert locate(str(model)).weights() == files
    assert locate(str(model)).fingerprint() != before


def test_vllm_gets_the_end_tokens_of_the_models_settings(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny")
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, 5]}))
    loaded = weights.load(str(model))
    alone = weights.end_ids(loaded.template, loaded.tokenizer, weights.load_generation_config(loaded.source))
    assert alone == loaded.end_ids >= {2, 5}
    (model / "generation_config.json").unlink()
    assert weights.load_generation_config(loaded.source).eos_token_id == loaded.model.config.eos_token_id


def test_a_prompt_without_room_gets_an_empty_answer(folder: Path, tmp_path: Path) -> None:
    rows = [Question(0, "short"), Question(1, "long " * 300)]
    outcome = answer(folder, tmp_path / "out.jsonl", rows)
    assert outcome.too_long == 1
    assert [row["finish"] for row in lines(tmp_path / "out.jsonl")] == ["length", "too_long"]


def test_a_foreign_file_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text('{"mine": 1}\n')
    with pytest.raises(DamagedFile):
        answer(folder, out, [Question(0, "a")])
    assert out.read_text() == '{"mine": 1}\n'


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    with (
        answers.opened(tmp_path / "out.jsonl", "0", []),
        pytest.raises(OutputError, match="another process"),
        answers.opened(tmp_path / "out.jsonl", "0", []),
    ):
        pass


def test_questions_come_from_csv_json_and_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('instruction,input\n"two\nlines",x\n', encoding="utf-8")
    (tmp_path / "a.json").write_text('[{"prompt": "p", "output": null}]', encoding="utf-8")
    assert questions.read(str(tmp_path / "a.csv")) == [Question(0, "two\nlines", "x")]
    assert questions.read(str(tmp_path / "a.json")) == [Question(0, "p")]


def test_all_bad_rows_are_named_at_once(tmp_path: Path) -> None:
    rows = ['{"instruction": ""}', '{"instruction": "a \\ud83d"}', '{"instruction": "a", "input": 3}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(UsageError) as caught:
        questions.read(str(tmp_path / "a.jsonl"))
    for said in ("jsonl:1: has no instruction", "jsonl:2: holds half a character", "jsonl:3: has an 'input'"):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 7.0},
     {"min_p": 2.0}, {"batch": 0}, {"engine": "x"}],
)  # fmt: skip
def test_settings_out_of_range_are_refused_first(folder: Path, tmp_path: Path, bad: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        answer(folder, tmp_path / "out.jsonl", [Question(0, "a")], InferOptions(**bad))  # type: ignore[arg-type]


def test_vllm_is_not_pretended(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="vLLM cannot run this"):
        answer(folder, tmp_path / "out.jsonl", [Question(0, "a")], InferOptions(engine="vllm"))


def test_7b_does_not_fit_12_gb_in_16_bits_and_does_in_8_and_4() -> None:
    plans = {plan.form: plan for plan in infer_plan.table(LLAMA_7B, columns=768) if plan.memory == CARDS[12]}
    assert plans["bf16"].slots == 0
    assert plans["int8"].slots >= 4
    assert plans["4bit"].slots > plans["int8"].slots
    assert plans["bf16"].weights == 2 * LLAMA_7B.parameters
    assert all(plan.total <= plan.memory for plan in infer_plan.table(LLAMA_7B, columns=768) if plan.slots)

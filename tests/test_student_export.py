"""Merged, exported, read again: the weights stay; pickles are refused; llama.cpp gives the same greedy text."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the student room needs torch")
pytest.importorskip("transformers", reason="the student room needs transformers")
gguf = pytest.importorskip("gguf", reason="export needs gguf")

from student_tiny import spm_tokenizer, tiny_config, tiny_model, tiny_tokenizer  # noqa: E402

from selfinstruct.errors import ModelFileError, OutputError, RunLocked, UsageError  # noqa: E402
from selfinstruct.student.dialogue import encode_dialogue  # noqa: E402
from selfinstruct.student.models.export_gguf import _interleave, export  # noqa: E402
from selfinstruct.student.models.gguf_config import llama3_frequencies  # noqa: E402
from selfinstruct.student.models.gguf_words import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, read_words  # noqa: E402
from selfinstruct.student.models.merge import merge  # noqa: E402
from selfinstruct.student.models.model_folder import work_folder  # noqa: E402
from selfinstruct.student.models.source import locate  # noqa: E402
from selfinstruct.student.models.weights import load, load_config, load_weights  # noqa: E402
from selfinstruct.student.prompt import ALPACA_LORA, Template, load_template, save_template  # noqa: E402

# peft asks transformers for a name that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
IDS = [[1, 5, 9, 200, 31, 7, 7, 80]]


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model.float()(torch.tensor(IDS)).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model; its tokenizer has one merge, because none at all is something that GGUF readers do not expect."""
    made = tiny_model(tmp_path / "tiny", initializer_range=0.2)
    words = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))
    words["model"]["vocab"]["re"] = len(words["model"]["vocab"])
    words["model"]["merges"] = [["r", "e"]]
    (made / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    return made


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """A LoRA adapter with weights that change the answer, as a finished run leaves it."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(load_weights(locate(str(folder))), config)
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(tmp_path / "run" / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "run" / "adapter")
    save_template(ALPACA_LORA, tmp_path / "run" / "adapter")
    return tmp_path / "run"


def test_a_merged_run_answers_as_base_with_adapter(folder: Path, adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    base = load_weights(locate(str(folder)))
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(adapter / "adapter")))
    out = merge(str(adapter), tmp_path / "merged", dtype="fp32")
    torch.testing.assert_close(logits(load_weights(locate(str(out)))), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-3)
    assert load_template(out) == ALPACA_LORA
    assert load(str(adapter)).template == ALPACA_LORA
    assert not list(out.glob("adapter*"))


@pytest.mark.parametrize("words", ["bytes", "sentencepiece"])
def test_other_programs_get_the_template_of_the_training(words: str, folder: Path, tmp_path: Path) -> None:
    """The chat template that is written says what our own dialogue says: transformers, llama.cpp and vLLM read it."""
    tokenizer = spm_tokenizer(tmp_path / "words") if words == "sentencepiece" else tiny_tokenizer()
    turns = [{"role": "user", "content": 'Say "a" {{ b }}\n\\n'}, {"role": "assistant", "content": "a"},
             {"role": "user", "content": "And $before?"}]  # fmt: skip
    for messages in (turns[:1], turns, [{"role": "system", "content": "Be brief."}, *turns]):
        tokenizer.chat_template = ALPACA_LORA.jinja(tokenizer)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text.endswith("And $before?\n\n### Response:\n" if len(messages) > 1 else "\n\n### Response:\n")
        assert text.count("Be brief.\n\nSay") == (1 if len(messages) == 4 else 0)
        ours = encode_dialogue(ALPACA_LORA, tokenizer, messages)
        theirs = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ours == theirs or len(messages) > 1
        # SentencePiece puts a space before each text that it cuts by itself.
        assert tokenizer.decode(ours).replace(" ", "") == tokenizer.decode(theirs).replace(" ", "")


def test_an_exported_student_brings_its_own_chat_template(adapter: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'the one of the base' }}"
    tokenizer.save_pretrained(adapter / "adapter")
    merged = merge(str(adapter), tmp_path / "merged")
    wanted = ALPACA_LORA.jinja(tokenizer)
    assert load(str(merged)).tokenizer.chat_template == wanted
    field = gguf.GGUFReader(export(str(adapter), tmp_path / "student.gguf")).get_field("tokenizer.chat_template")
    assert field is not None
    assert field.contents() == wanted


def test_merge_does_not_write_over_anything(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError):
        merge(str(folder), tmp_path / "out")


@pytest.mark.parametrize(("kind", "gap"), [("f16", 2e-3), ("q8_0", 0.05)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_exported_file_read_again_gives_the_same_logits(folder: Path, tmp_path: Path, kind: str, gap: float) -> None:
    out = export(str(folder), tmp_path / "out.gguf", kind)
    expected = logits(load_weights(locate(str(folder))))
    seen = logits(load_weights(locate(str(out)), dtype="fp32"))
    assert float((seen - expected).abs().max() / expected.abs().max()) < gap
    fields = gguf.GGUFReader(out).fields
    assert fields["llama.attention.head_count_kv"].contents() == 2
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True


def test_a_model_read_from_gguf_can_be_saved_as_safetensors(folder: Path, tmp_path: Path) -> None:
    out = export(str(folder), tmp_path / "out.gguf", "f16")
    made = merge(str(out), tmp_path / "back", dtype="fp32")
    expected = logits(load_weights(locate(str(folder))))
    assert float((logits(load_weights(locate(str(made)))) - expected).abs().max()) < 2e-2


def test_export_refuses_what_it_would_get_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown kind"):
        export(str(folder), tmp_path / "a.gguf", "q4")
    (tmp_path / "there.gguf").write_text("x")
    with pytest.raises(OutputError):
        export(str(folder), tmp_path / "there.gguf", "f16")
    found = json.loads((folder / "tokenizer.json").read_text())
    found["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(UsageError, match="splits texts"):
        export(str(folder), tmp_path / "a.gguf", "f16")
    (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), "model_type": "gpt2"})
    )
    with pytest.raises(UsageError, match="Llama family"):
        export(str(folder), tmp_path / "a.gguf", "f16")
    assert not (tmp_path / "a.gguf").exists()


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


@pytest.mark.parametrize(
    ("fields", "said", "helps"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'", "convert_hf_to_gguf"),
        ({"model_type": "mistral", "sliding_window": 16}, "looks back 16 tokens only", "write null there"),
        ({"model_type": "qwen2"}, "Llama family, this is 'qwen2'", "convert_hf_to_gguf"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "positions of type 'yarn'", "convert_hf_to_gguf"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(
    fields: dict[str, Any], said: str, helps: str, folder: Path, tmp_path: Path
) -> None:
    change(folder / "config.json", **fields)
    with pytest.raises(UsageError, match=said) as caught:
        export(str(folder), tmp_path / "a.gguf")
    assert helps in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_swish_is_silu_by_another_name(folder: Path, tmp_path: Path) -> None:
    change(folder / "config.json", hidden_act="swish")
    assert export(str(folder), tmp_path / "a.gguf").is_file()


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pre_tokenizer": {**BYTES, "add_prefix_space": True}}, "puts a space before each text"),
        ({"normalizer": {"type": "NFKC"}}, r"changes texts .* \(normalizer NFKC\)"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}}, "NFC, Strip"),
        ({"model": {"ignore_merges": True}}, "takes whole words"),
        ({"model": {"continuing_subword_prefix": "##"}}, "merges with continuing_subword_prefix"),
    ],
)
def test_a_byte_tokenizer_that_llama_cpp_reads_otherwise_is_refused(
    fields: dict[str, Any], said: str, folder: Path
) -> None:
    path = folder / "tokenizer.json"
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    change(path, **{**fields, "model": {**model, **fields.get("model", {})}})
    with pytest.raises(UsageError, match=said) as caught:
        read_words(folder, 320)
    assert "convert_hf_to_gguf" in caught.value.hint


def test_a_normalizer_without_steps_is_none(folder: Path) -> None:
    change(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": []})
    assert read_words(folder, 320).pre == "gpt-2"


PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
ALIKE = [  # (normalizer, pre-tokenizer, whether a space is put in front)
    ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None, True),
    (REPLACE, None, False),
    (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}, False),
]


@pytest.mark.parametrize(("normalizer", "cut", "prefix"), ALIKE)
def test_sentencepiece_spaces_that_were_compared_are_taken(
    normalizer: Any, cut: Any, prefix: bool, tmp_path: Path
) -> None:
    spm_tokenizer(tmp_path)
    change(tmp_path / "tokenizer.json", normalizer=normalizer, pre_tokenizer=cut)
    words = read_words(tmp_path, 300)
    assert (words.space_prefix, words.remark) == (prefix, "")


@pytest.mark.parametrize(
    ("normalizer", "cut"),
    [
        (PREPEND, None),
        (None, None),
        ({"type": "Sequence", "normalizers": [REPLACE, {"type": "NFKC"}]}, None),
        ({**REPLACE, "content": "_"}, None),
        (REPLACE, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}),
        (None, {"type": "Whitespace"}),
    ],
)
def test_sentencepiece_spaces_that_llama_cpp_reads_otherwise_are_refused(
    normalizer: Any, cut: Any, tmp_path: Path
) -> None:
    spm_tokenizer(tmp_path)
    change(tmp_path / "tokenizer.json", normalizer=normalizer, pre_tokenizer=cut)
    with pytest.raises(UsageError, match=r"spaces? .* llama\.cpp would read texts otherwise"):
        read_words(tmp_path, 300)


def test_a_student_with_a_text_template_keeps_the_tokenizer_that_transformers_saves(tmp_path: Path) -> None:
    """transformers 5 saves LLaMA's as Metaspace "first": the prompts of the template are read alike."""
    spm_tokenizer(tmp_path)
    cut = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    change(tmp_path / "tokenizer.json", normalizer=None, pre_tokenizer=cut)
    save_template(ALPACA_LORA, tmp_path)
    words = read_words(tmp_path, 300)
    assert (words.space_prefix, "begins with a space" in words.remark) == (True, True)
    save_template(Template("own", "text", "{instruction}{input}", " {instruction}"), tmp_path)
    with pytest.raises(UsageError, match="some texts only"):
        read_words(tmp_path, 300)


def test_what_a_killed_export_left_is_removed_and_a_link_there_is_not_followed(folder: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.gguf.tmp"
    left.mkdir()
    (left / "part.gguf").write_bytes(b"13 GB")
    export(str(folder), tmp_path / "out.gguf")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "part.gguf").write_bytes(b"precious")
    (tmp_path / ".other.gguf.tmp").symlink_to(mine)
    export(str(folder), tmp_path / "other.gguf")
    (tmp_path / ".merged.tmp").symlink_to(mine)
    merge(str(folder), tmp_path / "merged")
    assert (mine / "part.gguf").read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "mine", "other.gguf", "out.gguf", "tiny"]


def test_two_exports_do_not_write_to_one_file(folder: Path, tmp_path: Path) -> None:
    with work_folder(tmp_path / "out.gguf") as work:
        for write in (export, merge):
            with pytest.raises(RunLocked, match="another process"):
                write(str(folder), tmp_path / "out.gguf")
        assert work.is_dir()
    assert not work.exists()


STOPPED = """
import sys, time
from selfinstruct.cli.app import app
from selfinstruct.student.models import export_gguf, model_folder
def slow(*_, **__):
    print("begun", flush=True)
    time.sleep(60)
export_gguf.sync = model_folder.save_template = slow  # by then the weights are written
app(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_signal_leaves_nothing_half_written(command: str, number: int, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--gguf", "f16"] if command == "export" else []
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, command, str(folder), "-o", str(out), *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    assert [path.name for path in tmp_path.glob(".*")] == [".out.tmp"]
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, "begin again with" in said, "Traceback" in said) == (128 + number, True, False)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_merge_does_not_take_the_folder_it_runs_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in (".", "../here", str(here)):
        with pytest.raises(OutputError, match="the folder you are in"):
            merge(str(folder), Path(name))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "tiny")
    assert merge(str(folder), Path("../empty")).is_dir()
    assert (tmp_path / "empty" / "config.json").is_file()


def test_an_export_makes_the_folder_of_its_file(folder: Path, tmp_path: Path) -> None:
    assert export(str(folder), tmp_path / "new" / "out.gguf").is_file()
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelFileError, match="is missing or damaged"):
        export(str(folder), tmp_path / "other.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "tiny"]


def test_a_dtype_that_is_none_is_refused_before_the_weights_are_read(folder: Path, tmp_path: Path) -> None:
    for dtype in ("auto", "int8"):
        with pytest.raises(UsageError, match="unknown dtype"):
            merge(str(folder), tmp_path / "out", dtype=dtype)


def test_a_run_that_has_not_ended_is_said_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ModelFileError, match="has not ended yet"):
        locate(str(tmp_path))


def test_pickles_are_refused_by_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="pickles"):
        load(str(folder))


@pytest.mark.parametrize("named", ["evil.bin", "../outside.safetensors", "/etc/hostname", "missing.safetensors"])
def test_an_index_names_safetensors_of_its_own_folder_only(named: str, folder: Path) -> None:
    whole = folder / "model.safetensors"
    (folder.parent / "outside.safetensors").write_bytes(whole.read_bytes())
    whole.rename(folder / "decoy.safetensors")
    (folder / "evil.bin").write_bytes(b"\x80\x04.")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": named}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match=r"names|missing"):
        load(str(folder))


def test_a_pickled_adapter_is_refused_whatever_lies_beside_it(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    (adapter / "decoy.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ModelFileError, match="pickles"):
        locate(str(adapter))


def test_an_adapter_on_an_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(run)}))
    (run / "adapter" / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ModelFileError, match="is itself an adapter"):
        locate(str(run))


@pytest.mark.parametrize(
    "content", ["[]", "[" * 100_000, '{"model_type": "llama", "hidden_size": "x"}', "{", "null"], ids=len
)
def test_a_configuration_that_makes_no_sense_is_told_in_a_line(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelFileError):
        load_config(locate(str(folder)))


def test_a_models_own_code_is_never_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.X", "AutoModelForCausalLM": "code.X"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    for read in (load_config, load_weights):
        with pytest.raises(ModelFileError, match="Python code of its own, which is never run"):
            read(locate(str(folder)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where.gguf", "a/b/c"])
def test_a_model_that_is_not_there_is_said_to_be_missing(name: str) -> None:
    with pytest.raises(ModelFileError):
        locate(name)


def test_heads_turn_in_pairs() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert _interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama3_positions_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = tiny_config(hidden_size=512, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500000.0 ** (np.arange(0, 128, 2) / 128)
    factors = llama3_frequencies(config.to_dict())
    assert factors is not None
    np.testing.assert_allclose(plain / factors, expected.numpy(), rtol=1e-5)


def test_sentencepiece_words_keep_their_order_of_merges(tmp_path: Path) -> None:
    spm_tokenizer(tmp_path)
    words = read_words(tmp_path, 300)
    assert (words.kind, words.space_prefix, len(words.pieces)) == ("llama", True, 300)
    assert [words.kinds[number] for number in (0, 1, 3, 259, 299)] == [UNKNOWN, CONTROL, BYTE, NORMAL, UNUSED]
    score = dict(zip(words.pieces, words.scores, strict=True))
    assert score["re"] > score["red"] > score["▁red"] > score["blu"] > score["b"]


def ask_llama_cpp(url: str, body: dict[str, Any], path: str = "/completions") -> Any:
    base = url if path == "/completions" else url.removesuffix("/v1")
    request = urllib.request.Request(base + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


@pytest.mark.slow
def test_llama_cpp_cuts_texts_as_the_sentencepiece_tokenizer_does(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="serving GGUF needs xllamacpp")
    from selfinstruct.servers.llama_cpp import LlamaCppServer

    folder = tiny_model(tmp_path / "tiny")
    tokenizer = spm_tokenizer(folder)
    out = export(str(folder), tmp_path / "out.gguf", "f16")
    with LlamaCppServer(out, slots=1, context_per_slot=256) as server:
        for text in ("red blue", "  blue redé", "x", "re d\nblu e"):
            seen = ask_llama_cpp(server.url, {"content": text, "add_special": True}, "/tokenize")["tokens"]
            assert seen == tokenizer(text)["input_ids"], text


@pytest.mark.slow
@pytest.mark.parametrize(("normalizer", "cut", "_prefix"), ALIKE)
def test_llama_cpp_marks_spaces_as_each_tokenizer_that_is_taken(
    normalizer: Any, cut: Any, _prefix: bool, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp", reason="serving GGUF needs xllamacpp")
    from transformers import AutoTokenizer

    from selfinstruct.servers.llama_cpp import LlamaCppServer

    folder = tiny_model(tmp_path / "tiny")
    spm_tokenizer(folder)
    change(folder / "tokenizer.json", normalizer=normalizer, pre_tokenizer=cut)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    out = export(str(folder), tmp_path / "out.gguf", "f16")
    with LlamaCppServer(out, slots=1, context_per_slot=256) as server:
        for text in ("red blue", "  blue redé", " red", "red </s> blue</s>red", "", "red  blue ", "▁red", "\tred"):
            asked = {"content": text, "add_special": True, "parse_special": True}
            assert ask_llama_cpp(server.url, asked, "/tokenize")["tokens"] == tokenizer(text)["input_ids"], text


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["first", "always"])
def test_llama_cpp_reads_the_prompts_of_a_text_template_as_we_do(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="serving GGUF needs xllamacpp")
    from selfinstruct.servers.llama_cpp import LlamaCppServer

    folder = tiny_model(tmp_path / "tiny")
    spm_tokenizer(folder)
    cut = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    change(folder / "tokenizer.json", normalizer=None, pre_tokenizer=cut)
    save_template(ALPACA_LORA, folder)
    tokenizer = load(str(folder)).tokenizer
    out = export(str(folder), tmp_path / "out.gguf", "f16")
    with LlamaCppServer(out, slots=1, context_per_slot=1024) as server:
        for said in ("red blue", "  blue", "\nred ▁"):
            messages = [{"role": "user", "content": said}]
            text = ask_llama_cpp(server.url, {"messages": messages}, "/apply-template")["prompt"]
            asked = {"content": text.removeprefix("<s>"), "add_special": True, "parse_special": True}
            seen = ask_llama_cpp(server.url, asked, "/tokenize")["tokens"]
            assert seen == encode_dialogue(ALPACA_LORA, tokenizer, messages), said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_exported_smollm2_says_in_llama_cpp_what_it_says_in_transformers(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="serving GGUF needs xllamacpp")
    from selfinstruct.servers import models
    from selfinstruct.servers.llama_cpp import LlamaCppServer

    try:
        models.find("smollm2")
    except ModelFileError:
        pytest.skip("the embedded model is not on this machine: selfinstruct model pull smollm2")
    folder = merge("smollm2", tmp_path / "smollm2", dtype="fp32")
    loaded = load(str(folder))
    texts = ["The capital of France is", "Write a list of 3 fruits:\n1.", "In 1984, 127 people"]
    expected = []
    for text in texts:
        ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            made = loaded.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=2
            )
        expected.append(loaded.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    for kind in ("f16", "q8_0"):
        out = export(str(folder), tmp_path / f"{kind}.gguf", kind)
        with LlamaCppServer(out, slots=1, context_per_slot=256) as server:
            seen = [
                ask_llama_cpp(server.url, {"prompt": text, "max_tokens": 16, "temperature": 0})["choices"][0]["text"]
                for text in texts
            ]
        assert seen == expected, kind

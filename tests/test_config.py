from __future__ import annotations

import re
from pathlib import Path

import pytest

from selfinstruct import config
from selfinstruct.config import IDENTITY, RUNTIME, RunConfig
from selfinstruct.errors import UsageError
from selfinstruct.languages import LANGUAGES
from selfinstruct.novelty.tokens import TOKENIZERS


def load(tmp_path: Path, text: str, env: dict[str, str] | None = None, **flags: object) -> RunConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return config.load(path, env or {}, flags)


def test_every_field_is_identity_or_runtime() -> None:
    fields = set(RunConfig.model_fields)
    unsorted = fields - IDENTITY - RUNTIME
    assert not unsorted, (
        f"{unsorted}: would another value give other rows? then add it to IDENTITY (a run keeps it for life), "
        "else to RUNTIME (it may change on resume)"
    )
    assert not IDENTITY & RUNTIME
    assert not (IDENTITY | RUNTIME) - fields


def test_choices_agree_with_the_rooms_that_serve_them() -> None:
    assert set(RunConfig.model_fields["language"].annotation.__args__) == set(LANGUAGES)
    for code in LANGUAGES:
        assert RunConfig(language=code).resolve().tokenizer in TOKENIZERS


def test_flags_beat_environment_beats_file_beats_defaults(tmp_path: Path) -> None:
    found = load(tmp_path, "num: 1\nseed: 1\nshots: 1\n", {"SELFINSTRUCT_NUM": "2", "SELFINSTRUCT_SEED": "2"}, num=3)
    assert (found.num, found.seed, found.shots, found.tasks) == (3, 2, 1, 20)


def test_every_wrong_key_is_named_at_once_with_the_likely_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, "shotz: 3\nnum: many\ntemperature: 9\n")
    for part in ("shotz", "did you mean 'shots'", "num", "temperature", "c.yaml"):
        assert part in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x\n",
        "- 1\n",
        "a: [\n",
        "\x00",
        "!!python/object/apply:os.system ['true']\n",
        "{" * 5000,
        "1: 2\n",
    ],
)
def test_broken_or_dangerous_yaml_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=re.escape("c.yaml")):
        load(tmp_path, text)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x/v1", "http://user:pw@host/v1", "http://h/v1?key=abc", "file:///etc/passwd"]
)
def test_base_urls_that_are_none_or_hold_secrets_are_refused_without_showing_them(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        config.load(None, {}, {"base_url": url})
    assert "user:pw" not in str(caught.value)


def test_several_endpoints_are_given_with_commas() -> None:
    found = config.load(None, {}, {"base_url": "http://a/v1/, http://b/v1"})
    assert found.base_url == ("http://a/v1", "http://b/v1")


@pytest.mark.parametrize(
    ("teacher", "base_url", "kind"),
    [
        ("local:smollm2", (), "local"),
        ("gpt-5-mini", (), "openai"),
        ("gpt-5-mini", ("http://x/v1",), "http"),
        ("anything", ("http://x/v1",), "http"),
        ("scripted", (), "scripted"),
    ],
)
def test_the_teachers_name_says_where_it_runs(teacher: str, base_url: tuple[str, ...], kind: str) -> None:
    assert RunConfig(teacher=teacher, base_url=base_url).teacher_kind == kind


def test_a_name_that_says_nothing_needs_an_address() -> None:
    with pytest.raises(UsageError) as caught:
        _ = RunConfig(teacher="my-model").teacher_kind
    assert "--base-url" in caught.value.hint


def test_the_default_teacher_costs_nothing() -> None:
    assert RunConfig().teacher_kind == "local"


def test_settings_survive_their_file(tmp_path: Path) -> None:
    original = RunConfig(teacher="x", base_url=("http://h/v1",), num=7).resolve()
    path = tmp_path / "config.yaml"
    config.write_config(original, path)
    assert config.load_file(path) == original


def test_where_a_local_model_lies_is_not_its_identity() -> None:
    identities = [
        RunConfig(teacher=f"local:{place}/m.gguf")
        .resolve()
        .identity(seeds_sha256="s", evaluation_sha256="", method_fingerprint="f")
        for place in ("/a", "/b/c")
    ]
    assert identities[0] == identities[1]


def test_the_schema_describes_every_field() -> None:
    schema = RunConfig.model_json_schema()
    assert set(schema["properties"]) == IDENTITY | RUNTIME
    assert schema["additionalProperties"] is False

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

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


def run_json(run: Any, *arguments: object) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


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


REFUSED_FILES = {
    "an alias": ("a: &x [1]\nb: *x\n", 2),
    "a list": ("- 1\n", 1),
    "broken": ("num: 5\na: [\n", 3),
    "a NUL": ("\x00", 1),
    "code": ("!!python/object/apply:os.system ['true']\n", 1),
    "brackets": ("{" * 5000, 1),
    "a number as name": ("1: 2\n", 1),
    "a list as name": ("? [a]\n: b\n", 1),
    "base 60": ("seed: " + "1:" * 400 + "1\n", 1),
    "base 60, a fraction": ("temperature: " + "1:" * 400 + "1.5\n", 1),
    "a huge number": ("\nseed: " + "9" * 60_000 + "\n", 2),
    "a huge number, base 16": ("seed: 0x" + "f" * 60_000 + "\n", 1),
    "a huge number, base 8": ("seed: 0" + "7" * 60_000 + "\n", 1),
    "a huge number, base 2": ("seed: 0b" + "1" * 60_000 + "\n", 1),
    "an empty int": ("num: !!int ''\n", 1),
    "an empty float": ("num: 1\ntemperature: !!float ''\n", 2),
    "no bool": ("profile: !!bool zzz\n", 1),
    "no date": ("teacher: !!timestamp abc\n", 1),
    "no character": ('teacher: "\\UFFFFFFFF"\n', 1),
    "half a character": ('num: 3\nteacher: "\\ud800"\n', 2),
    "a NUL in quotes": ('seeds: "a\\0b"\n', 1),
    "lists in lists": ("num: 5\nseeds:\n " + "- " * 30_000 + "x\n", 3),
    "names in names": ("".join(" " * depth + "a:\n" for depth in range(300)), 2),
    "a name twice": ("num: 5\nseed: 1\nnum: 5\n", 3),
    "many names": ("".join(f"k{n}: v\n" for n in range(6000)), 500),
    "many tags": ("".join(f"k{n}: !t v\n" for n in range(5000)), 1),
    "a long list": ("decontaminate:\n" + "- b\n" * 16_000, 999),
    "two documents": ("num: 5\n---\nnum: 6\n", 2),
    "a merge": ("<<: {teacher: x}\n", 1),
    "a mapping": ("base_url: {a: b}\n", 1),
}


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_a_file_that_is_no_list_of_settings_is_refused_soon_with_its_line(name: str, tmp_path: Path) -> None:
    text, line = REFUSED_FILES[name]
    started = time.monotonic()
    with pytest.raises(UsageError, match=re.escape(f"c.yaml:{line}: ")) as caught:
        load(tmp_path, text)
    assert time.monotonic() - started < 2
    assert len(str(caught.value)) < 3000


def test_a_file_larger_than_any_settings_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="larger than 64 KiB"):
        load(tmp_path, "# " + "x" * 65_536)


def test_what_a_file_says_is_read_as_it_is_written(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        "\ufeff---\nteacher: 2020-01-01\nbase_url: http://h/v1, http://i/v1\nprofile: yes\nform: null\n"
        "temperature: 5e-1\nnum: 010\ndecontaminate:\n- a b\n- 'c'\nmax_requests: ~\n",
    )
    assert (found.teacher, found.base_url) == ("2020-01-01", ("http://h/v1", "http://i/v1"))
    assert (found.profile, found.form, found.temperature, found.num) == (True, None, 0.5, 10)
    assert (found.decontaminate, found.max_requests) == (("a b", "c"), None)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://x/v1",
        "http://user:pw@host/v1",
        "http://h/v1?key=abc",
        "file:///etc/passwd",
        "user:pw@host:80/v1",
        "http://u:user:pw@a@b/v1",
        "http://h/v1#user:pw",
        "http://h:99999/v1",
        "http://h:abc/v1",
        "http://h:0/v1",
        "http://a..b/v1",
        f"http://{'a' * 64}.example/v1",
        "http://[::1/v1",
        "http://a b/v1",
        "http://h/" + "v" * 2000,
        "http://m\u00e1quina.example/v1",
    ],
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


def test_what_nobody_gave_still_follows_the_teacher_in_the_file_that_config_show_writes(
    run: Any, tmp_path: Path
) -> None:
    shown = run("config", "show", "--set", "temperature=0.7", "--set", "num=52000", "--set", "decontaminate=a,b")
    assert shown.returncode == 0, shown.stderr
    assert "# form: short  # chosen" in shown.stdout
    file = tmp_path / "alpaca.yaml"
    file.write_text(shown.stdout)
    found = config.load_file(file)
    assert (found.temperature, found.num, found.decontaminate) == (0.7, 52_000, ("a", "b"))
    assert found.model_fields_set == {"temperature", "num", "decontaminate"}
    again = run("config", "show", "-c", file, "--set", "teacher=gpt-5-mini").stdout
    for line in (
        "teacher: gpt-5-mini",
        "# form: text  # chosen",
        "# api: chat  # chosen",
        "# concurrency: 32  # chosen",
    ):
        assert line in again.splitlines()
    for text in ("", "form: null\nmax_requests: null\n"):
        file.write_text(text)
        assert config.load(None, {}, run_json(run, "config", "show", "-c", file)) == RunConfig()
        file.write_text(run("config", "show", "-c", file).stdout)
        assert config.load_file(file) == RunConfig()


def test_a_file_that_config_show_wrote_serves_every_teacher(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "any.yaml"
    file.write_text(run("config", "show", "--set", "num=5").stdout)
    ended = run("generate", tmp_path / "out", "-c", file, "--teacher", "gpt-5-mini", "--dry-run", "--json")
    settings = json.loads(ended.stdout)["settings"]
    assert (settings["form"], settings["api"], settings["max_new_tokens"], settings["num"]) == ("text", "chat", 4000, 5)


@pytest.mark.parametrize(
    ("text", "flags", "endpoint"),
    [
        ("num: 5\n", ("--teacher", "gpt-5-mini"), ["http://here/v1"]),
        ("teacher: my-model\n", (), ["http://here/v1"]),
        ("teacher: my-model\nbase_url: []\n", (), ["http://here/v1"]),
        ("teacher: my-model\nbase_url: http://there/v1\n", (), ["http://there/v1"]),
        ("base_url: http://there/v1\n", ("--teacher", "gpt-5-mini"), ["http://there/v1"]),
        ("teacher: my-model\n", ("--base-url", "http://flag/v1"), ["http://flag/v1"]),
        ("teacher: local:smollm2\n", (), []),
        ("num: 5\n", (), []),
    ],
)
def test_openai_base_url_counts_wherever_a_remote_teacher_has_no_endpoint(
    text: str, flags: tuple[str, ...], endpoint: list[str], run: Any, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    start = ("generate", tmp_path / "out", "-c", file, *flags, "--dry-run", "--json")
    ended = run(*start, OPENAI_BASE_URL="http://here/v1")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["settings"]["base_url"] == endpoint


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

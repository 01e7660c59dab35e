"""Typed settings of a run. Every field is identity (it changes the rows) or runtime (it does not); see IDENTITY.

Order of precedence: defaults < config file (YAML) < ``SELFINSTRUCT_<FIELD>`` variables < flags.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from selfinstruct import config_file, durable
from selfinstruct.errors import OutputError, UsageError

DEFAULT_TEACHER = "local:smollm2"
OPENAI_URL = "https://api.openai.com/v1"
MAX_SHOWN, MAX_PROBLEMS_SHOWN = 80, 20  # characters of a wrong value; wrong settings
MAX_URL = 2000

# Identity: another value would give other rows, so a run keeps it for life and resuming with another is refused.
IDENTITY = frozenset(
    "method language teacher form api shots tasks temperature top_p min_p max_new_tokens threshold tokenizer seed "
    "pool_lag validation secrets".split()
)
# Runtime: how, where and how long the same rows are made. (What seeds and evaluation sets hold is identity: hashes.)
RUNTIME = frozenset(
    "seeds decontaminate num base_url api_key_env concurrency timeout patience max_requests max_tokens max_minutes "
    "min_acceptance acceptance_window allow_plain_http profile".split()
)


def _as_list(value: object) -> object:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


class RunConfig(BaseModel):
    """The settings of one run. ``None`` means: chosen by ``resolve`` (teacher, form and language decide)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["alpaca"] = Field("alpaca", description="how to ask for tasks and read replies")
    language: Literal["en", "pt"] = Field("en", description="language of the generated tasks")
    teacher: str = Field(DEFAULT_TEACHER, min_length=1, max_length=300, description="model that writes the tasks")
    form: Literal["text", "schema", "short"] | None = Field(None, description="prompt form; null: by the teacher")
    api: Literal["chat", "completions"] | None = Field(
        None, description="chat, or raw completions; null: by the teacher"
    )
    shots: int = Field(3, ge=0, le=50, description="seed tasks shown in a prompt")
    tasks: int = Field(20, ge=1, le=100, description="tasks asked for in a request")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, lt=1, description="for servers that have it")
    max_new_tokens: int | None = Field(
        None, ge=1, le=1_000_000, description="token limit of a reply; null: by form and tasks"
    )
    threshold: float = Field(0.7, gt=0, le=1, description="a task is new when its ROUGE-L is not above this")
    tokenizer: Literal["rouge", "unicode"] | None = Field(None, description="words for ROUGE-L; null: by the language")
    seed: int = Field(42, ge=0, lt=2**63, description="random seed of the prompts")
    pool_lag: int = Field(512, ge=1, le=100_000, description="requests a prompt lags behind the pool")
    validation: float = Field(0.02, ge=0, le=0.5, description="share of the rows in the validation split")
    secrets: Literal["flag", "mask", "drop"] = Field("flag", description="what to do with secret or personal text")

    seeds: str | None = Field(None, description="seed file (JSON lines); default: those that ship")
    decontaminate: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        (), description="evaluation sets whose tasks are kept out"
    )
    num: int = Field(100, ge=1, le=100_000_000, description="rows to reach")
    base_url: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        (), description="endpoint(s) of the teacher"
    )
    api_key_env: str = Field("OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="variable with the key")
    concurrency: int | None = Field(None, ge=1, le=4096, description="requests in flight; null: by the teacher")
    timeout: float = Field(300.0, gt=0, le=86_400, description="seconds for one attempt, all in all")
    patience: float = Field(900.0, ge=0, le=604_800, description="seconds to keep retrying one request")
    max_requests: int | None = Field(None, ge=1, description="stop after this many requests of this command")
    max_tokens: int | None = Field(None, ge=1, description="stop after this many tokens (in + out) of this command")
    max_minutes: float | None = Field(None, gt=0, description="stop after this time")
    min_acceptance: float = Field(0.01, ge=0, le=1, description="stop when fewer of the last tasks are accepted")
    acceptance_window: int = Field(100, ge=1, le=100_000, description="requests that min_acceptance looks back")
    profile: bool = Field(False, description="publish how near each row is to the others")
    allow_plain_http: bool = Field(False, description="allow a key over http to another host")

    @field_validator("base_url")
    @classmethod
    def _check_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if wrong := _url_problem(url):
                raise ValueError(wrong)
        return tuple(url.rstrip("/") for url in urls)

    @property
    def teacher_kind(self) -> Literal["local", "scripted", "openai", "http"]:
        """Which backend the teacher's name asks for; UsageError when it says none."""
        kind, _, rest = self.teacher.partition(":")
        if kind == "local" and rest:
            return "local"
        if kind == "scripted":
            return "scripted"
        if self.base_url:
            return "http"
        if self.teacher.startswith(("gpt-", "chatgpt-", "o1", "o3", "o4")):
            return "openai"
        raise UsageError(
            f"cannot tell where the teacher {self.teacher!r} runs",
            hint="add --base-url URL for a server, or name gpt-... (OpenAI), local:smollm2, local:/path/model.gguf",
        )

    def resolve(self) -> RunConfig:
        """The same settings with every ``None`` filled in, as the run will use and record them.

        ``model_fields_set`` stays what somebody gave.
        """
        kind = self.teacher_kind
        if kind == "local" and self.base_url:
            raise UsageError(
                "--base-url was given, and the teacher is a local model",
                hint="name the model that the server serves: --teacher NAME",
            )
        form = self.form or ("short" if kind == "local" else "text")
        api = self.api or ("completions" if kind == "local" else "chat")
        chosen = {
            "form": form,
            "api": api,
            "min_p": 0.05 if self.min_p is None and kind == "local" else self.min_p,
            "max_new_tokens": self.max_new_tokens or (256 if form == "short" else 200 * self.tasks),
            "tokenizer": self.tokenizer or ("rouge" if self.language == "en" else "unicode"),
            "concurrency": self.concurrency or (8 if kind == "local" else 32),
        }
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        return RunConfig.model_construct(_fields_set=given, **{**dict(self), **chosen})

    def identity(self, *, seeds_sha256: str, evaluation_sha256: str, method_fingerprint: str) -> dict[str, Any]:
        """What decides the rows, as plain values: recorded when the run starts and compared when it is resumed."""
        fields = {name: getattr(self, name) for name in sorted(IDENTITY)}
        if self.teacher_kind == "local":
            fields["teacher"] = "local:" + self.teacher.partition(":")[2].replace("\\", "/").rsplit("/", 1)[-1]
        return {
            **fields,
            "seeds_sha256": seeds_sha256,
            "evaluation_sha256": evaluation_sha256,
            "method_fingerprint": method_fingerprint,
        }

    def to_yaml(self) -> str:
        """The settings as a config file; no secret can be in it."""
        return as_yaml(self.model_dump(mode="json"))

    def to_given(self) -> dict[str, Any]:
        """Every setting as plain values: what nobody gave as it comes, ``None`` where ``resolve`` chooses."""
        return RunConfig.model_validate({}).model_dump(mode="json") | self.model_dump(
            mode="json", include=self.model_fields_set
        )

    def to_given_yaml(self) -> str:
        """What somebody gave as a config file, and the other settings as comments: they still follow the teacher."""
        values = self.model_dump(mode="json")
        given = {name: value for name, value in values.items() if name in self.model_fields_set}
        lines = ['# Not given. What is "chosen" follows the teacher, the form or the language of the run:']
        for name in (name for name in values if name not in given):
            is_chosen = RunConfig.model_fields[name].default is None and values[name] is not None
            lines.append(f"# {as_yaml({name: values[name]}).rstrip()}{'  # chosen' if is_chosen else ''}")
        return (as_yaml(given) if given else "") + "\n".join(lines) + "\n"


def host_of(url: str) -> str:
    """The host of a URL; "" where its host or port is none that can be connected to."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:  # its text repeats the URL
        return ""
    labels = [] if ":" in host else host.removesuffix(".").split(".")
    can_be = port != 0 and len(host) <= 253 and host.isascii() and all(0 < len(label) < 64 for label in labels)
    return host if can_be else ""


def _url_problem(url: str) -> str:
    """What is wrong with a base URL, "" for nothing; what may be a password or a key in it is not repeated."""
    if set("@?#") & set(url):
        return "a base URL holds no credentials and no query; put the key into a variable"
    shown = repr(_seen(url.partition(";")[0]))
    if not url.lower().startswith(("http://", "https://")) or not host_of(url):
        return f"{shown} is no http(s) URL with a host and port that can be; write http://host:port/v1"
    if not url.isprintable() or " " in url or len(url) > MAX_URL:
        return f"{shown} holds characters that no URL has, or more than {MAX_URL}"
    return ""


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as the text of a config file; also those that another release recorded."""
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)


def fingerprint(identity: Mapping[str, Any]) -> str:
    """16 hex digits that stand for an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def load(file: Path | None, environment: Mapping[str, str], flags: Mapping[str, Any]) -> RunConfig:
    """Build the settings from all sources; UsageError names every wrong key and value at once."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    fields = set(RunConfig.model_fields)
    from_environment = {
        name: environment[key] for name in fields if (key := f"SELFINSTRUCT_{name.upper()}") in environment
    }
    if file:
        values, sources = config_file.read(file)
    for source, found in (
        ("the environment (SELFINSTRUCT_...)", from_environment),
        ("the command line", {name: value for name, value in flags.items() if value is not None}),
    ):
        values.update(found)
        sources.update(dict.fromkeys(found, source))
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UsageError(
            "the settings are wrong:\n" + "\n".join(_explain(error, sources)),
            hint="selfinstruct config schema lists every setting",
        ) from None


def load_file(path: Path) -> RunConfig:
    """The settings in one file alone, as a run wrote them."""
    return load(path, {}, {})


def _explain(error: ValidationError, sources: Mapping[str, str]) -> list[str]:
    lines = []
    problems = error.errors(include_url=False)
    for problem in problems[:MAX_PROBLEMS_SHOWN]:
        name = str(problem["loc"][0]) if problem["loc"] else "settings"
        where = sources.get(name, "defaults")
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name[:MAX_SHOWN], RunConfig.model_fields, n=1)
            said = f"unknown{f'; did you mean {near[0]!r}?' if near else ''}"
        elif name == "base_url" and problem["type"] == "value_error":
            said = problem["msg"].removeprefix("Value error, ")  # says itself what can be shown of a URL
        elif name == "api_key_env":  # a key is given here by mistake
            said = "takes the NAME of the variable that holds the key, such as OPENAI_API_KEY; never the key"
        else:
            said = f"{problem['msg'].removeprefix('Value error, ')} (seen: {_seen(problem['input'])!r})"
        lines.append(f"  {_seen(name)} in {where}: {said}")
    if len(problems) > len(lines):
        lines.append(f"  ... and {len(problems) - len(lines)} more")
    return lines


def _seen(value: object) -> str:
    """A value, cut where a word ends: half a key would not be known for one."""
    text = str(value)
    return (
        text if len(text) <= MAX_SHOWN else text[: text.rfind(" ", 0, MAX_SHOWN) + 1] + f"... ({len(text)} characters)"
    )


def write_config(config: RunConfig, path: Path) -> None:
    """Write the settings as a file for people and ``--config``, whole or not at all."""
    try:
        durable.write_text(path, config.to_yaml())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


def url_hosts(urls: Sequence[str]) -> list[str]:
    """The hosts of base URLs, for messages."""
    return [urlsplit(url).netloc for url in urls]

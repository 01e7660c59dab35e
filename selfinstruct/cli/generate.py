"""``generate`` and ``resume``: a run from the shell."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfinstruct.cli import options
from selfinstruct.cli.console import errors_shown, interruptions_told, result, result_json, say

if TYPE_CHECKING:
    from selfinstruct.config import RunConfig
    from selfinstruct.dataset.store import Version
    from selfinstruct.records import SeedTask
    from selfinstruct.run.session import Ended

_EXAMPLES = """Examples:

  selfinstruct generate outputs/first --num 20

  \b
  selfinstruct generate outputs/gpt --teacher gpt-5-mini \\
      --num 1000 --max-requests 200

  \b
  selfinstruct generate outputs/mine --teacher my-model \\
      --base-url http://localhost:8000/v1"""


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(epilog=_EXAMPLES)(generate)
    app.command(epilog="Example:\n\n  selfinstruct resume outputs/first --num 100")(resume)


def generate(
    out: options.Out,
    teacher: options.Teacher = None,
    base_url: options.BaseUrl = None,
    api_key_env: options.ApiKeyEnv = None,
    method: Annotated[str | None, typer.Option(help="alpaca [alpaca].")] = None,
    language: Annotated[str | None, typer.Option(help="Language of the tasks: en, pt [en].")] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="FILE", help="Seed tasks (JSON lines) [those that ship].")
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Seed tasks shown in a prompt [3].")] = None,
    tasks: Annotated[int | None, typer.Option(help="Tasks asked for in a request [20].")] = None,
    num: options.Num = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of the prompts [42].")] = None,
    form: Annotated[str | None, typer.Option(help="Prompt form: text, schema, short [by teacher].")] = None,
    api: Annotated[str | None, typer.Option(help="chat, or completions for raw text [by teacher].")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature [1.0].")] = None,
    threshold: Annotated[float | None, typer.Option(help="Highest ROUGE-L of a new task [0.7].")] = None,
    concurrency: options.Concurrency = None,
    timeout: options.Timeout = None,
    max_requests: options.MaxRequests = None,
    max_tokens: options.MaxTokens = None,
    max_minutes: options.MaxMinutes = None,
    min_acceptance: options.MinAcceptance = None,
    decontaminate: Annotated[
        str | None, typer.Option(metavar="FILE[,FILE]", help="Keep out what resembles a task of these evaluation sets.")
    ] = None,
    profile: options.Profile = None,
    secrets: Annotated[
        str | None, typer.Option(help="Text that looks secret or personal: flag, mask, or drop the task [flag].")
    ] = None,
    allow_plain_http: Annotated[
        bool | None, typer.Option("--allow-plain-http", help="Let a key go over http to another host.")
    ] = None,
    config: options.Config = None,
    set_: options.Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the first prompt and settings; send nothing.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Generate a dataset into OUT, or go on with the run that is there.

    Without --teacher the embedded SmolLM2-135M writes: good for a first look, free, and no real teacher.
    """
    flags = dict(locals())
    for name in ("out", "config", "set_", "dry_run", "json"):
        flags.pop(name)
    with errors_shown(as_json=json):
        settings = options.settings(config, flags, set_)
        if dry_run:
            _dry_run(settings, as_json=json)
            return
        with interruptions_told(_resume_command(out)):
            _work(out, settings, as_json=json, teacher_named="teacher" in settings.model_fields_set)


def resume(
    out: options.Out,
    num: options.NumAgain = None,
    base_url: options.BaseUrl = None,
    api_key_env: options.ApiKeyEnvAgain = None,
    concurrency: options.ConcurrencyAgain = None,
    timeout: options.TimeoutAgain = None,
    max_requests: options.MaxRequests = None,
    max_tokens: options.MaxTokens = None,
    max_minutes: options.MaxMinutes = None,
    min_acceptance: options.MinAcceptanceAgain = None,
    profile: options.Profile = None,
    forget_damaged: Annotated[
        bool,
        typer.Option("--forget-damaged", help="Ask, and pay, again for answers that the disk has damaged or lost."),
    ] = False,
    set_: options.Set = None,
    json: options.Json = False,
) -> None:
    """Go on with the run in OUT as it began; no answer in its journal is asked for again."""
    named = {name: value for name, value in locals().items() if name not in ("out", "forget_damaged", "set_", "json")}
    with errors_shown(as_json=json):
        flags = {**options.assigned(set_), **options.given(named)}
        from selfinstruct.run import folder

        folder.require_run(out)
        recorded = folder.recorded_config(out).model_dump()
        with interruptions_told(_resume_command(out)):
            settings = options.built(None, {}, {**recorded, **flags})
            _work(out, settings, as_json=json, teacher_named=True, forget_damaged=forget_damaged)


def _seeds_of(out: Path, config: RunConfig) -> list[SeedTask]:
    """The seeds of the run in ``out`` as it began, unless a file is named; for a new run those of the settings."""
    from selfinstruct import seeds
    from selfinstruct.run import folder
    from selfinstruct.run.journal import Journal

    if (config.seeds is None or not Path(config.seeds).exists()) and folder.holds_run(out):
        journal = Journal.read_only(folder.run_folder(out))
        try:
            return journal.seeds()
        finally:
            journal.close()
    return seeds.load(Path(config.seeds) if config.seeds else seeds.bundled(config.language))


def _evaluation_of(config: RunConfig) -> list[tuple[str, str]]:
    """Where each task of the evaluation sets stands, and its text."""
    from selfinstruct.dataset.dedup import texts

    return [(str(place), text) for file in config.decontaminate for place, text in texts(Path(file), None)]


def _resume_command(out: Path) -> str:
    return f"selfinstruct resume {shlex.quote(str(out))}"


def _work(out: Path, config: RunConfig, *, as_json: bool, teacher_named: bool, forget_damaged: bool = False) -> None:
    """Check, run, publish, report, and exit with the right code."""
    from selfinstruct.run import folder
    from selfinstruct.servers import teachers

    folder.holds_run(out)
    seeds = _seeds_of(out, config)
    evaluation = _evaluation_of(config)
    teacher = teachers.check(config, os.environ)
    if not teacher_named:
        say("no --teacher named: the embedded model writes (name one for data worth training on)")
    from selfinstruct.run.session import work

    ended = work(out, config, seeds, evaluation, teacher, say, forget_damaged=forget_damaged)
    version, is_new = _publish(out, config, ended)
    _report(out, config, ended, version, is_new=is_new, as_json=as_json)


def _publish(out: Path, config: RunConfig, ended: Ended) -> tuple[Version | None, bool]:
    """A version at the target or at a limit; none after a signal or a fault, which are to be quick."""
    if ended.outcome.end not in ("target", "limit") or ended.outcome.kept == 0:
        return None, False
    from selfinstruct.cli.runs import publish_run

    return publish_run(out, config)


def _report(
    out: Path, config: RunConfig, ended: Ended, version: Version | None, *, is_new: bool, as_json: bool
) -> None:
    from selfinstruct.cli.runs import tell_of_flags
    from selfinstruct.errors import GivenUp

    outcome = ended.outcome
    command = _resume_command(out)
    code = {"target": 0, "limit": 4, "signal": 128 + (ended.signal or 2), "fault": 4}[outcome.end]
    reason = outcome.reason
    if outcome.given_up:
        code = code or GivenUp.exit_code
        reason += f"; {outcome.given_up} {'request was' if outcome.given_up == 1 else 'requests were'} given up for now"
    if outcome.fault is not None and outcome.end == "fault":
        code = outcome.fault.exit_code
    rows = min(outcome.kept, config.num)
    if as_json:
        result_json(
            {
                "end": outcome.end,
                "reason": reason,
                "rows": rows,
                "target": config.num,
                "requests": outcome.spent.requests,
                "tokens": outcome.spent.tokens,
                "given_up": outcome.given_up,
                "version": version.name if version else None,
                "new_version": is_new,
                "flagged": dict(version.flagged) if version else {},
                "resume": None if code == 0 else command,
                "exit_code": code,
            }
        )
    elif version is not None:
        result(f"{out}: {version.name}{'' if is_new else ' (as before)'} with {version.rows} rows")
        tell_of_flags(version)
        result(f"load it:  selfinstruct.load({str(out)!r})  or  datasets.load_dataset({str(out)!r})")
    if code:
        say(f"{'error' if outcome.end == 'fault' else 'stopped'}: {reason} ({rows} of {config.num} rows)")
        if outcome.fault is not None and outcome.fault.hint and outcome.end == "fault":
            say(f"hint: {outcome.fault.hint}")
        say(f"resume with: {command}")
        sys.stdout.flush()
        raise typer.Exit(code)


def _dry_run(config: RunConfig, *, as_json: bool) -> None:
    """Show what would be sent and what a canned reply would become. Nothing is sent or written."""
    import random

    from selfinstruct import seeds as seed_files
    from selfinstruct.backends.scripted import invented
    from selfinstruct.run.pool import Pool
    from selfinstruct.run.session import gate_of, method_of

    seeds = seed_files.load(Path(config.seeds) if config.seeds else seed_files.bundled(config.language))
    evaluation = _evaluation_of(config)
    method = method_of(config)
    pool = Pool(seeds)
    prompt = method.opening(0, pool.view(0), random.Random(f"{config.seed}/0"))
    said = prompt.text or "\n".join(message["content"] for message in prompt.messages or ())
    import asyncio

    reading = method.parse(prompt, asyncio.run(invented().complete(prompt)))
    gate = gate_of(config, method, seeds, evaluation)
    verdicts = [gate.judge(draft)[1] for draft in reading.drafts]
    requests = -(-config.num // method.tasks_per_request)
    if as_json:
        shown: dict[str, Any] = {
            "settings": config.model_dump(mode="json"),
            "prompt": said,
            "stop": list(prompt.stop),
            "schema": prompt.schema,
            "least_requests": requests,
        }
        result_json(shown)
        return
    result(said)
    result("-" * 60)
    result(
        f"teacher {config.teacher}, {config.form} form, {config.api}, at most {prompt.max_new_tokens} tokens a reply"
    )
    result(f"{len(said.split())} words a prompt, at least {requests} requests for {config.num} rows; nothing was sent")
    kept = sum(1 for verdict in verdicts if verdict.accepted)
    result(f"a canned reply of {len(reading.drafts)} tasks was read and judged: {kept} kept")

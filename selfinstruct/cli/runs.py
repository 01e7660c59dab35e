"""``status``, ``publish``, ``versions`` and ``show``: looking at a run and its dataset."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfinstruct.cli import options
from selfinstruct.cli.console import errors_shown, result, result_json, say

if TYPE_CHECKING:
    from selfinstruct.config import RunConfig
    from selfinstruct.dataset.store import Version


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(epilog="Example:\n\n  selfinstruct status outputs/first --json")(status)
    app.command(epilog="Example:\n\n  selfinstruct publish outputs/first")(publish)
    app.command(epilog="Example:\n\n  selfinstruct versions outputs/first")(versions)
    app.command(epilog="Example:\n\n  selfinstruct show outputs/first --rows 3")(show)


def publish_run(out: Path, config: RunConfig) -> tuple[Version, bool]:
    """Publish what the run in ``out`` holds, up to its target; the version and whether it is new."""
    from selfinstruct.dataset.publish import publish as publish_rows
    from selfinstruct.run.folder import run_folder
    from selfinstruct.run.journal import Journal
    from selfinstruct.run.lock import publish_lock

    with publish_lock(run_folder(out)):
        journal = Journal.read_only(run_folder(out))
        try:
            return publish_rows(out, journal, target=config.num, validation=config.validation, profile=config.profile)
        finally:
            journal.close()


def tell_of_flags(version: Version, indent: str = "") -> None:
    """Print one line on rows that look as if they hold secrets or personal text, when there are any."""
    if version.flags_told:
        result(f"{indent}{version.name}: {version.flags_told} (column flags; a new run can --secrets mask or drop)")


def status(out: options.Out, json: options.Json = False) -> None:
    """Show how far the run in OUT is, also while it works."""
    with errors_shown(as_json=json):
        from selfinstruct.dataset.store import versions as all_versions
        from selfinstruct.run import folder, lock
        from selfinstruct.run.journal import FILE_NAME, Journal
        from selfinstruct.run.writer import passes_log_over

        folder.require_run(out)
        journal = Journal.read_only(folder.run_folder(out))
        try:
            counts = journal.counts()
        finally:
            journal.close()
        config = folder.recorded_config(out)
        worker = lock.holder(folder.run_folder(out))
        kept = counts.pop("accepted")
        is_done = kept >= config.num and not counts["given_up"]
        state = "running" if worker else "done" if is_done else "stopped"
        command = f"selfinstruct resume {shlex.quote(str(out))}"
        unread = passes_log_over(folder.run_folder(out) / FILE_NAME)
        if unread:
            say(f"{out} is read-only: answers that {FILE_NAME}-wal may hold are not counted")
        published = all_versions(out)
        names = [version.name for version in published]
        if json:
            result_json(
                {
                    "state": state,
                    "rows": min(kept, config.num),
                    "accepted": kept,
                    "target": config.num,
                    "teacher": config.teacher,
                    **counts,
                    "log_unread": unread,
                    "versions": names,
                    "flagged": dict(published[-1].flagged) if published else {},
                    "resume": command if state == "stopped" else None,
                }
            )
            return
        share = counts["drafts"] and kept / counts["drafts"]
        result(f"{out}: {state}{worker}, {min(kept, config.num)} of {config.num} rows, teacher {config.teacher}")
        result(
            f"  {counts['requests']} answers, {counts['judged']} judged, {counts['prompt_tokens']} + "
            f"{counts['completion_tokens']} tokens, {counts['drafts']} tasks read, {share:.0%} accepted"
        )
        for title, name in (("turned down", "rejected"), ("not read", "lost"), ("repaired", "repaired")):
            if counts[name]:
                result(f"  {title}: " + ", ".join(f"{reason} {count}" for reason, count in counts[name].items()))
        result(f"  versions: {', '.join(names) or 'none yet'}")
        for version in published[-1:]:
            tell_of_flags(version, indent="  ")
        if state == "stopped":
            result(f"  go on with: {command}")


def publish(
    out: options.Out,
    num: Annotated[int | None, typer.Option("--num", "-n", min=1, help="Publish at most this many rows.")] = None,
    profile: options.Profile = None,
    json: options.Json = False,
) -> None:
    """Make a version of the rows that the run in OUT has now, also while it works."""
    with errors_shown(as_json=json):
        from selfinstruct.run import folder

        folder.require_run(out)
        config = folder.recorded_config(out)
        changed = {"num": num or config.num, "profile": config.profile if profile is None else profile}
        version, is_new = publish_run(out, config.model_copy(update=changed))
        if json:
            flagged = dict(version.flagged)
            result_json({"version": version.name, "rows": version.rows, "new_version": is_new, "flagged": flagged})
        else:
            result(f"{out}: {version.name}{'' if is_new else ' (as before)'} with {version.rows} rows")
            tell_of_flags(version)


def versions(out: options.Out, json: options.Json = False) -> None:
    """List the published versions in OUT."""
    with errors_shown(as_json=json):
        from selfinstruct.dataset.store import versions as all_versions
        from selfinstruct.errors import UsageError

        if not out.is_dir():
            raise UsageError(f"{out}: no such folder")
        found = all_versions(out)
        if json:
            result_json(
                [
                    {
                        "version": version.name,
                        "rows": version.rows,
                        "train": version.rows_in("train"),
                        "validation": version.rows_in("validation"),
                        "parent": version.about.get("parent"),
                        "bytes": sum(shard.bytes for shard in version.shards),
                    }
                    for version in found
                ]
            )
            return
        for version in found:
            train, validation = version.rows_in("train"), version.rows_in("validation")
            result(f"{version.name}\t{version.rows} rows\t{train} train\t{validation} validation")
        if not found:
            result(f"{out}: nothing published yet")


def show(
    out: options.Out,
    rows: Annotated[int, typer.Option("--rows", "-r", min=1, help="How many rows.")] = 3,
    version: Annotated[str, typer.Option(help="Version, for example v2.")] = "latest",
    json: options.Json = False,
) -> None:
    """Print the first rows of the published dataset in OUT."""
    with errors_shown(as_json=json):
        import pyarrow.parquet as pq

        from selfinstruct.dataset import store
        from selfinstruct.errors import UsageError

        if not out.is_dir():
            raise UsageError(f"{out}: no such folder")
        found = store.find(out, version)
        store.verify(found)
        first: list[dict[str, object]] = []
        for path in found.files("train") + found.files("validation"):
            first += pq.read_table(path).slice(0, rows - len(first)).to_pylist()
        if json:
            result_json(first)
            return
        for row in first:
            result(f"Instruction: {row['instruction']}")
            if row["input"]:
                result(f"Input: {row['input']}")
            result(f"Output: {row['output']}\n")
        result(f"({len(first)} of the {found.rows} rows of {out} {found.name})")

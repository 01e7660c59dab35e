"""``verify``: is everything in OUT what was written?"""

from __future__ import annotations

import shlex

import typer

from selfinstruct.cli import options
from selfinstruct.cli.console import errors_shown, result, result_json, say


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command(epilog="Example:\n\n  selfinstruct verify outputs/first")(verify)


def verify(out: options.Out, json: options.Json = False) -> None:
    """Compare the run and every published version in OUT with what was written, and name each damaged file.

    Exits with 0 when all is well, 3 otherwise. Nothing is changed.
    """
    with errors_shown(as_json=json):
        from selfinstruct.dataset import audit
        from selfinstruct.errors import DamagedFile, UsageError
        from selfinstruct.run import folder, inspection
        from selfinstruct.run.journal import FILE_NAME
        from selfinstruct.run.writer import passes_log_over

        if not out.is_dir():
            raise UsageError(f"{out}: no such folder")
        of_run, run_findings = inspection.inspect(out)
        if passes_log_over(folder.run_folder(out) / FILE_NAME):
            say(f"{out} is read-only: {FILE_NAME}-wal was not looked at")
        of_dataset, dataset_findings = audit.examine(out)
        files, findings = of_run + of_dataset, run_findings + dataset_findings
        if not files:
            raise UsageError(f"{out}: holds no run and no dataset", hint=f"begin one: selfinstruct generate {out}")
        code = DamagedFile.exit_code if findings else 0
        if json:
            damaged = [{"file": str(path), "problem": problem} for path, problem in findings]
            result_json({"files": len(files), "damaged": damaged, "exit_code": code})
        else:
            for path, problem in findings:
                result(f"{path}: {problem}")
            result(f"{out}: {len(files)} files, {len({path for path, _ in findings})} of them damaged")
        if findings:
            say(f"hint: selfinstruct resume {shlex.quote(str(out))} mends what can be worked out again")
            raise typer.Exit(code)

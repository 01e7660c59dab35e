"""How soon a killed run of 52,002 answers is at work again, and how much memory that takes.

    python tests/benchmarks/resume.py [--answers 52002]

Canned replies of one made-up task each; the run is killed with SIGKILL when nearly all are in its journal, and resumed.
Beside it ``--version``: what starting the program takes by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tasks import task

PROGRAM = [sys.executable, "-m", "selfinstruct"]


def write_script(path: Path, answers: int) -> None:
    with path.open("w", encoding="utf-8") as script:
        for number in range(answers):
            new = task(number)
            text = f" {new['instruction']}\n4. Input:\n{new['input'] or '<noinput>'}\n4. Output:\n{new['output']}\n"
            script.write(json.dumps({"text": text}) + "\n")


def answers_in(journal: Path) -> int:
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(journal)) as connection:
        return int(connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
    return 0


def measured(*arguments: object) -> dict[str, float]:
    """Wall and CPU seconds of a command, and its largest memory in MB."""
    start = time.monotonic()
    command = [*PROGRAM, *map(str, arguments)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, used = os.wait4(child.pid, 0)
    wall = time.monotonic() - start
    return {"wall s": wall, "CPU s": used.ru_utime + used.ru_stime, "resident MB": used.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=52_002)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        script, out = Path(folder) / "script.jsonl", Path(folder) / "out"
        write_script(script, given.answers)
        asked = ["--teacher", f"scripted:{script}", "--num", 10**6, "--tasks", 1, "--concurrency", 64]
        command = [*PROGRAM, "generate", out, *asked, "--min-acceptance", 0]
        child = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
        while child.poll() is None and answers_in(out / "run" / "journal.sqlite") < 0.97 * given.answers:
            time.sleep(0.2)
        child.send_signal(signal.SIGKILL)
        child.wait()
        print(f"killed with {answers_in(out / 'run' / 'journal.sqlite')} answers in the journal")
        for name, arguments in (("--version", ["--version"]), ("resume", ["resume", out, "--max-requests", 1])):
            print(name, json.dumps({key: round(value, 2) for key, value in measured(*arguments).items()}))


if __name__ == "__main__":
    main()

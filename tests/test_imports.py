"""Commands start fast: nothing heavy is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"openai", "datasets", "pyarrow", "numpy", "rouge_score", "torch", "transformers", "pandas", "yaml"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["model", "--help"]])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom selfinstruct.cli.app import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stderr.strip().splitlines()[-1] == "[]"


def test_importing_the_package_is_light_and_still_offers_load() -> None:
    code = (
        "import sys, selfinstruct\n"
        "print([m for m in sys.modules if m.startswith('selfinstruct.')], selfinstruct.__all__)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stdout.startswith("[]")
    assert "load" in ended.stdout

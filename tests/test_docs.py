"""Every bash and python block of the documentation runs, in order, against a local teacher, and leaves rows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tasks import by_prompt
from teacher import Teacher

from selfinstruct.dataset import tables

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(
    page: Path, teacher: Callable[..., Teacher], environment: dict[str, str], tmp_path: Path
) -> None:
    server = teacher(by_prompt())
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    program = bin_folder / "selfinstruct"
    program.write_text(f"#!{sys.executable}\nfrom selfinstruct.cli.main import run\nrun()\n")
    program.chmod(0o755)
    env = {
        **environment,
        "PATH": f"{bin_folder}{os.pathsep}{environment['PATH']}",
        "OPENAI_BASE_URL": server.url,
    }
    assert shutil.which("bash")
    for language, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        text = block.replace("http://localhost:8000/v1", server.url)
        start = ["bash", "-euc", text] if language == "bash" else [sys.executable, "-c", text]
        ended = subprocess.run(start, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert ended.returncode == 0, f"{page.name}:\n{block}\n{ended.stderr}"
    for written in (path for path in tmp_path.iterdir() if path.suffix in tables.FORMATS):
        assert any(True for _ in tables.read(written)) or written.name == "why.jsonl", f"{written.name} holds no row"
    if page.name == "README.md":
        assert {"new.jsonl", "clean.parquet", "masked.jsonl"} <= {path.name for path in tmp_path.iterdir()}


def test_the_map_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Map of the files")[1].split("```")[1]
    above = {0: ROOT, 2: ROOT / "selfinstruct"}
    folder = ROOT
    for line in text.strip().splitlines():
        match = re.match(r"( {0,4})(\w\S*/)", line)
        if match:
            folder = above[len(match[1])] / match[2]
            above[len(match[1]) + 2] = folder
            assert folder.is_dir(), f"the map names {folder}"
        for name in re.findall(r"\b(\w+\.py)\b", line):
            assert (
                any(folder.rglob(name)) or any((ROOT / "selfinstruct").glob(name)) or any((ROOT / "tests").glob(name))
            ), name


def test_no_page_or_module_names_a_machine() -> None:
    paths = [*PAGES, *(ROOT / "selfinstruct").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    for path in paths:
        assert not re.search(r"/home/\w+/|/Users/\w+/", path.read_text(encoding="utf-8")), path

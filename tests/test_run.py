"""Runs of the whole program against a real HTTP teacher on loopback."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tasks import by_prompt, replay, task
from teacher import Reply, Teacher, prompt_of

Start = Callable[..., Teacher]


def parquet_bytes(out: Path) -> dict[str, bytes]:
    """Every Parquet file below a dataset folder, by its name."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.parquet"))}


def rows_of(out: Path, version: str = "v1") -> list[dict[str, Any]]:
    found = [row for path in (out / version).glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return sorted(found, key=lambda row: (row["request_no"], row["item_no"]))


def generate(run: Any, out: Path, server: Teacher, *arguments: object, **env: str) -> Any:
    return run("generate", out, "--teacher", "mock", "--base-url", server.url, *arguments, **env)


def test_a_run_reaches_its_target_and_publishes_what_the_teacher_wrote(
    run: Any, teacher: Start, tmp_path: Path
) -> None:
    tasks = [task(n) for n in range(400)]
    server = teacher(replay(tasks))
    out = tmp_path / "out"
    ended = generate(run, out, server, "--num", 150, "--json")
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert (report["end"], report["rows"], report["version"]) == ("target", 150, "v1")
    rows = rows_of(out)
    assert len(rows) == 150
    written = {t["instruction"]: t for t in tasks}
    for row in rows:
        assert {name: row[name] for name in ("instruction", "input", "output")} == written[row["instruction"]]
        assert (row["method"], row["teacher"], row["language"]) == ("alpaca", "mock", "en")
        assert len(row["shown_ids"]) == 3
    assert len({row["id"] for row in rows}) == 150


def test_no_more_is_asked_than_the_target_needs(run: Any, teacher: Start, tmp_path: Path) -> None:
    server = teacher(replay([task(n) for n in range(2000)]))
    assert generate(run, tmp_path / "out", server, "--num", 64, "--concurrency", 64).returncode == 0
    assert len(server.requests) <= 6  # four of sixteen tasks each would do


def test_rows_do_not_depend_on_concurrency(run: Any, teacher: Start, tmp_path: Path) -> None:
    server = teacher(by_prompt())
    found = []
    for concurrency in (1, 3, 40):
        out = tmp_path / f"c{concurrency}"
        assert generate(run, out, server, "--num", 120, "--concurrency", concurrency).returncode == 0
        found.append(parquet_bytes(out))
    assert found[0]
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_a_run_that_was_stopped_for_a_while_pays_nothing_twice(
    command: list[str], environment: dict[str, str], teacher: Start, tmp_path: Path
) -> None:
    server = teacher(by_prompt(), delay=0.6)
    arguments = ["generate", str(tmp_path / "out"), "--teacher", "mock", "--base-url", server.url, "--num", "60"]
    child = subprocess.Popen(
        [*command, *arguments, "--timeout", "2", "--concurrency", "4"], env=environment, stderr=subprocess.DEVNULL
    )
    while len(server.requests) < 6 and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGSTOP)  # as Ctrl-Z does
    time.sleep(3.5)
    child.send_signal(signal.SIGCONT)
    assert child.wait(60) == 0
    prompts = [prompt_of(body) for body in server.requests]
    assert len(prompts) == len(set(prompts))


@pytest.mark.parametrize("strike", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_resumes_to_the_same_bytes_and_pays_nothing_twice(
    strike: signal.Signals, run: Any, command: list[str], environment: dict[str, str], teacher: Start, tmp_path: Path
) -> None:
    server = teacher(by_prompt(), delay=0.02)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert generate(run, whole, server, "--num", 200, "--concurrency", 4).returncode == 0
    server.requests.clear()
    arguments = ["generate", str(killed), "--teacher", "mock", "--base-url", server.url, "--num", "200"]
    child = subprocess.Popen(
        [*command, *arguments, "--concurrency", "4"],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while len(server.requests) < 20 and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(strike)
    _, said = child.communicate(timeout=20)
    answered_before = len(server.requests)
    if strike is signal.SIGKILL:
        assert child.returncode == -9
    else:
        assert child.returncode == 128 + strike
        assert said.strip().splitlines()[-1] == f"resume with: selfinstruct resume {killed}"
        assert "Traceback" not in said
    ended = run("resume", killed)
    assert ended.returncode == 0, ended.stderr
    assert parquet_bytes(killed) == parquet_bytes(whole)
    again = len(server.requests) - len({json.dumps(request, sort_keys=True) for request in server.requests})
    assert again <= (4 if strike is signal.SIGKILL else 0), f"{again} of {answered_before} asked twice"


def test_raising_the_target_extends_the_dataset_and_keeps_its_rows(run: Any, teacher: Start, tmp_path: Path) -> None:
    server, out = teacher(by_prompt()), tmp_path / "out"
    assert generate(run, out, server, "--num", 40).returncode == 0
    assert generate(run, out, server, "--num", 90).returncode == 0
    first, second = rows_of(out, "v1"), rows_of(out, "v2")
    assert second[:40] == first
    assert len(second) == 90
    ended = run("versions", out, "--json")
    assert [(v["version"], v["rows"], v["parent"]) for v in json.loads(ended.stdout)] == [
        ("v1", 40, None),
        ("v2", 90, "v1"),
    ]


def test_a_finished_run_asks_nothing_and_publishes_nothing_new(run: Any, teacher: Start, tmp_path: Path) -> None:
    server, out = teacher(by_prompt()), tmp_path / "out"
    assert generate(run, out, server, "--num", 30).returncode == 0
    asked = len(server.requests)
    ended = run("resume", out, "--json")
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["new_version"] is False
    assert len(server.requests) == asked
    assert not (out / "v2").exists()


def test_other_settings_in_the_same_folder_are_refused_by_name(run: Any, teacher: Start, tmp_path: Path) -> None:
    server, out = teacher(by_prompt()), tmp_path / "out"
    assert generate(run, out, server, "--num", 20).returncode == 0
    before, asked = parquet_bytes(out), len(server.requests)
    ended = generate(run, out, server, "--num", 40, "--seed", 7, "--shots", 2)
    assert ended.returncode == 2
    for part in ("seed: 42 -> 7", "shots: 3 -> 2", "selfinstruct resume"):
        assert part in ended.stderr
    assert (parquet_bytes(out), len(server.requests)) == (before, asked)


def test_runtime_settings_may_change(run: Any, teacher: Start, tmp_path: Path) -> None:
    first, second, out = teacher(by_prompt()), teacher(by_prompt()), tmp_path / "out"
    assert generate(run, out, first, "--num", 20).returncode == 0
    assert generate(run, out, second, "--num", 40, "--concurrency", 3, "--timeout", 5).returncode == 0
    assert second.requests


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--max-requests", 3), "--max-requests 3"), (("--max-tokens", 900), "--max-tokens 900")],
)
def test_a_budget_stops_the_run_with_a_version_and_the_way_on(
    flags: tuple[Any, ...], words: str, run: Any, teacher: Start, tmp_path: Path
) -> None:
    server, out = teacher(by_prompt()), tmp_path / "out"
    ended = generate(run, out, server, "--num", 5000, "--concurrency", 2, *flags)
    assert ended.returncode == 4
    assert words in ended.stderr
    assert ended.stderr.strip().splitlines()[-1] == f"resume with: selfinstruct resume {out}"
    assert rows_of(out)
    if words == "--max-requests 3":
        assert len(server.requests) == 3


def test_a_saturated_pool_stops_with_a_reason(run: Any, teacher: Start, tmp_path: Path) -> None:
    same = [task(n) for n in range(10)]
    server, out = teacher(lambda body, n: replay(same, 10)(body, 0)), tmp_path / "out"
    ended = generate(run, out, server, "--num", 100, "--set", "acceptance_window=10")
    assert ended.returncode == 4
    assert "saturated" in ended.stderr
    assert len(rows_of(out)) == 10


def test_status_looks_on_while_a_run_works_and_a_second_run_is_refused(
    run: Any, command: list[str], environment: dict[str, str], teacher: Start, tmp_path: Path
) -> None:
    server, out = teacher(by_prompt(), delay=0.2), tmp_path / "out"
    arguments = ["generate", str(out), "--teacher", "mock", "--base-url", server.url, "--num", "3000"]
    child = subprocess.Popen([*command, *arguments], env=environment, stderr=subprocess.DEVNULL)
    try:
        while len(server.requests) < 80:
            time.sleep(0.02)
        status = json.loads(run("status", out, "--json").stdout)
        assert status["state"] == "running"
        assert status["requests"] > 0
        asked_by_first = len(server.requests)
        started = time.monotonic()
        second = run("generate", out, "--teacher", "mock", "--base-url", server.url, "--num", "3000")
        assert second.returncode == 3
        assert f"process {child.pid}" in second.stderr
        assert time.monotonic() - started < 10
        assert asked_by_first > 0
        published = run("publish", out)
        assert published.returncode == 0, published.stderr
    finally:
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
    assert json.loads(run("status", out, "--json").stdout)["state"] == "stopped"


def test_what_a_teacher_writes_cannot_steer_the_terminal(run: Any, teacher: Start, tmp_path: Path) -> None:
    evil = {
        "instruction": "Explain \x1b[2J\x1b]0;owned\x07 to me at once.",
        "input": "",
        "output": "\x1b[31mred \x9b1m",
    }
    server, out = teacher(replay([evil, *(task(n) for n in range(20))])), tmp_path / "out"
    ended = generate(run, out, server, "--num", 10)
    shown = run("show", out, "--rows", 10)
    for text in (ended.stdout, ended.stderr, shown.stdout, shown.stderr, run("status", out).stdout):
        assert "\x1b" not in text
        assert "\x9b" not in text


def test_a_teacher_that_stumbles_now_and_then_gives_the_same_rows(run: Any, teacher: Start, tmp_path: Path) -> None:
    good = by_prompt()
    rng, tried = random.Random(1), set()
    faults = [
        Reply(status=500, text="oops"),
        Reply(status=429, headers={"Retry-After": "0.2"}),
        Reply(status=503),
        Reply(body=b"<html>busy</html>"),
        Reply(json={"error": {"message": "overloaded", "type": "server_error"}}),
        Reply(json={"choices": []}),
        Reply(text=""),
        Reply(close=True),
    ]

    def answer(body: dict[str, Any], number: int) -> str | Reply:
        key = json.dumps(body, sort_keys=True)
        if key not in tried and rng.random() < 0.3:
            tried.add(key)
            return rng.choice(faults)
        return good(body, number)

    calm, rough = tmp_path / "calm", tmp_path / "rough"
    assert generate(run, calm, teacher(good), "--num", 80).returncode == 0
    ended = generate(run, rough, teacher(answer), "--num", 80)
    assert ended.returncode == 0, ended.stderr
    assert tried
    assert parquet_bytes(calm) == parquet_bytes(rough)


def test_the_key_is_sent_and_is_nowhere_on_disk_or_screen(run: Any, teacher: Start, tmp_path: Path) -> None:
    key = "sk-very-secret-0123456789"
    server, out = teacher(by_prompt()), tmp_path / "out"
    ended = generate(run, out, server, "--num", 10, "--api-key-env", "MY_KEY", MY_KEY=key)
    assert ended.returncode == 0
    assert server.headers[0]["Authorization"] == f"Bearer {key}"
    refusing = teacher(lambda body, n: Reply(status=401, text=f"bad key {key}"))
    refused = generate(run, tmp_path / "no", refusing, "--num", 10, "--api-key-env", "MY_KEY", MY_KEY=key)
    assert refused.returncode == 3
    assert "--api-key-env" in refused.stderr
    for text in (ended.stdout, ended.stderr, refused.stdout, refused.stderr):
        assert key not in text
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert key.encode() not in path.read_bytes()


def test_each_endpoint_gets_its_share(run: Any, teacher: Start, tmp_path: Path) -> None:
    one, two = teacher(by_prompt(), delay=0.01), teacher(by_prompt(), delay=0.01)
    urls = f"{one.url},{two.url}"
    ended = run("generate", tmp_path / "out", "--teacher", "mock", "--base-url", urls, "--num", 100)
    assert ended.returncode == 0, ended.stderr
    assert min(len(one.requests), len(two.requests)) > 5


def test_raw_completions_and_schema_are_asked_for_as_the_server_wants(run: Any, teacher: Start, tmp_path: Path) -> None:
    server = teacher(by_prompt())
    assert generate(run, tmp_path / "raw", server, "--num", 8, "--api", "completions").returncode == 0
    assert server.requests[-1]["prompt"].endswith("\n4. Instruction:")
    assert generate(run, tmp_path / "schema", server, "--num", 8, "--form", "schema").returncode == 0
    assert server.requests[-1]["response_format"]["json_schema"]["strict"] is True


@pytest.mark.slow
def test_the_released_rows_come_through_field_by_field(
    run: Any, teacher: Start, tmp_path: Path, alpaca_rows: list[dict[str, str]]
) -> None:
    server, out = teacher(replay(alpaca_rows)), tmp_path / "out"
    before = os.times()
    ended = generate(run, out, server, "--num", 5000, "--json")
    after = os.times()
    assert ended.returncode == 0, ended.stderr
    report, rows = json.loads(ended.stdout), rows_of(out)
    assert len(rows) == 5000
    source = {row["instruction"].strip(): row for row in alpaca_rows}
    markers = 0
    for row in rows:
        wrote = source[row["instruction"]]
        assert row["output"] == wrote["output"].strip()
        if row["input"] != wrote["input"].strip():
            assert row["input"] == ""
            markers += 1
    cpu = (after.user - before.user + after.system - before.system) * 1000
    print(
        f"\n{report['requests']} requests, {5000 / report['requests']:.2f} kept a request, "
        f"{cpu / report['requests']:.2f} ms CPU a request, {after.elapsed - before.elapsed:.1f} s wall, "
        f"{markers} no-input markers repaired"
    )
    assert markers < 100


def test_a_profiled_version_says_how_near_each_row_is_as_rouge_score_does(
    run: Any, teacher: Start, tmp_path: Path
) -> None:
    from datasets import load_dataset
    from rouge_score.rouge_scorer import RougeScorer

    from selfinstruct import seeds as seed_files

    server, out = teacher(by_prompt()), tmp_path / "out"
    assert generate(run, out, server, "--num", 12, "--profile").returncode == 0
    rows, scorer = rows_of(out), RougeScorer(["rougeL"])
    before = [(seed.task_id, seed.instruction) for seed in seed_files.load(seed_files.bundled("en"))]
    for row in rows:
        scores = [scorer.score(text, row["instruction"])["rougeL"].fmeasure for _, text in before]
        best = max(range(len(scores)), key=lambda k: scores[k])
        assert (row["similarity"], row["nearest_id"]) == (scores[best], before[best][0])
        assert row["mean_similarity"] == pytest.approx(sum(scores) / len(scores), abs=1e-12)
        assert [near["score"] for near in row["most_similar"]] == sorted(scores, reverse=True)[:10]
        before.append((row["id"], row["instruction"]))
    assert load_dataset(str(out), split="train")[0]["most_similar"][0]["score"] >= 0
    card = (out / "README.md").read_text()
    assert all(f"`{column}`" in card for column in rows[0])
    assert run("publish", out, "--no-profile").returncode == 0
    assert "similarity" not in rows_of(out, "v2")[0]
    assert "`similarity`" not in (out / "README.md").read_text()

"""How much a run costs beside a bare client loop: CPU a completion, throughput with slow answers, requests in flight.

    python tests/benchmarks/throughput.py [--rounds 3]

The teacher is another process on this machine, so that its CPU is not counted; product and bare loop take turns. The
bare loop is ``AsyncOpenAI(http_client=DefaultAioHttpClient())`` with as many workers as the product has slots, sending
prompts of the same size. The teacher writes one task a reply. Both are child processes; imports are not counted for
CPU (measured inside, from the first request to the last).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))


def serve(port: Any, peak: Any, slowness: Any) -> None:
    """The teacher: 200 ms plus up to 1,800 ms when ``slowness`` is 1."""
    from aiohttp import web
    from tasks import task

    in_flight, rng, made = 0, random.Random(4), 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal in_flight, made
        await request.read()
        made += 1
        number = made
        in_flight += 1
        peak.value = max(peak.value, in_flight)
        if slowness.value:
            await asyncio.sleep(slowness.value * (0.2 + 1.8 * rng.random()))
        in_flight -= 1
        new = task(number)
        text = f" {new['instruction']}\n4. Input:\n<noinput>\n4. Output:\n{new['output']}\n###\n"
        usage = {"prompt_tokens": 300, "completion_tokens": 60, "total_tokens": 360}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        reply = {"id": "x", "object": "chat.completion", "created": 1, "model": "mock"}
        return web.json_response({**reply, "choices": [choice], "usage": usage})

    async def main() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        port.value = runner.addresses[0][1]
        await asyncio.Event().wait()

    asyncio.run(main())


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def bare(url: str, requests: int, workers: int, done: Any) -> None:
    """The bare loop."""
    import openai

    async def main() -> None:
        client = openai.AsyncOpenAI(
            base_url=url, api_key="x", max_retries=0, http_client=openai.DefaultAioHttpClient(timeout=60)
        )
        words = "Invent 20 new tasks, of many kinds, for a model. " * 30
        left = iter(range(requests))

        async def worker() -> None:
            for n in left:
                messages: Any = [{"role": "user", "content": f"{n} {words}"}]
                reply = await client.chat.completions.create(model="mock", messages=messages, max_tokens=4000)
                assert reply.choices[0].message.content

        start, before = time.monotonic(), cpu()
        await asyncio.gather(*(worker() for _ in range(workers)))
        done.put((requests, time.monotonic() - start, cpu() - before))
        await client.close()

    asyncio.run(main())


def product(url: str, rows: int, workers: int, done: Any) -> None:
    """A run of the same number of rows, with everything that it does: journal, reading, rules, novelty."""
    import openai  # noqa: F401  (counted on neither side)

    from selfinstruct import config, seeds
    from selfinstruct.run import session
    from selfinstruct.servers import teachers

    flags = {"teacher": "mock", "base_url": url, "num": rows, "concurrency": workers, "tasks": 5, "pool_lag": 2048}
    settings = config.load(None, {}, flags).resolve()
    with tempfile.TemporaryDirectory() as folder:
        given = seeds.load(seeds.bundled("en"))
        teacher = teachers.check(settings, {})
        start, before = time.monotonic(), cpu()
        ended = session.work(Path(folder) / "out", settings, given, [], teacher, lambda line: None)
        done.put((ended.outcome.spent.requests, time.monotonic() - start, cpu() - before))
        assert ended.outcome.kept >= rows, ended


def measure(target: Any, *arguments: Any) -> tuple[int, float, float]:
    context = multiprocessing.get_context("spawn")
    done = context.SimpleQueue()
    child = context.Process(target=target, args=(*arguments, done))
    child.start()
    found: tuple[int, float, float] = done.get()
    child.join()
    return found


def compare(url: str, requests: int, workers: int, rounds: int) -> dict[str, float]:
    """Medians of interleaved rounds, and the ratios product / bare."""
    figures: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, target in (("bare", bare), ("product", product)):
            sent, wall, used = measure(target, url, requests, workers)
            figures.setdefault(f"{name} CPU ms", []).append(1000 * used / sent)
            figures.setdefault(f"{name} answers/s", []).append(requests / wall)
            figures.setdefault(f"{name} requests", []).append(sent)
    ratios = {
        "CPU ratio": zip(figures["product CPU ms"], figures["bare CPU ms"], strict=True),
        "throughput ratio": zip(figures["product answers/s"], figures["bare answers/s"], strict=True),
    }
    found = {name: statistics.median(values) for name, values in figures.items()}
    return found | {name: statistics.median(a / b for a, b in pairs) for name, pairs in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["cpu", "latency", "flight"])
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    port, peak, slowness = context.Value("i", 0), context.Value("i", 0), context.Value("d", 0.0)
    server = context.Process(target=serve, args=(port, peak, slowness), daemon=True)
    server.start()
    while not port.value:
        time.sleep(0.05)
    url = f"http://127.0.0.1:{port.value}/v1"
    cases = {"cpu": ("latency 0, 32 in flight", 0.0, 1500, 32), "latency": ("0.2 to 2 s, 64 in flight", 1.0, 1500, 64)}
    for name, (title, slow, requests, workers) in cases.items():
        if given.only in (None, name):
            slowness.value = slow
            found = compare(url, requests, workers, given.rounds)
            print(title, json.dumps({key: round(value, 3) for key, value in found.items()}), flush=True)
    if given.only in (None, "flight"):
        slowness.value, peak.value = 1.0, 0
        measure(product, url, 2500, 512)
        print(f"asked for 512 in flight: {peak.value} reached")
    server.terminate()


if __name__ == "__main__":
    main()

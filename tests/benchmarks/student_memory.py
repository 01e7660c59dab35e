"""Memory of the real commands on one GPU: predicted beside measured, on cards as small as is claimed.

A random LLaMA-7B is written as safetensors shards. Each part is ``selfinstruct finetune`` or ``infer`` in a process of
its own, while this one holds all of the GPU but what the part's card would have: what does not fit fails.

    python tests/benchmarks/student_memory.py --rows alpaca.jsonl.gz --tokenizer DIR --model /tmp/7b --out memory.json
    python tests/benchmarks/student_memory.py ... --parts qlora infer-4bit --minutes 4
    python tests/benchmarks/student_memory.py --rows rows.jsonl --tokenizer DIR --tiny       (CPU; figures mean nothing)

tensors   what torch had allocated at the peak, loading included (``peak_bytes`` of the commands)
taken     the most that was missing on the card while the command ran: tensors, CUDA context, libraries, fragments
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Part:
    """A command on a card. ``card`` in bytes (0: the whole GPU), ``rows`` to train on or to answer."""

    card: int
    rows: int
    form: str
    options: tuple[str, ...]

    @property
    def trains(self) -> bool:
        return "--method" in self.options


PARTS = {
    "qlora": Part(8 * GIB, 1024, "", ("--method", "qlora")),
    "infer-8bit": Part(12 * 10**9, 96, "int8", ("--quant", "8bit")),
    "infer-4bit": Part(12 * 10**9, 128, "4bit", ("--quant", "4bit")),
    "infer-bf16": Part(24 * GIB, 512, "bf16", ()),
    "lora": Part(24 * GIB, 1024, "", ("--method", "lora")),
    "full-80": Part(int(79.2 * GIB), 768, "", ("--method", "full")),
    "full": Part(0, 768, "", ("--method", "full")),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="rows to train on and to answer (.jsonl, .jsonl.gz)")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer of at most 32,000 words")
    parser.add_argument("--model", type=Path, default=Path("/tmp/random-7b"), help="folder to write the model into")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing new after this time")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for one part")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, also on a CPU")
    parser.add_argument("--out", type=Path, default=Path("memory.json"))
    return parser.parse_args()


def make_model(folder: Path, tokenizer: Path, *, tiny: bool) -> None:
    """Write a random LLaMA in bfloat16, a shard of about 4 GB after another, and its tokenizer; once."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, **(sizes if tiny else {}))
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards: list[dict[str, Any]] = [{}]
    for name, shape in shapes.items():
        if sum(one.nbytes for one in shards[-1].values()) > (4 << 30):
            save_file(shards[-1], folder / f"model-{len(shards):05d}.safetensors", {"format": "pt"})
            shards[-1] = dict.fromkeys(shards[-1])  # the names are wanted still, the weights are not
            shards.append({})
        norm = len(shape) == 1
        made = torch.ones(shape) if norm else torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
        shards[-1][name] = made.to("cpu", torch.bfloat16)
    save_file(shards[-1], folder / f"model-{len(shards):05d}.safetensors", {"format": "pt"})
    places = {name: f"model-{number:05d}.safetensors" for number, shard in enumerate(shards, 1) for name in shard}
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    config.save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}), encoding="utf-8")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write_rows(source: Path, target: Path, count: int) -> Path:
    opener = gzip.open if source.suffix == ".gz" else open
    with opener(source, "rt", encoding="utf-8") as stream:
        target.write_text("".join(line for _, line in zip(range(count), stream, strict=False)), encoding="utf-8")
    return target


class Card:
    """The GPU, made as small as a part's card; watched while a command runs on it."""

    def __init__(self) -> None:
        import torch

        self.real = torch.cuda.is_available()
        self._ballast: list[Any] = []
        self._least = 0
        if self.real:
            torch.zeros(1, device="cuda")

    def free(self) -> int:
        import torch

        return int(torch.cuda.mem_get_info()[0]) if self.real else 0

    def shrink(self, size: int) -> int:
        """Hold all but ``size`` bytes (0: hold nothing); the bytes that are free now."""
        import torch

        self._ballast.clear()
        if self.real:
            torch.cuda.empty_cache()
        while self.real and size and (over := self.free() - size) > (2 << 20):
            self._ballast.append(torch.empty(min(over, GIB), dtype=torch.uint8, device="cuda"))
        return self.free()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note the least free memory of the time in between, looking every 20 ms."""
        self._least, done = self.free(), threading.Event()

        def look() -> None:
            while self.real and not done.wait(0.02):
                self._least = min(self._least, self.free())

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    @property
    def least(self) -> int:
        return self._least


def command(name: str, args: argparse.Namespace, work: Path) -> list[str]:
    """The command line of a part, as a user would type it."""
    part = PARTS[name]
    rows = str(write_rows(args.rows, work / f"{name}.jsonl", 48 if args.tiny else part.rows))
    start = [sys.executable, "-m", "selfinstruct"]
    if part.trains:
        few = ["--batch", "16"] if args.tiny else []
        return [*start, "finetune", rows, "--model", str(args.model), *part.options, *few,
                "--epochs", "1", "-o", str(work / name), "--json"]  # fmt: skip
    return [*start, "infer", str(args.model), "--input", rows, "-o", str(work / f"{name}-answers.jsonl"), *part.options,
            "--engine", "transformers", "--max-new-tokens", str(args.max_new_tokens), "--json"]  # fmt: skip


def run(name: str, args: argparse.Namespace, card: Card, work: Path) -> dict[str, Any]:
    """Run a part; its figures, or its last words."""
    part, words = PARTS[name], command(name, args, work)
    free, begin = card.shrink(0 if args.tiny else part.card), time.monotonic()
    log = args.out.with_name(f"{args.out.stem}-{name}.log")
    with log.open("w", encoding="utf-8") as errors, card.watched():
        try:
            done = subprocess.run(
                words, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=args.limit, check=False,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
            code, said = done.returncode, done.stdout
        except subprocess.TimeoutExpired:
            code, said = -1, ""
    told = log.read_text(encoding="utf-8")
    figures = {"card_bytes": free, "taken_bytes": free - card.least, "exit_code": code,
               "seconds": round(time.monotonic() - begin, 1)}  # fmt: skip
    shutil.rmtree(work / name, ignore_errors=True)
    if code != 0:
        return {**figures, "last_words": told.strip().splitlines()[-3:]}
    found = json.loads(said)
    figures |= {key: found[key] for key in ("peak_bytes", "tokens_per_second", "mfu", "new_tokens") if key in found}
    return figures | (trained(told) if part.trains else answered(told, part, free, args))


def trained(told: str) -> dict[str, Any]:
    """What a fine-tuning run said of its plan."""
    plan = re.search(r"micro-batches of at most (\d+) tokens, Adam moments in (\S+), (\d+) layers recomputed", told)
    peak = re.search(r"at the peak \(predicted ([\d.]+) GB\), ([\d.]+) GB while", told)
    shrunk = re.findall(r"trying micro-batches of (\d+) tokens", told)
    return {
        "plan": " / ".join(plan.groups()) if plan else "",
        "predicted_bytes": int(float(peak.group(1)) * 1e9) if peak else 0,
        "loading_bytes": int(float(peak.group(2)) * 1e9) if peak else 0,
        "shrunk_to": shrunk[-1] if shrunk else "",
    }


def answered(told: str, part: Part, free: int, args: argparse.Namespace) -> dict[str, Any]:
    """What an inference run said of its slots, and the prediction for a card of this size."""
    from transformers import AutoConfig

    from selfinstruct.student.infer import infer_plan
    from selfinstruct.student.memory import CONTEXT, shape_of

    shape = shape_of(AutoConfig.from_pretrained(args.model))
    found: list[tuple[int, str]] = []
    for slots, longest in re.findall(r"\d+ prompts, (\d+) at a time of up to (\d+) tokens", told):
        plan = infer_plan.predict(shape, part.form, columns=int(longest) + 16, memory=free)
        spared = (plan.slots - int(slots)) * (plan.columns * plan.token + 24 * shape.vocabulary)  # asked for fewer rows
        found.append((plan.total - CONTEXT - spared, f"{slots} x {longest} (plan: {plan.slots})"))
    most = max(found, default=(0, "?"))
    return {"plan": most[1], "predicted_bytes": most[0]}


def shown(name: str, figures: dict[str, Any]) -> str:
    """One line of the table."""

    def gb(key: str) -> str:
        return f" {figures.get(key, 0) / 1e9:7.2f}"

    if figures["exit_code"] != 0:
        return (
            f"{name:11} FAILED ({figures['exit_code']}) taken{gb('taken_bytes')}: {' | '.join(figures['last_words'])}"
        )
    speed = figures.get("tokens_per_second") or figures.get("new_tokens", 0) / figures["seconds"]
    sizes = "".join(gb(f"{key}_bytes") for key in ("card", "predicted", "peak", "loading", "taken"))
    how = f"{figures.get('plan')} {figures.get('shrunk_to', '')}"
    return f"{name:11}{sizes} {speed:9,.0f} {figures['seconds']:6.0f}  {how}"


def main() -> None:
    args = arguments()
    begin = time.monotonic()
    make_model(args.model, args.tokenizer, tiny=args.tiny)
    print(f"model written in {time.monotonic() - begin:.0f} s", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    work = args.model.parent / "student-memory"
    work.mkdir(exist_ok=True)
    card, figures = Card(), {}
    heads = ("part", "card", "predict", "tensors", "loading", "taken", "tokens/s", "s", "  plan (GB are 10^9 bytes)")
    print("{:11} {:>7} {:>7} {:>7} {:>7} {:>7} {:>9} {:>6}{}".format(*heads), flush=True)
    for name in args.parts:
        if time.monotonic() - begin > args.minutes * 60:
            print(f"{name}: no time left", flush=True)
            continue
        try:
            figures[name] = run(name, args, card, work)
            print(shown(name, figures[name]), flush=True)
        except Exception as error:  # noqa: BLE001 - a benchmark's part may fail alone
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()

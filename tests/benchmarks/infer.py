"""Inference on one GPU: our engine beside transformers' own ways and vLLM's, on a random LLaMA-7B in bf16.

    python tests/benchmarks/infer.py --minutes 25 --out infer.json
    python tests/benchmarks/infer.py --parts short,long --minutes 12 --out infer.json
    python tests/benchmarks/infer.py --tiny --out infer.json          (CPU, seconds; figures mean nothing)

Parts, in this order:
  correct   greedy texts of the engine against one-by-one generate(), fp32, eager and compiled
  baseline  generate() on 512 prompts of 64 tokens x 96 new at once; generate_batch where it exists;
            for 805 prompts x 512 new: batch 1 (few prompts, extrapolated) and left-padded batch 32
  short     ours: 512 prompts of 64 tokens x 96 new tokens, greedy
  long      ours: 805 prompts of 20 to 400 tokens x up to 512 new tokens, greedy
  ragged    ours: the same prompts, replies of drawn lengths (mean about 110): what refilling slots is worth
  sampled   ours: the short part with temperature 0.8, top_p 0.95
  profile   time of a decode step by operator (short part)
  vllm      vLLM's own LLM.generate and ours on top of it, in a child process

A failing part prints its error and the next one runs. Random weights end no text, so every reply has its full length.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = ("correct", "baseline", "short", "long", "ragged", "sampled", "profile", "vllm")


class Bench:
    """The sizes, the model, the clock and the figures."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        self.options, self.figures = options, {}
        self.tiny: bool = options.tiny
        self.device = "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"
        self.deadline = time.monotonic() + options.minutes * 60
        self.short = (6, 8, 6) if self.tiny else (512, 64, 96)
        self.long = (9, 12) if self.tiny else (805, 512)
        self.vocabulary = 211 if self.tiny else 32000
        self.model: Any = None

    def config(self, **more: Any) -> Any:
        from transformers import LlamaConfig

        sizes: dict[str, Any] = {"vocab_size": self.vocabulary, "max_position_embeddings": 2048}
        if self.tiny:
            sizes |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaConfig(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **more})

    def build(self, dtype: Any, **more: Any) -> Any:
        """A random model on the device."""
        import torch
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(self.device):
                model = LlamaForCausalLM(self.config(**more)).eval()
        finally:
            torch.set_default_dtype(before)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model

    def fresh_model(self) -> Any:
        """The 7B as transformers makes it; the one of the last part is thrown away."""
        import torch

        self.drop_model()
        self.model = self.build(torch.float32 if self.tiny else torch.bfloat16)
        return self.model

    def drop_model(self) -> None:
        import torch

        self.model = None
        torch._dynamo.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def short_prompts(self) -> list[list[int]]:
        count, length, _ = self.short
        rng = random.Random(1)
        return [[rng.randrange(3, self.vocabulary) for _ in range(length)] for _ in range(count)]

    def long_prompts(self) -> list[list[int]]:
        rng = random.Random(2)
        sizes = [min(400, max(20, int(rng.lognormvariate(4.3, 0.6)))) for _ in range(self.long[0])]
        return [[rng.randrange(3, self.vocabulary) for _ in range(size)] for size in sizes]

    def clock(self, work: Callable[[], int], repeats: int = 1) -> dict[str, float]:
        """Run ``work`` (it returns its count of new tokens) and return tokens/s (median) and the peak of memory."""
        import torch

        rates = []
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(repeats):
            self._wait()
            begin = time.perf_counter()
            tokens = work()
            self._wait()
            rates.append(tokens / (time.perf_counter() - begin))
            if time.monotonic() > self.deadline:
                break
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else 0.0
        return {"tokens_per_s": statistics.median(rates), "runs": len(rates), "peak_gib": peak}

    def _wait(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def note(self, name: str, figures: dict[str, Any]) -> None:
        """Print and keep."""
        self.figures[name] = figures
        shown = ", ".join(f"{key} {value:,.1f}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in figures.items())  # fmt: skip
        print(f"{name:34s} {shown}", flush=True)
        Path(self.options.out).write_text(json.dumps(self.figures, indent=1) + "\n", encoding="utf-8")


def ours(bench: Bench, prompts: list[list[int]], new: list[int], **options: Any) -> dict[int, tuple[int, ...]]:
    """Our engine on these prompts; the tokens by prompt number."""
    from selfinstruct.student.infer.generation import BatchOptions, generate
    from selfinstruct.student.infer.requests import Request
    from selfinstruct.student.infer.sampling import Sampling

    how = options.pop("how", None) or {}
    requests = [
        Request(number, tuple(prompt), count, Sampling(seed=number, **how))
        for number, (prompt, count) in enumerate(zip(prompts, new, strict=True))
    ]
    settings = BatchOptions(log=lambda line: print(f"  {line}", flush=True), **options)
    return {answer.request_id: answer.tokens for answer in generate(bench.model, requests, [], settings)}


def plain(model: Any, prompts: list[list[int]], new: int, **options: Any) -> int:
    """transformers' generate() on one left-padded batch; returns the count of new tokens."""
    import torch

    from selfinstruct.student.infer.left_padded import pad_left

    ids, mask = pad_left(prompts, pad_id=0)
    with torch.inference_mode():
        made = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=new, do_sample=False, **options
        )
    return int((made.shape[1] - ids.shape[1]) * made.shape[0])


def part_correct(bench: Bench) -> None:
    import torch

    from selfinstruct.student.infer.generation import prepare

    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    prompts = [prompt[:100] for prompt in bench.long_prompts()[:48]]
    new = 12 if bench.tiny else 64
    for compiled in (False,) if bench.tiny else (False, True):
        torch._dynamo.reset()
        bench.model = bench.build(torch.float32, **({} if bench.tiny else sizes))
        expected = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=bench.device)
            with torch.inference_mode():
                mask = torch.ones_like(ids)
                made = bench.model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
            expected.append(tuple(made[0, len(prompt) :].tolist()))
        prepare(bench.model, fused=bench.device == "cuda", compile_layers=compiled)
        got = ours(bench, prompts, [new] * len(prompts), limit=16, compile_layers=compiled)
        same = sum(got[number] == text for number, text in enumerate(expected))
        bench.note(f"correct, compiled {compiled}", {"same": same, "of": len(prompts)})
    bench.drop_model()


def part_baseline(bench: Bench) -> None:
    model = bench.fresh_model()
    count, _, new = bench.short
    prompts = bench.short_prompts()
    plain(model, prompts[:4], 4)
    for batch in (32, count):
        some = prompts[:batch]
        bench.note(f"generate(), batch {batch}, short", bench.clock(lambda some=some: plain(model, some, new), 2))
    long, most = bench.long_prompts(), bench.long[1]
    few = 8 if bench.tiny else 128
    bench.note("generate(), batch 1, long", bench.clock(lambda: sum(plain(model, [p], few) for p in long[:3])))
    one_batch = sorted(long, key=len)[len(long) // 2 : len(long) // 2 + 32]
    bench.note("generate(), batch 32, long", bench.clock(lambda: plain(model, one_batch, most)))
    if hasattr(model, "generate_batch") and not bench.tiny:
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        some = prompts[:128]

        def continuous() -> int:
            made = model.generate_batch(some, generation_config=config, progress_bar=False)
            return sum(len(one.generated_tokens) for one in made.values())

        bench.note("generate_batch, short", bench.clock(continuous))


def part_short(bench: Bench, name: str = "ours, short", how: dict[str, float] | None = None) -> None:
    bench.fresh_model()
    prompts, new = bench.short_prompts(), bench.short[2]

    def work() -> int:
        made = ours(bench, prompts, [new] * len(prompts), how=how, compile_layers=_compiled(bench))
        return sum(len(tokens) for tokens in made.values())

    begin = time.perf_counter()
    work()
    first = time.perf_counter() - begin
    bench.note(name, {**bench.clock(work, 3), "first_run_s": first})


def part_sampled(bench: Bench) -> None:
    part_short(bench, "ours, sampled", {"temperature": 0.8, "top_p": 0.95})


def part_long(bench: Bench) -> None:
    bench.fresh_model()
    prompts, new = bench.long_prompts(), bench.long[1]
    _warm(bench)

    def work() -> int:
        made = ours(bench, prompts, [new] * len(prompts), compile_layers=_compiled(bench))
        return sum(len(tokens) for tokens in made.values())

    figures: dict[str, Any] = bench.clock(work)
    for base in ("batch 1", "batch 32"):
        rate = bench.figures.get(f"generate(), {base}, long", {}).get("tokens_per_s")
        if rate:
            figures[f"x {base}"] = figures["tokens_per_s"] / rate
    bench.note("ours, long", figures)


def part_ragged(bench: Bench) -> None:
    bench.fresh_model()
    prompts, most = bench.long_prompts(), bench.long[1]
    rng = random.Random(3)
    ends = [min(most, max(2, int(rng.lognormvariate(4.3, 0.9)))) for _ in prompts]
    _warm(bench)
    from selfinstruct.student.infer.engine import Engine, EngineConfig
    from selfinstruct.student.infer.requests import Request
    from selfinstruct.student.infer.sizing import slots_for

    def work() -> int:
        # The engine believes in the full length, as it must before an end token is seen; each request is then cut.
        longest = max(len(prompt) for prompt in prompts) + most
        slots = slots_for(bench.model, longest + 64, len(prompts))
        graphs = bench.device == "cuda"
        config = EngineConfig(slots, longest, most, graphs=graphs, compiled=_compiled(bench))
        engine = Engine(bench.model, config, [])
        try:
            for number in sorted(range(len(prompts)), key=lambda n: -len(prompts[n])):
                engine.submit(Request(number, tuple(prompts[number]), ends[number]))
            return sum(len(news.tokens) for news in engine.run())
        finally:
            engine.close()

    bench.note("ours, ragged replies", {**bench.clock(work), "mean_new": statistics.mean(ends)})


def part_profile(bench: Bench) -> None:
    import torch

    bench.fresh_model()
    prompts, new = bench.short_prompts(), bench.short[2]
    ours(bench, prompts, [new] * len(prompts), compile_layers=_compiled(bench))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        ours(bench, prompts, [new] * len(prompts), compile_layers=_compiled(bench))
    sort = "self_cuda_time_total" if bench.device == "cuda" else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=sort, row_limit=25, max_name_column_width=90), flush=True)


def part_vllm(bench: Bench) -> None:
    bench.drop_model()
    if bench.device != "cuda":
        print("vllm: needs a GPU", flush=True)
        return
    command = [sys.executable, __file__, "--child-vllm", "--out", bench.options.out + ".vllm"]
    left = max(60.0, bench.deadline - time.monotonic())
    done = subprocess.run(command, timeout=left, check=False, stdout=subprocess.PIPE, text=True)
    print("\n".join(done.stdout.splitlines()[-20:]), flush=True)
    for name, figures in json.loads(Path(bench.options.out + ".vllm").read_text(encoding="utf-8")).items():
        bench.note(name, figures)


def child_vllm(bench: Bench) -> None:
    """In a process of its own: vLLM takes the whole GPU and does not give it back."""
    from vllm import LLM, SamplingParams

    from selfinstruct.student.infer import vllm_engine
    from selfinstruct.student.infer.requests import Request

    folder = Path(tempfile.mkdtemp())
    config = bench.config()
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    engine = vllm_engine.open_engine(
        folder, 1024, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", gpu_memory_utilization=0.92
    )
    if not isinstance(engine, LLM):
        raise TypeError("vLLM is not what it was")
    prompts, new = bench.short_prompts(), bench.short[2]
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    requests = [Request(number, tuple(prompt), new) for number, prompt in enumerate(prompts)]

    def own() -> int:
        made = engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in made)

    def through_us() -> int:
        return sum(len(answer.tokens) for answer in vllm_engine.generate(engine, requests, []))

    own()
    rates: dict[str, list[float]] = {"vLLM's own, short": [], "ours on vLLM, short": []}
    for _ in range(3):
        for name, work in (("vLLM's own, short", own), ("ours on vLLM, short", through_us)):
            rates[name].append(bench.clock(work)["tokens_per_s"])
    for name, seen in rates.items():
        bench.note(name, {"tokens_per_s": statistics.median(seen), "runs": len(seen)})


def _compiled(bench: Bench) -> bool:
    return bench.device == "cuda" and not bench.options.no_compile


def _warm(bench: Bench) -> None:
    """Compile and load kernels before the clock starts."""
    prompts = bench.long_prompts()[:16]
    ours(bench, prompts, [12] * len(prompts), compile_layers=_compiled(bench))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="names with commas between")
    parser.add_argument("--minutes", type=float, default=25.0, help="no part begins after this time")
    parser.add_argument("--out", default="infer.json")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--no-compile", action="store_true", help="CUDA graphs without torch.compile")
    parser.add_argument("--child-vllm", action="store_true", help=argparse.SUPPRESS)
    bench = Bench(parser.parse_args())
    if bench.options.child_vllm:
        child_vllm(bench)
        return
    import torch
    import transformers

    card = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU"
    bench.note("setting", {"device": card, "torch": torch.__version__, "transformers": transformers.__version__})
    for name in bench.options.parts.split(","):
        if time.monotonic() > bench.deadline:
            print(f"{name}: no time left", flush=True)
            continue
        begin = time.monotonic()
        try:
            globals()[f"part_{name}"](bench)
        except Exception:  # noqa: BLE001 (a benchmark shows what it can)
            traceback.print_exc()
            bench.note(f"failed: {name}", {"error": traceback.format_exc().strip().splitlines()[-1][:300]})
        print(f"  ({name}: {time.monotonic() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

"""Fine-tuning speed on a GPU: ours against padded training and TRL's packing, on real tokens, in one interleaved call.

A random LLaMA-7B in bfloat16; rows from a compact file of token ids (see --make-ids). Prints a line as soon as
something is measured, a table at the end, and rewrites --out after each part. A part that fails prints its error; the
rest goes on.

    python tests/benchmarks/finetune.py --make-ids alpaca.jsonl.gz --tokenizer DIR --ids ids.npz      # anywhere
    python tests/benchmarks/finetune.py --ids ids.npz --out figures.json                               # on the GPU
    torchrun --nproc-per-node 2 tests/benchmarks/finetune.py --ids ids.npz --parts full --out two.json # on two
    python tests/benchmarks/finetune.py --tiny                                                         # try it on a CPU

padded8exact trains with fp32 weights under autocast, as the Trainer does with bf16=True: masters as exact as ours. The
other padded parts have bf16 weights alone, which is faster and less exact.

MFU is 6 x parameters x real tokens/s over the measured rate of an 8192^3 bfloat16 product (4 x for adapters in mfu_4n).
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch

from selfinstruct.student import memory
from selfinstruct.student.train import adapters, attention, batches, meter, optimizer, parallel
from selfinstruct.student.train.assembly import assemble
from selfinstruct.student.train.recipes import Recipe
from selfinstruct.student.train.tokens import Tokens, from_rows, tokenise
from selfinstruct.student.train.trainer import Trainer

PARTS = """correctness update padded32 padded16 padded8 padded4 padded8exact padded4exact trl full full-8bit full-bf16
lora qlora products profile""".split()
DEFAULT = "correctness,update,padded32,padded16,padded8,padded4,trl,full,lora,profile"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=Path, help="file of token ids (.npz)")
    parser.add_argument("--make-ids", type=Path, metavar="ROWS", help="make --ids from rows (.jsonl, .jsonl.gz)")
    parser.add_argument("--tokenizer", help="folder or .gguf for --make-ids; without one, ids are random (--lengths)")
    parser.add_argument("--lengths", action="store_true", help="random ids of about the true lengths: bytes / 4")
    parser.add_argument("--rows", type=int, default=0, help="use the first so many rows only")
    parser.add_argument("--parts", default=DEFAULT, help=f"of: {', '.join(PARTS)} [{DEFAULT}]")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing new after this time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of 128 rows in a repeat")
    parser.add_argument("--tokens", type=int, default=0, help="tokens of a micro-batch [what memory allows]")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--shard", default="auto", help="states, weights, over several processes [what memory allows]")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--activation-budget",
        type=float,
        default=1.0,
        help="torch's activation_memory_budget for compiled layers: below 1 recomputes cheap operations",
    )
    parser.add_argument(
        "--join", action="store_true", help="one product for q, k and v, one for gate and up (full only)"
    )
    parser.add_argument("--tune", action="store_true", help="let torch.compile try several shapes of each kernel")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and random rows, also on a CPU")
    parser.add_argument("--out", type=Path, help="write all figures here (JSON)")
    return parser.parse_args()  # fmt: skip


def make_ids(rows_file: Path, tokenizer: str | None, out: Path, rows: int) -> None:
    """Tokenise rows with the Alpaca template as the product does, or draw random ids of their lengths."""
    from selfinstruct.student.examples import Example
    from selfinstruct.student.prompt import ALPACA

    opener = gzip.open if rows_file.suffix == ".gz" else open
    with opener(rows_file, "rt", encoding="utf-8") as stream:
        read = [json.loads(line) for line in stream if line.strip()][: rows or None]
    examples = [Example(r["instruction"], r.get("input") or "", r["output"]) for r in read]
    if tokenizer:
        from selfinstruct.student.models.source import locate
        from selfinstruct.student.models.weights import load_tokenizer

        made = tokenise(examples, ALPACA, load_tokenizer(locate(tokenizer)), max_length=512)
    else:
        made = random_tokens([
            (len(ALPACA.render(e.instruction, e.input).encode()) // 4 + 1, len(e.output.encode()) // 4 + 1)
            for e in examples
        ])  # fmt: skip
    np.savez_compressed(out, ids=made.ids.astype(np.uint16), lengths=made.lengths.astype(np.uint16),
                        loss_from=made.loss_from.astype(np.uint16))  # fmt: skip
    print(f"{out}: {len(made)} rows, {len(made.ids)} tokens, {int(made.labels.sum())} labels, "
          f"{out.stat().st_size / 1e6:.1f} MB")  # fmt: skip


def random_tokens(lengths: list[tuple[int, int]], words: int = 32000, max_length: int = 512) -> Tokens:
    rng = np.random.default_rng(0)
    rows = [[*rng.integers(3, words, p + c)[: max_length - 1].tolist(), 2] for p, c in lengths]
    firsts = [max(1, min(p, len(row) - 1)) for (p, _), row in zip(lengths, rows, strict=True)]
    return from_rows(rows, firsts, eos=2, max_length=max_length)


def load_ids(path: Path) -> Tokens:
    found = np.load(path)
    starts = np.concatenate([[0], np.cumsum(found["lengths"].astype(np.int64))])
    return Tokens(found["ids"].astype(np.int32), starts, found["loss_from"].astype(np.int32))


class Bench:
    """One model, many ways to train it."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.args, self.begun = args, time.perf_counter()
        self.group = parallel.join("cuda" if torch.cuda.is_available() else "cpu")
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.group.local_rank) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        tiny = (
            {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
            if args.tiny
            else {}
        )
        config = LlamaConfig(**{"max_position_embeddings": 2048, "use_cache": False, **tiny})
        attention.register()
        self.kernel = attention.choose(self.device, self.dtype, args.attention)
        self.recipe = Recipe("benchmark", batch=16 if args.tiny else 128, lr=1e-5)
        rng = np.random.default_rng(1)
        self.tokens = (
            load_ids(args.ids)
            if args.ids
            else random_tokens([(int(rng.integers(20, 120)), int(rng.integers(5, 100))) for _ in range(2000)])
        )
        self.log(f"torch {torch.__version__}, attention {self.kernel.kernel} ({self.kernel.reason})")
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        with self.device:
            self.model = LlamaForCausalLM(config)
        torch.set_default_dtype(default)
        if args.join:
            import joined

            joined.join(self.model)
        if args.tune:
            import torch._inductor.config as inductor

            inductor.coordinate_descent_tuning = True
        self.casts = False  # whether padded training computes in bfloat16 by autocast
        self.shape = memory.shape_of(config)
        self.rate = meter.matmul_rate(self.device) or 1e12
        self.log(f"{self.shape.parameters / 1e9:.3f}e9 parameters; matmul {self.rate / 1e12:.1f} TFLOP/s; "
                 f"{len(self.tokens)} rows, {self.tokens.lengths.mean():.1f} tokens a row")  # fmt: skip
        self.figures: dict[str, Any] = {
            "torch": str(torch.__version__), "device": torch.cuda.get_device_name() if self.cuda else "cpu",
            "matmul_tflops": self.rate / 1e12, "world": self.group.world, "parts": {}, "checks": {},
        }  # fmt: skip
        self.assembled: dict[str, Any] = {}
        self.shares: dict[str, Any] = {}  # how processes share the work, by method
        self.budgets: dict[str, int] = {}  # what a rehearsal found to fit

    def log(self, text: str) -> None:
        if self.group.leads:
            print(f"[{time.perf_counter() - self.begun:6.1f} s] {text}", flush=True)

    def late(self) -> bool:
        return time.perf_counter() - self.begun > self.args.minutes * 60

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def clear(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def note(self, part: str, tokens: int, seconds: float, **more: Any) -> None:
        """Keep one repeat's figures."""
        speed = tokens / seconds
        peak = torch.cuda.max_memory_allocated() if self.cuda else 0
        mfu = 6 * self.shape.parameters * speed / self.rate / self.group.world
        found = {"tokens_per_second": speed, "mfu": mfu, "mfu_4n": mfu * 4 / 6, "peak_gib": peak / 2**30,
                 "seconds": seconds, "tokens": tokens, **more}  # fmt: skip
        self.figures["parts"].setdefault(part, []).append(found)
        self.log(
            f"{part:10} {speed:9,.0f} tokens/s  MFU {mfu:6.1%}  peak {peak / 2**30:6.1f} GiB  "
            + "  ".join(f"{k} {v}" for k, v in more.items())
        )
        self.write()

    def write(self) -> None:
        if self.args.out and self.group.leads:
            self.args.out.parent.mkdir(parents=True, exist_ok=True)
            self.args.out.write_text(json.dumps(self.figures, indent=1) + "\n")

    # ours

    def trainer(self, part: str) -> tuple[Trainer, memory.Plan]:
        """The product's trainer on the shared model. Layers are compiled once; adapters stay once they are on."""
        method = part.split("-")[0]
        compiled = self.cuda and self.kernel.compiles and not self.args.no_compile
        state = part.partition("-")[2] or "auto"
        self.model.set_attn_implementation(self.kernel.implementation)
        if method == "full" and "full" not in self.assembled:
            torch._functorch.config.activation_memory_budget = self.args.activation_budget
            self.assembled["full"] = assemble(self.model, compiled=compiled)
        if method != "full" and method not in self.assembled:
            if method == "qlora":
                four_bit(self.model)
            adapters.add(self.model, Recipe("x", method="lora"), "random")
            self.assembled[method] = self.assembled.get("full") or assemble(
                self.model, compiled=compiled and method == "lora"
            )
        recipe = Recipe("benchmark", batch=self.recipe.batch, lr=1e-5, method=method)
        steps = batches.steps_per_epoch(len(self.tokens), recipe.batch)
        most, share = batches.heaviest(
            self.tokens.lengths, self.tokens.labels, recipe.batch, recipe.seed, steps, self.group.world
        )
        free = torch.cuda.mem_get_info()[0] + 2 * self.shape.parameters + memory.CONTEXT if self.cuda else 1 << 50
        if method == "qlora":
            free = 8 << 30  # the bar: a peak of at most 8 GiB
        plan = memory.choose(
            self.shape, method, free, step_tokens=most,
            longest=int(self.tokens.lengths.max()), label_share=share,
            adam_state=state, tokens=self.args.tokens, compiled=compiled and method != "qlora", world=self.group.world,
            scheme=self.args.shard, bytes_per_number=2 if self.cuda else 4,
        )  # fmt: skip
        if plan is None:
            raise RuntimeError(f"{part} does not fit {free / 1e9:.0f} GB")
        trainee = self.assembled[method]
        trainee.checkpoint_layers(plan.checkpointed_layers)
        if method not in self.shares:
            self.shares[method] = parallel.share(trainee, self.group, method, plan.scheme)
        share = self.shares[method]
        settings = optimizer.AdamSettings(state=plan.adam_state)
        adam = optimizer.SplitAdamW(
            share.in_order(trainee.named_trained()), settings, share=share,
            compiled=self.cuda and not self.args.no_compile,
        )  # fmt: skip
        made = Trainer(
            trainee,
            adam,
            self.tokens,
            recipe,
            steps=steps,
            budget=self.budgets.get(part, plan.tokens),
            group=self.group,
            device=self.device,
        )
        return made, plan

    def ours(self, part: str, repeat: int) -> None:
        self.clear()
        trainer, plan = self.trainer(part)
        if repeat == 0:
            self.log(
                f"{part}: {plan.adam_state} moments, <= {plan.tokens} tokens, {plan.checkpointed_layers} layers "
                f"recomputed; {plan.reason}"
            )
            begun = time.perf_counter()
            trainer.rehearse(self.log, may_shrink=not self.args.tokens and self.group.world == 1)
            self.budgets[part] = trainer.budget
            self.sync()
            self.log(f"{part}: rehearsed and compiled in {time.perf_counter() - begun:.1f} s")
        trainer.step(0).read()
        self.sync()
        begun, tokens, results = time.perf_counter(), 0, []
        for step in range(1 + repeat * self.args.steps, 1 + (repeat + 1) * self.args.steps):
            results.append(trainer.step(step))
        host = (time.perf_counter() - begun) / self.args.steps
        self.sync()
        seconds = time.perf_counter() - begun
        tokens = sum(r.tokens for r in results)
        losses = [round(r.read()[0], 4) for r in results]
        micro = max(1, -(-max(r.tokens for r in results) // (trainer.budget * self.group.world)))
        self.note(part, tokens, seconds, predicted_gib=round(plan.total / 2**30, 1), micro_batches=micro,
                  host_ms=round(host * 1e3), losses=losses)  # fmt: skip

    # baselines

    def padded(self, part: str, repeat: int) -> None:
        """What the Hugging Face Trainer does for a padded batch of 128 rows, without its own overhead."""
        exact = part.endswith("exact")
        size = int(part.removeprefix("padded").removesuffix("exact"))
        self.clear()
        self.model.set_attn_implementation("sdpa")
        with self.plain_layers(), self.masters() if exact else nullcontext():
            adam = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.0, fused=self.cuda)
            order = batches.epoch_order(len(self.tokens), self.recipe.seed, 0)
            steps = [order[i * self.recipe.batch : (i + 1) * self.recipe.batch] for i in range(3)]
            self._padded_step(steps[0][: 2 * size], size, adam)
            self.sync()
            begun = time.perf_counter()
            count = 1 if size < 16 else 2
            for rows in steps[1 : 1 + count]:
                self._padded_step(rows, size, adam)
            self.sync()
            tokens = sum(int(self.tokens.lengths[rows].sum()) for rows in steps[1 : 1 + count])
            self.note(part, tokens, time.perf_counter() - begun)

    @contextmanager
    def plain_layers(self) -> Iterator[None]:
        """The model as a baseline meets it: our compiled layers put aside, and its own changes undone afterwards."""
        layers = list(self.model.model.layers)
        ours = [layer.__dict__.pop("forward", None) for layer in layers]
        recomputes = [layer.gradient_checkpointing for layer in layers]
        for layer in layers:
            layer.gradient_checkpointing = False
        try:
            yield
        finally:
            self.model.__dict__.pop("forward", None)  # accelerate and TRL put theirs there
            for layer, forward, again in zip(layers, ours, recomputes, strict=True):
                layer.gradient_checkpointing = again
                if forward is not None:
                    layer.forward = forward

    @contextmanager
    def masters(self) -> Iterator[None]:
        """The model in fp32, computing in bfloat16 by autocast."""
        self.model.float()
        self.casts = True
        try:
            yield
        finally:
            self.casts = False
            self.clear()
            self.model.to(self.dtype)

    def _padded_step(self, rows: Any, size: int, adam: Any) -> None:
        labels = int(self.tokens.labels[rows].sum())
        for start in range(0, len(rows), size):
            self.padded_loss(rows[start : start + size], labels).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)

    def padded_loss(self, rows: Any, divisor: int) -> torch.Tensor:
        ids, mask, labels = padded_batch(self.tokens, rows, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.casts):
            found = self.model(
                input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=divisor, use_cache=False
            )
        return found.loss

    def trl(self, part: str, repeat: int) -> None:
        try:
            import datasets
            import trl
        except ImportError as error:
            self.log(f"trl absent ({error})")
            self.figures["parts"].setdefault("trl", "absent")
            return
        self.clear()
        self.model.set_attn_implementation("sdpa")
        rows = batches.epoch_order(len(self.tokens), self.recipe.seed, 0)[: self.recipe.batch * 12]
        data = datasets.Dataset.from_dict({
            "input_ids": [self.tokens.row(int(r)).tolist() for r in rows],
            "completion_mask": [
                [int(i >= self.tokens.loss_from[r]) for i in range(len(self.tokens.row(int(r))))] for r in rows
            ],
        })  # fmt: skip
        marks: list[float] = []

        class Clock(__import__("transformers").TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())

        config = trl.SFTConfig(
            output_dir="/tmp/trl-benchmark", packing=True, max_length=2048, per_device_train_batch_size=4, max_steps=4,
            gradient_accumulation_steps=2, bf16=self.cuda, gradient_checkpointing=False, save_strategy="no",
            report_to=[], logging_strategy="no", use_cpu=not self.cuda,
            optim="adamw_torch_fused" if self.cuda else "adamw_torch",
        )  # fmt: skip
        with self.plain_layers():
            trainer = trl.SFTTrainer(
                self.model, args=config, train_dataset=data, processing_class=bare_tokenizer(), callbacks=[Clock()]
            )
            packed = sum(len(r) for r in trainer.train_dataset["input_ids"]) / len(trainer.train_dataset)
            trainer.train()
            self.note(part, int(packed * 4 * 2 * (len(marks) - 1)), marks[-1] - marks[0])

    # checks

    @torch.no_grad()
    def correctness(self, part: str, repeat: int) -> None:
        """Packed against separate logits, step loss and gradient against the padded ones; once."""
        if repeat:
            return
        self.clear()
        rows = batches.epoch_order(len(self.tokens), self.recipe.seed, 0)[:8]
        batch = batches.join(self.tokens, [int(r) for r in rows], longest=512, device=self.device)
        trainee = assemble(self.model)
        self.model.set_attn_implementation(self.kernel.implementation)
        packed = trainee.hidden_states(batch) @ self.model.lm_head.weight.T
        self.model.set_attn_implementation("sdpa")
        far, noise = 0.0, 0.0
        for i, row in enumerate(rows):
            ids = torch.from_numpy(self.tokens.row(int(row)).astype(np.int64))[None].to(self.device)
            own = self.model(input_ids=ids, use_cache=False).logits[0].float()
            start, end = int(batch.bounds[i]), int(batch.bounds[i + 1])
            far = max(far, (packed[start:end].float() - own).abs().max().item())
            noise = max(noise, own.abs().max().item())
        self.check("packed_vs_separate_max_logit_difference", far, f"largest logit {noise:.3f}")
        rows = [int(r) for r in batches.epoch_order(len(self.tokens), self.recipe.seed, 0)[: self.recipe.batch]]
        labels = int(self.tokens.labels[rows].sum())
        padded = sum(float(self.padded_loss(np.array(rows[i : i + 16]), labels)) for i in range(0, len(rows), 16))
        self.model.set_attn_implementation(self.kernel.implementation)
        bins = batches.cut([int(n) for n in self.tokens.lengths[rows]], 8192)[0]
        ours = sum(
            float(trainee(batches.join(self.tokens, [rows[i] for i in b], longest=512, device=self.device), labels))
            for b in bins
        )
        self.check(
            "step_loss_relative_difference", abs(ours - padded) / padded, f"ours {ours:.6f}, padded {padded:.6f}"
        )

    def update(self, part: str, repeat: int) -> None:
        """The compiled update against torch.optim.AdamW on fp32 masters, and its speed."""
        if repeat:
            return
        self.clear()
        with torch.random.fork_rng(devices=[self.device] if self.cuda else []):
            torch.manual_seed(5)
            start = torch.randn(1 << 20, device=self.device).bfloat16()
            grads = [torch.randn_like(start) * 0.1 for _ in range(5)]
        for state in ("fp32", "bf16", "8bit"):
            parameter = torch.nn.Parameter(start.clone())
            adam = optimizer.SplitAdamW(
                iter([("w", parameter)]), optimizer.AdamSettings(state=state, max_norm=0), compiled=self.cuda
            )
            master = torch.nn.Parameter(start.float())
            reference = torch.optim.AdamW([master], lr=1e-3, weight_decay=0.0)
            for grad in grads:
                parameter.grad, master.grad = grad.clone(), grad.float()
                adam.step(1e-3, torch.ones((), device=self.device))
                reference.step()
            exact = optimizer.join_halves(parameter.detach().view(torch.int16), adam.state_tensors()["w/low"])
            gone = (master.detach() - start.float()).abs().mean()
            self.check(
                f"update_{state}_mean_relative_error",
                ((exact - master.detach()).abs().mean() / gone).item(),
                "after 5 steps",
            )

    def check(self, name: str, value: float, more: str) -> None:
        self.figures["checks"][name] = {"value": value, "more": more}
        self.log(f"check {name}: {value:.3e} ({more})")
        self.write()

    def profile(self, part: str, repeat: int) -> None:
        """Where a full step's time goes; once."""
        if repeat or not self.cuda:
            return
        self.clear()
        trainer, _ = self.trainer("full")
        for step in (0, 1):
            trainer.step(step).read()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        ) as seen:
            begun = time.perf_counter()
            for step in (2, 3):
                result = trainer.step(step)
            result.read()
            self.sync()
            wall = time.perf_counter() - begun
        self.figures["timeline_ms"] = timeline(seen, wall)
        self.log(f"two steps, milliseconds: {self.figures['timeline_ms']}")
        self.log(
            "profile of two steps:\n"
            + seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70)
        )
        sums: dict[str, float] = {}
        for event in seen.key_averages():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                kind = kernel_kind(event.key)
                sums[kind] = sums.get(kind, 0.0) + event.self_device_time_total / 1e3
        self.figures["profile_ms"] = {k: round(v, 1) for k, v in sorted(sums.items(), key=lambda p: -p[1])}
        self.log(f"milliseconds by kind: {self.figures['profile_ms']}, {sum(sums.values()):.1f} in all")
        self.write()

    def products(self, part: str, repeat: int) -> None:
        """TFLOP/s of the products of a step at their real shapes, apart and joined; once."""
        if repeat or not self.cuda:
            return
        self.clear()
        d, f, tokens = self.shape.width, self.shape.feed_forward, 8128
        for name, (wide, narrow) in {"q": (d, d), "qkv": (3 * d, d), "gate": (f, d), "gate+up": (2 * f, d),
                                     "down": (d, f), "head": (self.shape.vocabulary, d)}.items():  # fmt: skip
            x, g, w = (torch.randn(*size, device=self.device, dtype=torch.bfloat16)
                       for size in ((tokens, narrow), (tokens, wide), (wide, narrow)))  # fmt: skip
            total = torch.zeros_like(w)
            ways: dict[str, Any] = {
                "forward": lambda x=x, w=w: x @ w.T, "to the input": lambda g=g, w=w: g @ w,
                "to the weight": lambda g=g, x=x: g.T @ x, "added to it": lambda t=total, g=g, x=x: t.addmm_(g.T, x),
            }  # fmt: skip
            rates = {way: 2.0 * tokens * wide * narrow / seconds_of(work) / 1e12 for way, work in ways.items()}
            self.figures.setdefault("products_tflops", {})[name] = rates
            self.log(f"{name:8} " + "  ".join(f"{way} {rate:.0f}" for way, rate in rates.items()))
        self.write()

    def run(self) -> None:
        parts = [p.strip() for p in self.args.parts.split(",") if p.strip()]
        unknown = set(parts) - set(PARTS)
        if unknown:
            sys.exit(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
        once = [p for p in parts if p in ("correctness", "update", "products", "profile")]
        timed = [p for p in parts if p not in once and p not in ("lora", "qlora")]
        adapted = [p for p in ("lora", "qlora") if p in parts]  # adapters cannot be taken off: they come last
        turns = [(p, 0) for p in once if p != "profile"]
        turns += [(p, r) for r in range(self.args.repeats) for p in timed]
        turns += [(p, 0) for p in once if p == "profile"]
        turns += [(p, r) for p in adapted for r in range(self.args.repeats)]
        broken: set[str] = set()
        for part, repeat in turns:
            if part in broken:
                continue
            if self.late():
                self.log(f"out of time before {part} (repeat {repeat})")
                break
            kind = part if part in once or part == "trl" else "padded" if part.startswith("padded") else "ours"
            try:
                getattr(self, kind)(part, repeat)
            except Exception as error:  # noqa: BLE001 - a benchmark's part may fail alone
                broken.add(part)
                text = "".join(traceback.format_exception(error)[-12:])
                self.figures["parts"].setdefault(part, []) if part not in once else None
                self.figures.setdefault("errors", {})[part] = text
                self.log(f"{part} FAILED: {type(error).__name__}: {str(error)[:600]}\n{text[-2500:]}")
        self.table()

    def table(self) -> None:
        """Medians, and the ratios that count."""
        speeds = {p: statistics.median(f["tokens_per_second"] for f in found)
                  for p, found in self.figures["parts"].items()
                  if isinstance(found, list) and found}  # fmt: skip
        self.log(f"{'part':10} {'tokens/s':>10} {'MFU':>7} {'spread':>7} {'peak GiB':>9}")
        for part, speed in speeds.items():
            found = self.figures["parts"][part]
            all_speeds = [f["tokens_per_second"] for f in found]
            spread = (max(all_speeds) - min(all_speeds)) / speed
            self.log(f"{part:10} {speed:10,.0f} {statistics.median(f['mfu'] for f in found):7.1%} {spread:7.1%} "
                     f"{max(f['peak_gib'] for f in found):9.1f}")  # fmt: skip
        padded = [s for p, s in speeds.items() if p.startswith("padded") and not p.endswith("exact")]
        exact = [s for p, s in speeds.items() if p.endswith("exact")]
        ratios = {}
        if "full" in speeds:
            ratios["epochs_3_of_the_52k_minutes"] = 3 * 6_600_133 / speeds["full"] / 60
            if padded:
                ratios["full_over_best_padded"] = speeds["full"] / max(padded)
            if exact:
                ratios["full_over_best_padded_with_masters"] = speeds["full"] / max(exact)
            if "trl" in speeds:
                ratios["full_over_trl_packing"] = speeds["full"] / speeds["trl"]
            if "lora" in speeds:
                ratios["lora_over_full"] = speeds["lora"] / speeds["full"]
        self.figures["ratios"] = ratios
        for name, value in ratios.items():
            self.log(f"{name}: {value:.2f}")
        self.write()


def seconds_of(work: Any, repeats: int = 20) -> float:
    """Seconds of a call on the GPU, mean of ``repeats`` after three to warm up."""
    for _ in range(3):
        work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def timeline(seen: Any, wall: float) -> dict[str, float]:
    """Of a profile on one GPU, in milliseconds: the time with computing kernels, with exchanging ones, the exchange
    that no computation hides, and the time with neither."""
    spans: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    both = covered(spans[False] + spans[True])
    found = {"wall": wall * 1e6, "computing": covered(spans[False]), "exchanging": covered(spans[True]),
             "exchange_not_hidden": both - covered(spans[False]), "idle": wall * 1e6 - both}  # fmt: skip
    return {name: round(micros / 1e3, 1) for name, micros in found.items()}


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def kernel_kind(name: str) -> str:
    """What a kernel does, by its name."""
    kinds = {"exchange": ("nccl",), "attention": ("flash", "fmha"),
             "product": ("nvjet", "gemm", "cutlass", "xmma", "cublas"),
             "compiled": ("triton",), "copy": ("memcpy", "memset"), "norm of gradients": ("norm", "reduce"),
             "elementwise": ("elementwise",)}  # fmt: skip
    low = name.lower()
    return next((kind for kind, words in kinds.items() if any(word in low for word in words)), "other")


def padded_batch(tokens: Tokens, rows: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded (ids, mask, labels) of rows, each (rows, longest)."""
    longest = int(tokens.lengths[rows].max())
    ids, mask, labels = (torch.full((len(rows), longest), fill) for fill in (2, 0, -100))
    for i, row in enumerate(rows):
        own = torch.from_numpy(tokens.row(int(row)).astype(np.int64))
        ids[i, : len(own)], mask[i, : len(own)] = own, 1
        first = int(tokens.loss_from[row])
        labels[i, first : len(own)] = own[first:]
    return ids.to(device), mask.to(device), labels.to(device)


def bare_tokenizer() -> Any:
    """TRL wants a tokenizer although the rows are ids already: three special tokens are enough."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def four_bit(model: Any) -> None:
    """Turn the layers' linear maps into NF4 ones in place (needs bitsandbytes)."""
    import bitsandbytes as bnb

    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if type(linear) is torch.nn.Linear:
                    small = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False,
                                              compute_dtype=torch.bfloat16,
                                              compress_statistics=True, quant_type="nf4")  # fmt: skip
                    small.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4",
                                                     compress_statistics=True, module=small)  # fmt: skip
                    setattr(parent, name, small.to(linear.weight.device))


if __name__ == "__main__":
    given = arguments()
    if given.make_ids:
        if not given.tokenizer and not given.lengths:
            sys.exit("--make-ids needs --tokenizer DIR, or --lengths for random ids of about the true lengths")
        make_ids(given.make_ids, given.tokenizer, given.ids or Path("ids.npz"), given.rows)
    else:
        bench = Bench(given)
        try:
            bench.run()
        finally:
            parallel.leave()

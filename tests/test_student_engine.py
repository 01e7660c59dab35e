"""The engine: greedy texts equal one-by-one generate(), draws belong to rows, slots are reused."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the student room needs torch")
pytest.importorskip("transformers", reason="the student room needs transformers")

from student_tiny import tiny_config  # noqa: E402

from selfinstruct.errors import EnvironmentFault, UsageError  # noqa: E402
from selfinstruct.student.infer import attends, sampling, sizing  # noqa: E402
from selfinstruct.student.infer.engine import Engine, EngineConfig, _rounded  # noqa: E402
from selfinstruct.student.infer.fuse import fuse  # noqa: E402
from selfinstruct.student.infer.generation import BatchOptions, generate  # noqa: E402
from selfinstruct.student.infer.left_padded import generate_left_padded  # noqa: E402
from selfinstruct.student.infer.requests import Request  # noqa: E402
from selfinstruct.student.infer.sampling import Sampling  # noqa: E402
from selfinstruct.student.infer.slots import Pass, unsupported  # noqa: E402


def model(**changes: Any) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaForCausalLM(tiny_config(initializer_range=0.2, **changes)).eval()
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    return made


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(3, 320) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def one_by_one(made: Any, texts: list[list[int]], new: int, ends: set[int]) -> list[tuple[int, ...]]:
    found = []
    for text in texts:
        ids = torch.tensor([text])
        with torch.inference_mode():
            out = made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        found.append(cut(out[0, len(text) :].tolist(), ends))
    return found


def cut(tokens: Sequence[int], ends: set[int]) -> tuple[int, ...]:
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:end])


def run(engine: Engine, requests: list[Request]) -> dict[int, tuple[int, ...]]:
    for request in requests:
        engine.submit(request)
    gained: dict[int, tuple[int, ...]] = {request.request_id: () for request in requests}
    for news in engine.run():
        gained[news.request_id] += news.tokens
    return gained


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "attention_bias": True}])
def test_greedy_texts_equal_one_by_one_generate(fused: bool, changes: dict[str, Any]) -> None:
    made, texts = model(**changes), prompts(13)
    plain = one_by_one(made, texts, 14, set())
    ends = {token for text in plain[::3] for token in text[4:6]}  # so that some end early, at many places
    expected = [cut(text, ends) for text in plain]
    assert len({len(text) for text in expected}) > 3
    assert not fused or fuse(made)
    engine = Engine(made, EngineConfig(slots=5, longest=64, most_new=20, chunk=3), ends)
    requests = [Request(number, tuple(text), 14) for number, text in enumerate(texts)]
    assert [run(engine, requests)[number] for number in range(len(texts))] == expected
    assert run(engine, requests[:2])[1] == expected[1]
    engine.close()


def test_generate_answers_all_in_groups_and_says_why_each_ended() -> None:
    made, texts = model(), [*prompts(9), prompts(1, 300)[0] * 200]
    texts[-1] = texts[-1][:300]
    expected = one_by_one(made, texts, 6, set())
    ends = {expected[0][2]}
    requests = [Request(number, tuple(text), 6) for number, text in enumerate(texts)]
    seen = {answer.request_id: answer for answer in generate(made, requests, ends, BatchOptions(limit=4))}
    assert sorted(seen) == list(range(10))
    for number, text in enumerate(expected):
        cut = next((place for place, token in enumerate(text) if token in ends), None)
        assert seen[number].tokens == text[:cut]
        assert seen[number].ended == ("length" if cut is None else "stop")


def test_draws_belong_to_the_row_and_not_to_the_batch() -> None:
    made, texts = model(), prompts(11)
    requests = [
        Request(number, tuple(text), 12, Sampling(1.0, 0.9, 0.02, seed=number)) for number, text in enumerate(texts)
    ]
    small, large = EngineConfig(2, 64, 12, chunk=1), EngineConfig(11, 64, 12, chunk=5)
    alone, together = (run(Engine(made, config, []), requests) for config in (small, large))
    assert alone == together
    other = [Request(r.request_id, r.prompt, 12, Sampling(1.0, 0.9, 0.02, seed=99)) for r in requests]
    assert run(Engine(made, large, []), other) != together


def test_logprobs_are_those_of_the_model() -> None:
    made, text = model(), prompts(1)[0]
    engine = Engine(made, EngineConfig(2, 64, 5), [])
    engine.submit(Request(0, tuple(text), 5, logprobs=True))
    engine.submit(Request(1, tuple(text), 5))
    mine = [news for news in engine.run() if news.request_id == 0]
    tokens = [token for news in mine for token in news.tokens]
    entries = [entry for news in mine for entry in news.logprobs]
    with torch.inference_mode():
        table = torch.log_softmax(model()(torch.tensor([text + tokens])).logits[0].float(), -1)
    for place, (token, entry) in enumerate(zip(tokens, entries, strict=True)):
        assert entry.chosen == pytest.approx(float(table[len(text) - 1 + place, token]), abs=1e-4)
        assert entry.top[0] == (token, pytest.approx(entry.chosen))
        assert len(entry.top) == sampling.TOP_LOGPROBS


def test_a_cancelled_request_brings_no_more_news_and_frees_its_slot() -> None:
    made, texts = model(), prompts(3)
    expected = one_by_one(made, texts, 20, set())
    engine = Engine(made, EngineConfig(1, 64, 20, chunk=2), [])
    for number, text in enumerate(texts):
        engine.submit(Request(number, tuple(text), 20))
    engine.step()
    engine.cancel(0)
    engine.cancel(1)
    seen = list(engine.run())
    assert {news.request_id for news in seen} == {2}
    assert tuple(token for news in seen for token in news.tokens) == expected[2]


@pytest.mark.parametrize(("prompt", "new"), [((), 3), ((5,), 0), ((5,) * 60, 10), ((5,), 21)])
def test_what_cannot_fit_is_refused_at_once(prompt: tuple[int, ...], new: int) -> None:
    engine = Engine(model(), EngineConfig(1, 64, 20), [])
    with pytest.raises(UsageError):
        engine.submit(Request(0, prompt, new))


def test_memory_that_runs_out_is_told_with_a_smaller_batch() -> None:
    made = model()

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    made.model.layers[1].register_forward_pre_hook(full)
    requests = [Request(number, tuple(text), 4) for number, text in enumerate(prompts(8))]
    with pytest.raises(EnvironmentFault, match="memory does not suffice") as caught:
        list(generate(made, requests, [], BatchOptions()))
    assert "--batch 4" in caught.value.hint


def test_the_coldest_temperature_draws_the_likeliest() -> None:
    logits, ones = torch.randn(5, 50) * 20, torch.ones(5)
    drawn = sampling.sampled(logits, 1e-42 * ones, ones, 0 * ones, torch.rand(5))
    assert drawn.tolist() == logits.argmax(-1).tolist()


def test_sampling_cuts_by_top_p_and_min_p() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4, 1)
    ones = torch.ones(4)
    draw = torch.tensor([0.0, 0.49, 0.51, 0.999])
    everything = sampling.sampled(logits, ones, ones, 0 * ones, draw)
    assert everything.tolist() == [0, 0, 1, 3]
    assert sampling.sampled(logits, ones, 0.7 * ones, 0 * ones, draw).tolist() == [0, 0, 0, 1]
    assert sampling.sampled(logits, ones, ones, 0.5 * ones, draw).tolist() == [0, 0, 0, 1]
    assert sampling.sampled(logits, 0 * ones, ones, 0 * ones, draw).tolist() == [0, 0, 0, 0]


def test_products_attend_as_sdpa_does() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(5, 8, 16), torch.randn(9, 96, 2, 16), torch.randn(9, 96, 2, 16)
    used = torch.randint(1, 64, (5,), dtype=torch.int32)
    step = Pass(used, used, (), used, 0, used, 64, attends.decode_sdpa)
    expected = attends.decode_sdpa(query, keys, values, step, 0.25)
    grouped = query.view(5, 2, 4, 16)
    seen = attends._products(grouped, keys[:5, :64], values[:5, :64], used, 0.25).reshape(5, 8, 16)
    torch.testing.assert_close(seen, expected)


def test_models_that_attend_otherwise_go_left_padded_and_say_so() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16, initializer_range=0.2,
    )  # fmt: skip
    made = MistralForCausalLM(config).eval()
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    assert "sliding" in unsupported(config)
    asking = copy.deepcopy(made)
    asking.generation_config.repetition_penalty = 1.5  # as many models bring one: nobody asked for it here
    texts = prompts(7, 30)
    expected = one_by_one(made, texts, 8, set())
    said: list[str] = []
    requests = [Request(number, tuple(text), 8) for number, text in enumerate(texts)]
    answers = generate(asking, requests, [], BatchOptions(limit=3, log=said.append))
    assert {answer.request_id: answer.tokens for answer in answers} == dict(enumerate(expected))
    assert "sliding window" in said[0]


def test_left_padded_rows_keep_their_draws_whatever_runs_beside_them() -> None:
    """A smaller batch, a run that was broken off, greedy rows between, and the engine: the same texts."""
    made, texts = model(), prompts(9)
    ways = [Sampling(1.0, 0.9, 0.02, seed=number) for number in range(9)]
    ways[4], ways[7] = Sampling(), Sampling(0.7, seed=3)
    requests = [Request(number, tuple(texts[number]), 5 + number, ways[number]) for number in range(9)]

    def answered(some: list[Request], limit: int) -> dict[int, tuple[int, ...]]:
        found = generate_left_padded(made, some, [], limit=limit)
        return {answer.request_id: answer.tokens for answer in found}

    whole = answered(requests, 32)
    assert answered(requests, 2) == whole
    assert answered(requests[3:], 4) == {number: whole[number] for number in range(3, 9)}
    assert whole[4] == one_by_one(made, [texts[4]], 9, set())[0]
    assert len({whole[number][:3] for number in range(9)}) > 5
    assert run(Engine(made, EngineConfig(9, 64, 13), []), requests) == whole


def test_groups_hold_requests_of_like_size_once_their_slots_are_full() -> None:
    requests = [Request(number, (1,) * size, 10) for number, size in enumerate((5, 400, 390, 8, 60, 7, 6))]
    groups = sizing.groups_of_like_size(requests, lambda columns: max(1, 900 // columns))
    assert [[len(r.prompt) for r in group] for group in groups] == [[400, 390], [60, 8, 7, 6, 5]]


def test_rows_of_a_step_are_rounded_to_few_values() -> None:
    sizes = {_rounded(running, 512) for running in range(1, 513)}
    assert len(sizes) < 45
    assert all(_rounded(running, 512) >= running for running in range(1, 513))
    assert _rounded(500, 505) == 505

"""The served student: OpenAI's shapes, honoured fields, refused ones, and who may ask."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the student room needs torch")
pytest.importorskip("transformers", reason="the student room needs transformers")

import aiohttp
from aiohttp import web
from student_tiny import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer
from typer.testing import CliRunner

from selfinstruct.backends.base import is_loopback_host
from selfinstruct.backends.http import HttpBackend, Sampling
from selfinstruct.cli.app import app as APP
from selfinstruct.errors import ModelNotFound, PromptRefused, SelfInstructError, ServerError, UsageError
from selfinstruct.records import Prompt
from selfinstruct.student.dialogue import encode_dialogue
from selfinstruct.student.models.weights import load
from selfinstruct.student.prompt import ALPACA, Template
from selfinstruct.student.serve import serving
from selfinstruct.student.serve.serve import Service, application

ASK = {"messages": [{"role": "user", "content": "count stars"}], "max_tokens": 8}
Ask = Callable[..., Awaitable[tuple[int, Any]]]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    loaded = load(str(tiny_model(tmp_path_factory.mktemp("model") / "tiny", initializer_range=0.2)))
    made = serving.open_service(loaded, slots=4, context=400)
    yield made
    made.live.close()


def served(service: Service, work: Callable[[str, Ask], Awaitable[Any]], **options: Any) -> Any:
    """Run ``work(url, ask)`` while the service is up."""

    async def up() -> Any:
        runner = web.AppRunner(application(service, **options), handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            async with aiohttp.ClientSession() as session:

                async def ask(path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
                    verb = session.get if body is None else session.post
                    data = body if isinstance(body, str) or body is None else json.dumps(body)
                    async with verb(url + path, data=data, headers=headers) as response:
                        text = await response.text()
                        return response.status, json.loads(text) if text.startswith("{") else text

                return await work(url, ask)
        finally:
            await runner.cleanup()

    return asyncio.run(up())


def asked(service: Service, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    async def work(_url: str, ask: Ask) -> Any:
        return await ask(path, body, **headers)

    return served(service, work)  # type: ignore[no-any-return]


def chat(service: Service, **more: Any) -> Any:
    status, body = asked(service, "/v1/chat/completions", {**ASK, **more})
    assert status == 200, body
    return body


def test_models_names_the_student(service: Service) -> None:
    status, body = asked(service, "/v1/models")
    assert (status, body["data"][0]["id"]) == (200, "student")
    assert asked(service, "/health")[1]["status"] == "ok"
    assert asked(service, "/v1/models/student")[1] == body["data"][0]
    assert asked(service, "/v1/models/other")[0] == 404


def test_the_same_seed_gives_the_same_text_and_n_gives_n_different_ones(service: Service) -> None:
    first, again = chat(service, seed=5, n=3), chat(service, seed=5, n=3)
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert len(set(texts)) == 3
    assert first["usage"]["completion_tokens"] <= 24
    assert chat(service, seed=6)["choices"][0]["message"]["content"] not in texts


def test_stop_texts_end_the_reply_and_are_not_in_it(service: Service) -> None:
    whole = chat(service, seed=1, max_tokens=30)["choices"][0]["message"]["content"]
    stop = whole[5:7]
    cut = chat(service, seed=1, max_tokens=30, stop=[stop])["choices"][0]
    assert cut["message"]["content"] == whole[: whole.find(stop)]
    assert cut["finish_reason"] == "stop"


def test_logprobs_cover_each_token_of_the_text(service: Service) -> None:
    choice = chat(service, temperature=0, logprobs=True, top_logprobs=2)["choices"][0]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0 for entry in entries)
    body = {"prompt": "red", "temperature": 0, "max_tokens": 4, "logprobs": 1}
    legacy = asked(service, "/v1/completions", body)[1]["choices"][0]["logprobs"]
    assert [len(legacy[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [4] * 4


def test_logprobs_hold_the_tokens_of_the_text_whatever_stops_it(service: Service) -> None:
    """Streamed or whole, for stops that begin at every place and cross the engine's chunks."""
    plain = {"prompt": "red", "temperature": 0, "max_tokens": 14, "logprobs": 0}
    talk = {**ASK, "temperature": 0, "max_tokens": 14, "logprobs": True}

    async def work(_url: str, ask: Ask) -> None:
        for path, body in (("/v1/completions", plain), ("/v1/chat/completions", talk)):
            whole = told((await ask(path, body))[1]["choices"])
            assert (whole[2], whole[0]) == ("length", whole[1])
            for begin in range(len(whole[0])):
                for size in (1, 3, 6):
                    stop = whole[0][begin : begin + size]
                    wanted = whole[0][: whole[0].find(stop)]
                    cut = {**body, "stop": [stop, "never"]}
                    assert told((await ask(path, cut))[1]["choices"]) == (wanted, wanted, "stop")
                    events = (await ask(path, {**cut, "stream": True}))[1].split("\n\n")
                    choices = [json.loads(event[6:])["choices"][0] for event in events if event.startswith("data: {")]
                    assert told(choices) == (wanted, wanted, "stop")

    served(service, work)


def told(choices: list[dict[str, Any]]) -> tuple[str, str, str]:
    """(the text, the text that its tokens make, why it ended) of the pieces of one choice."""
    text, raw, offsets = "", b"", list[int]()
    for choice in choices:
        text += choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""
        report = choice["logprobs"] or {}
        offsets += report.get("text_offset") or []
        raw += b"".join(bytes(entry["bytes"]) for entry in report.get("content") or [])
        for token in report.get("tokens") or []:
            half = token.startswith("bytes:")
            raw += bytes.fromhex(token[6:].replace("\\x", "")) if half else token.encode()
    assert offsets == sorted(offsets)
    assert not offsets or (offsets[0] == 0 and offsets[-1] < len(text))
    return text, raw.decode("utf-8", "replace"), choices[-1]["finish_reason"]


def test_a_stream_says_what_the_whole_answer_says(service: Service) -> None:
    whole = chat(service, seed=2, n=2)
    body = {**ASK, "seed": 2, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    _, text = asked(service, "/v1/chat/completions", body)
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    assert text.endswith("data: [DONE]\n\n")
    told = ["", ""]
    for event in events[:-1]:
        told[event["choices"][0]["index"]] += event["choices"][0]["delta"]["content"]
    assert told == [choice["message"]["content"] for choice in whole["choices"]]
    assert events[-1]["usage"] == whole["usage"]


def test_many_requests_at_once_answer_as_alone(service: Service) -> None:
    bodies = [{"prompt": f"{number} " * number, "seed": number, "max_tokens": 6} for number in range(1, 12)]

    async def work(_url: str, ask: Ask) -> Any:
        together = await asyncio.gather(*(ask("/v1/completions", body) for body in bodies))
        alone = [await ask("/v1/completions", body) for body in bodies]
        return together, alone

    together, alone = served(service, work)
    texts = [[body["choices"][0]["text"] for _, body in answers] for answers in (together, alone)]
    assert texts[0] == texts[1]


def test_several_prompts_and_token_ids_are_answered_in_order(service: Service) -> None:
    ids = service.tokenizer("blue")["input_ids"]
    body = {"prompt": ["red", "blue"], "temperature": 0, "n": 1}
    texts = [choice["text"] for choice in asked(service, "/v1/completions", body)[1]["choices"]]
    assert len(texts) == 2
    assert asked(service, "/v1/completions", {**body, "prompt": ids})[1]["choices"][0]["text"] == texts[1]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "[bad"}, 403),
        ({"Origin": "http://[bad"}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:80"}, 200),
    ],
)
def test_foreign_hosts_and_web_pages_are_turned_away(service: Service, headers: dict[str, str], status: int) -> None:
    assert asked(service, "/v1/models", None, **headers)[0] == status


def test_a_token_is_asked_for_where_one_is_set(service: Service) -> None:
    guarded = Service(service.live, service.tokenizer, service.template, "student", 400, token="secret")

    async def work(_url: str, ask: Ask) -> Any:
        return [
            (await ask("/v1/models"))[0],
            (await ask("/v1/models", None, Authorization="Bearer wrong"))[0],
            (await ask("/v1/models", None, Authorization="Bearer secret", Host="any.example"))[0],
        ]

    assert served(guarded, work, any_host=True) == [401, 401, 200]


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/v1/completions", "{bad", 400, "JSON"),
        ("/v1/completions", [1], 400, "object"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": [99999]}, 400, "no token 99999"),
        ("/v1/completions", {"prompt": [-1]}, 400, "no token -1"),
        ("/v1/completions", {"prompt": "a", "temperature": 10**400}, 400, "temperature"),
        ("/v1/completions", {"prompt": "a", "echo": True}, 400, "echo"),
        ("/v1/completions", {"prompt": "a", "best_of": 3}, 400, "best_of"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
        ("/v1/completions", {"prompt": "a", "n": 0}, 400, "n:"),
        ("/v1/completions", {"prompt": ["a"] * 17, "n": 128}, 400, "2048 answers"),
        ("/v1/completions", {"prompt": "a", "max_tokens": True}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "stop": [1]}, 400, "stop"),
        ("/v1/completions", {"prompt": "a " * 900}, 400, "does not fit"),
        ("/v1/completions", {"prompt": "a \ud83d"}, 400, "surrogate"),
        ("/v1/completions", {"prompt": "a", "stream": "no"}, 400, "stream"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud83d"}]}, 400, "surrogate"),
        ("/v1/chat/completions", {**ASK, "top_logprobs": 3}, 400, "needs logprobs"),
        ("/v1/completions", {"prompt": "a", "stream": 1}, 400, "stream"),
        ("/v1/completions", {"prompt": "a", "stream_options": "x"}, 400, "stream_options: must be an object"),
        ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": 1}}, 400, "include_usage"),
        ("/v1/completions", {"prompt": "", "stream_options": {"continuous_usage_stats": True}}, 400, "usage_stats"),
        ("/v1/completions", {"prompt": "a", "model": "gpt"}, 404, "only 'student'"),
        ("/v1/chat/completions", {"messages": []}, 400, "no messages"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a"}]}, 400, "alternate"),
        ("/v1/chat/completions", {**ASK, "response_format": {"type": "json_object"}}, 400, "response_format"),
        ("/v1/chat/completions", {**ASK, "tools": [{}]}, 400, "tools"),
        ("/v1/other", {}, 404, "Not Found"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    service: Service, path: str, body: Any, status: int, word: str
) -> None:
    seen, answer = asked(service, path, body)
    assert seen == status
    assert word in answer["error"]["message"]


NOT_HONOURED = {
    "stop_token_ids": ([1], []), "min_tokens": (5, 0), "ignore_eos": (True, False), "bad_words": (["a"], []),
    "structured_outputs": ({"choice": ["a"]}, None), "guided_choice": (["a"], None), "guided_regex": ("a*", None),
    "tool_choice": ("required", "auto"), "prompt_logprobs": (1, None), "continue_final_message": (True, False),
    "chat_template": ("x", None), "truncate_prompt_tokens": (5, None), "use_beam_search": (True, False),
    "typical_p": (0.5, 1.0), "length_penalty": (2, 1), "reasoning_effort": ("high", None), "n_predict": (3, None),
    "include_stop_str_in_output": (True, False), "allowed_token_ids": ([5], None), "logit_bias": ({"5": 100}, {}),
}  # fmt: skip


def test_each_field_that_would_change_the_answer_is_refused_unless_it_asks_for_nothing(service: Service) -> None:
    async def work(_url: str, ask: Ask) -> None:
        for path, body in (("/v1/chat/completions", {**ASK, "max_tokens": 1}), ("/v1/completions", {"prompt": "a"})):
            for name, (wish, nothing) in NOT_HONOURED.items():
                status, answer = await ask(path, {**body, name: wish})
                assert (status, name in str(answer)) == (400, True), name
                assert (await ask(path, {**body, name: nothing}))[0] == 200, name

    served(service, work)


@pytest.mark.parametrize(
    ("path", "field", "where"),
    [
        ("/v1/completions", {"messages": ASK["messages"]}, "messages: belongs to /v1/chat/completions"),
        ("/v1/completions", {"max_completion_tokens": 3}, "max_completion_tokens: belongs to /v1/chat/completions"),
        ("/v1/completions", {"top_logprobs": 2}, "top_logprobs: belongs to /v1/chat/completions"),
        ("/v1/chat/completions", {"prompt": "a"}, "prompt: belongs to /v1/completions"),
        ("/v1/chat/completions", {"add_special_tokens": True}, "add_special_tokens"),
    ],
)
def test_fields_of_the_other_path_are_refused(service: Service, path: str, field: Any, where: str) -> None:
    body = ASK if "chat" in path else {"prompt": "a", "max_tokens": 1}
    status, answer = asked(service, path, {**body, **field})
    assert (status, where in answer["error"]["message"]) == (400, True)
    assert asked(service, path, {**body, **dict.fromkeys(field)})[0] == 200


class Watched:
    """A tokenizer that notes how often it is called, and waits inside until it is let go."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.begun, self.let_go = threading.Event(), threading.Event()
        self.calls = self.inside = self.most_inside = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *texts: Any, **how: Any) -> Any:
        self.calls, self.inside = self.calls + 1, self.inside + 1
        self.most_inside = max(self.most_inside, self.inside)
        self.begun.set()
        assert self.let_go.wait(20)
        self.inside -= 1
        return self._tokenizer(*texts, **how)


def test_a_prompt_that_is_being_read_holds_up_nobody(service: Service) -> None:
    slow = Watched(service.tokenizer)

    async def work(_url: str, ask: Ask) -> Any:
        waiting = [asyncio.create_task(ask("/v1/completions", {"prompt": "a", "max_tokens": 2})) for _ in range(3)]
        await asyncio.to_thread(slow.begun.wait, 20)
        health = await ask("/health")
        slow.let_go.set()
        return health[0], [(await one)[0] for one in waiting]

    watched = Service(service.live, slow, service.template, "student", 400)
    assert served(watched, work) == (200, [200, 200, 200])
    assert (slow.calls, slow.most_inside) == (3, 1)


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_cut_into_tokens(service: Service) -> None:
    watched = Watched(service.tokenizer)
    watched.let_go.set()
    own = Service(service.live, watched, service.template, "student", 400)
    long = "word " * 150_000
    for path, body in (
        ("/v1/completions", {"prompt": long}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
    ):
        status, answer = asked(own, path, body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert "750000 characters does not fit the context of 400 tokens" in answer["error"]["message"]
    assert watched.calls == 0


def test_an_empty_prompt_is_called_empty(service: Service) -> None:
    words = json.loads(service.tokenizer.backend_tokenizer.to_str())
    words["post_processor"] = None  # no BOS
    without = type(service.tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(words)), eos_token="</s>")
    own = Service(service.live, without, service.template, "student", 400)
    status, answer = asked(own, "/v1/completions", {"prompt": ["a", ""]})
    assert (status, answer["error"]["code"]) == (400, None)
    assert "prompt: is empty" in answer["error"]["message"]
    assert asked(service, "/v1/completions", {"prompt": "", "max_tokens": 1})[0] == 200


def test_a_body_that_cannot_be_unpacked_is_refused_in_the_same_shape(service: Service) -> None:
    status, answer = asked(service, "/v1/completions", "no gzip", **{"Content-Encoding": "gzip"})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    guarded = Service(service.live, service.tokenizer, service.template, "student", 400, token="secret")
    assert asked(guarded, "/v1/models", None, Authorization="Bearer \udcff")[0] == 401


def test_a_chat_template_that_refuses_is_the_clients_to_mend(service: Service) -> None:
    refusing = Template("chat", "chat", chat_template="{{ raise_exception('no system messages') }}")
    own = Service(service.live, service.tokenizer, refusing, "student", 400)
    status, answer = asked(own, "/v1/chat/completions", ASK)
    assert (status, "no system messages" in answer["error"]["message"]) == (400, True)


def test_our_own_client_understands_it(service: Service) -> None:
    async def work(url: str, _ask: Ask) -> Any:
        found: list[Any] = []
        for model, api, text in (
            ("student", "completions", "red"),
            ("student", "completions", "a " * 900),
            ("gpt", "completions", "red"),
        ):
            backend = HttpBackend(
                base_url=f"{url}/v1", model=model, api_key=None, api=api,  # type: ignore[arg-type]
                sampling=Sampling(1.0, 0.9, 0.05), timeout=30, max_in_flight=2,
            )  # fmt: skip
            try:
                found.append(await backend.complete(Prompt(1, "alpaca", text=text, max_new_tokens=5, seed=1)))
            except SelfInstructError as error:
                found.append(type(error))
            await backend.aclose()
        return found

    good, long, other = served(service, work)
    assert (good.finish, good.completion_tokens) == ("length", 5)
    assert (long, other) == (PromptRefused, ModelNotFound)


def test_a_broken_engine_is_told_to_all_and_to_health(tmp_path: Path) -> None:
    loaded = load(str(tiny_model(tmp_path / "tiny")))
    broken = serving.open_service(loaded, slots=2, context=64)
    loaded.model.model.layers[0].mlp.down_proj.weight = None

    async def work(_url: str, ask: Ask) -> Any:
        body = {"prompt": "a"}
        return [(await ask(path, body))[0] for path in ("/v1/completions",) * 2], (await ask("/health"))[0]

    assert served(broken, work) == ([503, 503], 503)
    assert isinstance(broken.live.failure, ServerError)
    broken.live.close()


def test_a_conversation_is_made_of_turns_as_they_were_trained() -> None:
    tokenizer = tiny_tokenizer()
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    ids = encode_dialogue(ALPACA, tokenizer, turns)
    first, last = (ALPACA.encode_prompt(tokenizer, text) for text in "ac")
    assert ids == [*first, *tokenizer("b", add_special_tokens=False)["input_ids"], 2, *last[1:]]
    with pytest.raises(UsageError):
        encode_dialogue(ALPACA, tokenizer, turns[:2])


@pytest.mark.parametrize(
    ("host", "inside"), [("127.0.0.9", True), ("::1", True), ("localhost", True), ("10.0.0.1", False)]
)
def test_loopback_is_told_from_the_world(host: str, inside: bool) -> None:
    assert is_loopback_host(host) == inside


@pytest.mark.parametrize(
    "arguments",
    [("serve", "--batch", "0"), ("serve", "--batch", "-3"), ("chat", "--temperature", "-1"),
     ("chat", "--temperature", "nan"), ("chat", "--top-p", "7"), ("chat", "--top-p", "0")],
    ids=" ".join,
)  # fmt: skip
def test_options_out_of_range_are_refused_before_a_model_is_read(arguments: tuple[str, ...]) -> None:
    command, option, value = arguments
    ended = CliRunner().invoke(APP, [command, "no/such/model", option, value])
    assert (ended.exit_code, f"{option} " in ended.output, "out of range" in ended.output) == (2, True, True)


def test_a_service_has_room_for_one_request_at_least(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--batch 0 is out of range"):
        serving.open_service(load(str(tiny_model(tmp_path / "tiny"))), slots=0)

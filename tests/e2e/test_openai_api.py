"""The OpenAI HTTP API of a whole system with real weights: it gives what gRPC gives, and what plain transformers computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import httpx2 as httpx
import jsonschema
import pytest
import torch

from moiety.client import Client
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.v1 import generation_pb2, generation_pb2_grpc
from moiety.wire.channels import channel
from support.serving import Served

TEXT = "Each expert group"
IDS = [40, 41, 42, 60, 61, 62]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where are the experts?"}]
GREEDY = {"temperature": 0.0, "max_tokens": 16}
SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "max_tokens": 16}
ARGUMENTS = {
    "type": "object",
    "properties": {"unit": {"enum": ["celsius", "kelvin"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["unit", "days"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": ARGUMENTS}},
    {"type": "function", "function": {"name": "clock", "parameters": NOTHING}},
]
PARAMETERS = {"weather": ARGUMENTS, "clock": NOTHING}

Scenario = Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]


def run(served: Served, scenario: Scenario) -> None:
    """Runs `scenario` with an HTTP client of the system."""

    async def with_http(_: Client) -> None:
        async with httpx.AsyncClient(base_url=f"http://{served.cluster.http_address}", timeout=60) as http:
            await scenario(http)

    served.run(with_http)


async def post(http: httpx.AsyncClient, path: str, **body: Any) -> Any:
    """Returns the whole answer to a request."""
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def events(http: httpx.AsyncClient, path: str, **body: Any) -> list[Any]:
    """Returns the JSON of the events of a streamed answer."""
    async with http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        lines = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


async def over_grpc(served: Served, prompt: Any, **sampling: Any) -> list[generation_pb2.GenerateResponse]:
    """Returns the messages of a generation over gRPC; a prompt is a text, token ids or messages."""
    request = generation_pb2.GenerateRequest(sampling=generation_pb2.SamplingParams(**sampling))
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt[0], int):
        request.token_ids.ids.extend(prompt)
    else:
        request.chat.messages.extend(generation_pb2.ChatMessage(**message) for message in prompt)
    async with channel(served.cluster.address) as link:
        return [response async for response in generation_pb2_grpc.GenerationServiceStub(link).Generate(request)]


def joined(messages: list[generation_pb2.GenerateResponse], choice: int = 0) -> tuple[str, list[int], str]:
    """Returns a choice's text, tokens and reason, as HTTP names it."""
    mine = [message for message in messages if message.choice == choice]
    reason = generation_pb2.FinishReason.Name(mine[-1].finish_reason).rpartition("_")[2].lower()
    return "".join(message.text for message in mine), [token for message in mine for token in message.token_ids], reason


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("prompt", [TEXT, IDS, CHAT], ids=["text", "ids", "chat"])
def test_http_gives_the_text_and_tokens_of_grpc(chat_served: Served, prompt: Any, sampling: dict[str, Any]) -> None:
    """One request gives the same text, tokens, reason and counts over gRPC, over HTTP, and over HTTP as a stream."""
    chat = prompt is CHAT
    path, asked = "/v1/completions", {"prompt": prompt}
    if chat:
        path, asked = "/v1/chat/completions", {"messages": prompt}

    async def scenario(http: httpx.AsyncClient) -> None:
        messages = await over_grpc(chat_served, prompt, **sampling)
        options = {**asked, **sampling, "return_token_ids": True}
        answer = await post(http, path, **options)
        streamed = await events(http, path, **options, stream_options={"include_usage": True})
        (choice,) = answer["choices"]
        text = choice["message"]["content"] if chat else choice["text"]
        assert (text, choice["token_ids"], choice["finish_reason"]) == joined(messages)
        usage = messages[-1].usage
        assert answer["usage"]["prompt_tokens"] == usage.prompt_tokens
        assert answer["usage"]["completion_tokens"] == usage.completion_tokens == len(choice["token_ids"])
        last = streamed.pop()
        assert (last["choices"], last["usage"]["total_tokens"]) == ([], answer["usage"]["total_tokens"])
        parts = [event["choices"][0] for event in streamed]
        assert "".join(part["delta"].get("content", "") if chat else part["text"] for part in parts) == text
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]

    run(chat_served, scenario)


def test_choices_and_stop_strings_are_those_of_grpc(chat_served: Served) -> None:
    """With n = 2 and a stop string each choice ends where gRPC ends it, and says what stopped it."""

    async def scenario(http: httpx.AsyncClient) -> None:
        options = {**SEEDED, "max_tokens": 60, "n": 2, "stop": ["e", "t"]}
        messages = await over_grpc(chat_served, TEXT, **options)
        answer = await post(http, "/v1/completions", prompt=TEXT, return_token_ids=True, **options)
        got = [(choice["text"], choice["token_ids"], choice["finish_reason"]) for choice in answer["choices"]]
        assert got == [joined(messages, choice) for choice in range(2)]
        assert got[0] != got[1]
        ends = {message.choice: message.stop for message in messages if message.finish_reason}
        assert [choice["stop_reason"] for choice in answer["choices"]] == [ends[0] or None, ends[1] or None]
        assert set(ends.values()) <= {"e", "t", ""}
        assert any(ends.values())

    run(chat_served, scenario)


def test_log_probabilities_are_those_of_grpc(chat_served: Served) -> None:
    """Log probabilities of the output's tokens and of the likeliest ones agree, in completions and in chat."""
    tokenizer = Tokenizer(chat_served.cluster.model)

    async def scenario(http: httpx.AsyncClient) -> None:
        wanted = {"logprobs": True, "top_logprobs": 3}
        messages = await over_grpc(chat_served, TEXT, **SEEDED, **wanted)
        values = [value for message in messages for value in message.logprobs]
        tops = [dict(zip(top.token_ids, top.logprobs, strict=True)) for m in messages for top in m.top_logprobs]
        as_ids = {"return_tokens_as_token_ids": True}
        listed = await post(http, "/v1/completions", prompt=TEXT, **SEEDED, logprobs=3, **as_ids)
        logprobs = listed["choices"][0]["logprobs"]
        assert logprobs["token_logprobs"] == pytest.approx(values, abs=1e-6)
        for value, top, likeliest in zip(values, tops, logprobs["top_logprobs"], strict=True):
            named = {f"token_id:{token}": logprob for token, logprob in top.items()}
            # OpenAI adds the chosen token where it is not among the likeliest.
            others = {name: logprob for name, logprob in likeliest.items() if name not in named}
            assert {name: likeliest[name] for name in named} == pytest.approx(named, abs=1e-6)
            assert list(others.values()) == pytest.approx([value] * len(others), abs=1e-6)

        messages = await over_grpc(chat_served, CHAT, **SEEDED, **wanted)
        chat = await post(http, "/v1/chat/completions", messages=CHAT, **SEEDED, **wanted)
        entries = chat["choices"][0]["logprobs"]["content"]
        tokens = [token for message in messages for token in message.token_ids]
        assert [bytes(entry["bytes"]) for entry in entries] == [tokenizer.token(token).bytes for token in tokens]
        values = [value for message in messages for value in message.logprobs]
        assert [entry["logprob"] for entry in entries] == pytest.approx(values, abs=1e-6)
        flat = [top["logprob"] for entry in entries for top in entry["top_logprobs"]]
        assert flat == pytest.approx([v for m in messages for top in m.top_logprobs for v in top.logprobs], abs=1e-6)

    run(chat_served, scenario)


@torch.inference_mode()
def test_an_echoed_prompt_has_the_log_probabilities_of_transformers(chat_served: Served) -> None:
    """`echo` with `logprobs` gives gRPC's prompt_logprobs, which are the log-softmax of plain transformers' logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(chat_served.cluster.model, dtype=torch.float32, local_files_only=True)
    tokenizer = Tokenizer(chat_served.cluster.model)

    async def scenario(http: httpx.AsyncClient) -> None:
        messages = await over_grpc(
            chat_served, TEXT, temperature=0.0, max_tokens=1, logprobs=True, prompt_logprobs=True
        )
        prompt = [value for message in messages for value in message.prompt_logprobs]
        own = [value for message in messages for value in message.logprobs]
        options = {"prompt": TEXT, "temperature": 0, "echo": True, "logprobs": 2, "return_token_ids": True}
        answers = [await post(http, "/v1/completions", **options, max_tokens=most) for most in (0, 1)]
        for most, answer in enumerate(answers):
            (choice,) = answer["choices"]
            logprobs = choice["logprobs"]
            assert choice["text"].startswith(TEXT)
            assert logprobs["token_logprobs"][0] is None
            assert logprobs["token_logprobs"][1:] == pytest.approx([*prompt, *own][: len(prompt) + most], abs=1e-6)
            ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
            expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            chosen = [float(expected[place, token]) for place, token in enumerate(ids[1:])]
            assert logprobs["token_logprobs"][1:] == pytest.approx(chosen, abs=1e-4)
            for place, likeliest in enumerate(logprobs["top_logprobs"][1:]):
                best = expected[place].topk(2)
                assert max(likeliest.values()) == pytest.approx(float(best.values[0]), abs=1e-4)
            assert logprobs["tokens"] == [tokenizer.token(token).text for token in ids]
            starts = [choice["text"][start:] for start in logprobs["text_offset"]]
            assert all(left.startswith(token) for left, token in zip(starts, logprobs["tokens"], strict=True))
        assert answers[0]["usage"]["completion_tokens"] == 0
        assert answers[0]["choices"][0]["text"] == TEXT

    run(chat_served, scenario)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("forced", ["required", "weather", "clock"])
def test_a_forced_tool_call_is_valid(chat_served: Served, forced: str, streamed: bool) -> None:
    """A model of random weights calls the function that tool_choice forces, with arguments that match its schema."""
    choice: Any = forced if forced == "required" else {"type": "function", "function": {"name": forced}}
    thinks = Tokenizer(chat_served.cluster.model).vocabulary["<think>"]

    async def scenario(http: httpx.AsyncClient) -> None:
        calls, reason = await calls_of(
            http,
            streamed,
            messages=CHAT,
            tools=TOOLS,
            tool_choice=choice,
            parallel_tool_calls=False,
            seed=5,
            max_tokens=600,
            logit_bias={str(thinks): -100},  # random weights seldom end what they have begun to think
        )
        assert reason == "tool_calls"
        ((name, arguments),) = calls
        assert forced in ("required", name)
        jsonschema.validate(json.loads(arguments), PARAMETERS[name])

    run(chat_served, scenario)


async def calls_of(http: httpx.AsyncClient, streamed: bool, **body: Any) -> tuple[list[tuple[str, str]], str]:
    """Returns the names and arguments of an answer's calls, and why it ended."""
    if not streamed:
        (choice,) = (await post(http, "/v1/chat/completions", **body))["choices"]
        called = [call["function"] for call in choice["message"].get("tool_calls", ())]
        assert choice["message"]["content"] is None
        return [(function["name"], function["arguments"]) for function in called], choice["finish_reason"]
    parts = [event["choices"][0] for event in await events(http, "/v1/chat/completions", **body)]
    found: dict[int, list[str]] = {}
    for call in (call for part in parts for call in part["delta"].get("tool_calls", ())):
        names = found.setdefault(call["index"], ["", ""])
        names[0] += call["function"].get("name", "")
        names[1] += call["function"]["arguments"]
    assert not any(part["delta"].get("content") for part in parts)
    return [(name, arguments) for name, arguments in found.values()], parts[-1]["finish_reason"]


def test_a_schema_guides_the_answer(chat_served: Served) -> None:
    """With response_format json_schema the answer of random weights matches the schema; the stream joins to the same."""
    wanted = {"type": "json_schema", "json_schema": {"name": "forecast", "strict": True, "schema": ARGUMENTS}}

    async def scenario(http: httpx.AsyncClient) -> None:
        options = {"messages": CHAT, "response_format": wanted, "seed": 5, "max_tokens": 400}
        (choice,) = (await post(http, "/v1/chat/completions", **options))["choices"]
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), ARGUMENTS)
        parts = [event["choices"][0]["delta"] for event in await events(http, "/v1/chat/completions", **options)]
        assert "".join(part.get("content", "") for part in parts) == choice["message"]["content"]

    run(chat_served, scenario)

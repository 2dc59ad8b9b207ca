"""litellm against a whole system with a tiny chat model of random weights."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from typing import Any

import pytest
from conformance_support import ServedApi

# The package leaves connections and event loops to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore")
MESSAGES = [{"role": "user", "content": "Where are the experts?"}]
TOOL = {
    "name": "clock",
    "parameters": {
        "type": "object",
        "properties": {"zone": {"enum": ["utc", "cet"]}},
        "required": ["zone"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package, where it is installed; it must not ask the network for prices."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    yield pytest.importorskip("litellm", reason="needs the package litellm: make conformance")
    gc.collect()


@pytest.fixture
def options(api: ServedApi) -> dict[str, Any]:
    """What every call is given."""
    return {
        "model": f"openai/{api.model}",
        "api_base": api.url,
        "api_key": "none",
        "num_retries": 0,
        "max_tokens": 12,
        "seed": 3,
        "temperature": 0.9,
    }


def text_of(parts: list[Any]) -> str:
    """Joins the chunks of a stream."""
    return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)


def test_completion_and_stream(litellm: Any, options: dict[str, Any]):
    """`completion` with the prefix openai/ and api_base works, and its stream joins to the same, with usage."""
    whole = litellm.completion(messages=MESSAGES, **options)
    stream = litellm.completion(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options)
    parts = list(stream)
    assert whole.choices[0].finish_reason == "length"
    assert text_of(parts) == whole.choices[0].message.content
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens == 12


def test_asynchronous_completion(litellm: Any, options: dict[str, Any]):
    """`acompletion` gives what `completion` gives, whole and streamed."""
    expected = litellm.completion(messages=MESSAGES, **options).choices[0].message.content

    async def asynchronous() -> None:
        whole = await litellm.acompletion(messages=MESSAGES, **options)
        assert whole.choices[0].message.content == expected
        stream = await litellm.acompletion(messages=MESSAGES, stream=True, **options)
        assert text_of([part async for part in stream]) == expected

    asyncio.run(asynchronous())


def test_text_completion(litellm: Any, options: dict[str, Any]):
    """`text_completion` reaches the older API."""
    model = options["model"].replace("openai/", "text-completion-openai/")
    answer = litellm.text_completion(prompt="Each expert", **{**options, "model": model})
    assert answer.choices[0].text
    assert answer.usage.completion_tokens == 12


def test_a_forced_tool_call(litellm: Any, options: dict[str, Any], api: ServedApi):
    """tool_choice by name gives the call, with arguments that match its schema."""
    answer = litellm.completion(
        messages=MESSAGES,
        tools=[{"type": "function", "function": TOOL}],
        tool_choice={"type": "function", "function": {"name": "clock"}},
        logit_bias=api.no_thinking,
        **{**options, "max_tokens": 400},
    )
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "clock"
    assert json.loads(call.function.arguments)["zone"] in ("utc", "cet")


def test_errors(litellm: Any, options: dict[str, Any]):
    """A wrong value and an unknown model raise litellm's own classes."""
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(messages=MESSAGES, **{**options, "temperature": 99})
    with pytest.raises(litellm.NotFoundError, match="not served"):
        litellm.completion(messages=MESSAGES, **{**options, "model": "openai/other"})

"""langchain-openai against a whole system with a tiny chat model of random weights."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any, Literal

import pydantic
import pytest
from conformance_support import ServedApi

# The package leaves connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
QUESTION = "Where are the experts?"


class Forecast(pydantic.BaseModel):
    """Tells the weather."""

    model_config = pydantic.ConfigDict(extra="forbid")
    unit: Literal["celsius", "kelvin"]
    days: Literal[1, 2]


@pytest.fixture
def langchain() -> Iterator[Any]:
    """The package, where it is installed."""
    yield pytest.importorskip("langchain_openai", reason="needs the package langchain-openai: make conformance")
    gc.collect()


@pytest.fixture
def chat(langchain: Any, api: ServedApi) -> Any:
    """A seeded chat model."""
    return langchain.ChatOpenAI(**api.options, seed=3, temperature=0.9, max_completion_tokens=12)


@pytest.fixture
def guided(langchain: Any, api: ServedApi) -> Any:
    """A chat model with room for guided output."""
    return langchain.ChatOpenAI(**api.options, seed=3, max_completion_tokens=600, logit_bias=api.no_thinking)


def test_invoke_and_stream(chat: Any):
    """A stream joins to what `invoke` returns, with usage, reason and log probabilities."""
    whole = chat.invoke([("system", "Be brief."), ("user", QUESTION)])
    joined = reduce(add, chat.stream([("system", "Be brief."), ("user", QUESTION)]))
    assert whole.content
    assert joined.content == whole.content
    assert whole.usage_metadata["output_tokens"] == 12
    assert whole.response_metadata["finish_reason"] == joined.response_metadata["finish_reason"] == "length"
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert [len(entry["top_logprobs"]) for entry in scored.response_metadata["logprobs"]["content"]] == [2] * 12


def test_batches_and_asynchronous_streams(chat: Any):
    """`batch`, `abatch`, `ainvoke` and `astream` give each prompt what `invoke` gives it."""
    alone = [chat.invoke(question).content for question in ("One?", "Two?", "Three?")]
    assert [answer.content for answer in chat.batch(["One?", "Two?", "Three?"])] == alone

    async def asynchronous() -> None:
        together = await chat.abatch(["One?", "Two?", "Three?"])
        assert [answer.content for answer in together] == alone
        assert (await chat.ainvoke("One?")).content == alone[0]
        assert "".join([chunk.content async for chunk in chat.astream("Two?")]) == alone[1]

    asyncio.run(asynchronous())


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(guided: Any, method: str):
    """`with_structured_output` returns the pydantic model, by a schema and by a forced tool call."""
    answer = guided.with_structured_output(Forecast, method=method, strict=True).invoke(QUESTION)
    assert isinstance(answer, Forecast)


def test_tool_calls(guided: Any, chat: Any):
    """A forced call comes back parsed, streamed or not, and the conversation goes on with its result."""
    from langchain_core.messages import ToolMessage

    forced = guided.bind_tools([Forecast], tool_choice="any", strict=True, parallel_tool_calls=False)
    message = forced.invoke(QUESTION)
    streamed = reduce(add, forced.stream(QUESTION))
    (call,) = message.tool_calls
    assert Forecast.model_validate(call["args"])
    assert [(each["name"], each["args"]) for each in streamed.tool_calls] == [("Forecast", call["args"])]
    assert not message.invalid_tool_calls
    history = [("user", QUESTION), message, ToolMessage("sunny", tool_call_id=call["id"])]
    assert chat.bind_tools([Forecast], tool_choice="none").invoke(history).content


def test_completions(langchain: Any, api: ServedApi):
    """The older completions class works, whole and streamed."""
    model = langchain.OpenAI(**api.options, seed=3, max_tokens=8)
    text = model.invoke("Each expert")
    assert text
    assert "".join(model.stream("Each expert")) == text


def test_errors(langchain: Any, api: ServedApi):
    """A wrong value and an unknown model raise the errors of the package openai."""
    import openai

    with pytest.raises(openai.BadRequestError, match="temperature"):
        langchain.ChatOpenAI(**api.options, temperature=99).invoke(QUESTION)
    with pytest.raises(openai.NotFoundError, match="not served"):
        langchain.ChatOpenAI(**{**api.options, "model": "other"}).invoke(QUESTION)

"""The HTTP client of OpenAI's API: what it returns, and how it names what went wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import aclosing
from datetime import UTC, datetime

import pytest

from moiety.client.http.answers import error_message, retry_after_s
from moiety.client.http.server import BROKEN, LOST, NO_CONNECTION, TIMED_OUT, OpenAiServer, RequestFailed
from moiety.errors import InvalidRequest, NotFound
from support.openai_server import Fault, OpenAiTestServer, openai_server

BODY = {"model": "first", "prompt": "x", "max_tokens": 3}


@pytest.fixture
def openai() -> Iterator[OpenAiTestServer]:
    """Yields a server of this test's own."""
    with openai_server() as server:
        yield server


async def streamed(url: str, **options: float) -> list[str]:
    """Returns the data of every event of one streamed completion."""
    async with (
        OpenAiServer(url, **options) as server,
        aclosing(server.stream("/v1/completions", BODY | {"stream": True})) as events,
    ):
        return [timed.event.data async for timed in events]


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
async def test_url_with_or_without_v1(openai: OpenAiTestServer, ending: str) -> None:
    """A URL may end in /v1, as that of other clients does, or not."""
    async with OpenAiServer(openai.url + ending) as server:
        assert server.url == openai.url
        assert await server.models() == ("first", "second")


@pytest.mark.parametrize(
    "url", ["", "host:80", "ftp://host", "http://", "http://h:0x", "http://u:p@h", "http://h/?a=b"]
)
def test_wrong_url(url: str) -> None:
    """A URL of another kind is refused before a request is made."""
    with pytest.raises(InvalidRequest, match="URL = "):
        OpenAiServer(url)


async def test_the_model(openai: OpenAiTestServer) -> None:
    """Without a name it is the server's first; an unknown name is refused with those that there are."""
    async with OpenAiServer(openai.url) as server:
        assert await server.model(None) == "first"
        assert await server.model("second") == "second"
        with pytest.raises(NotFound, match="no model 'third'; its models: first, second"):
            await server.model("third")


async def test_a_whole_answer(openai: OpenAiTestServer) -> None:
    """An answer has status, body and request id; an error status is an answer too, with the delay that it names."""
    async with OpenAiServer(openai.url) as server:
        answer = await server.post("/v1/completions", BODY)
        assert (answer.status, answer.request_id) == (200, "request-0")
        assert json.loads(answer.body)["choices"][0]["text"] == " 0 1 2"
        openai.fault = lambda body, number: Fault(429, "full", {"Retry-After": "2"})
        answer = await server.post("/v1/completions", BODY)
        assert (answer.status, answer.retry_after_s, error_message(answer.body)) == (429, 2.0, "full")


async def test_a_stream(openai: OpenAiTestServer) -> None:
    """A stream yields every event, and [DONE] last."""
    *chunks, done = await streamed(openai.url)
    assert [json.loads(chunk)["choices"][0]["text"] for chunk in chunks] == [" 0", " 1", " 2"]
    assert done == "[DONE]"


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (Fault(503, "starting"), "HTTP 503", "HTTP 503: starting"),
        (Fault(chunks=1), LOST, "connection lost: the answer broke off"),
    ],
    ids=["status", "broken"],
)
async def test_failures_of_a_stream(openai: OpenAiTestServer, fault: Fault, kind: str, message: str) -> None:
    """A stream that is refused or breaks raises an error that names how."""
    openai.fault = lambda body, number: fault
    with pytest.raises(RequestFailed) as failed:
        await streamed(openai.url)
    assert (failed.value.kind, str(failed.value)) == (kind, message)


async def test_a_slow_answer_and_one_of_another_kind(openai: OpenAiTestServer) -> None:
    """An answer that takes too long, and one that is no stream, raise errors that say so."""
    openai.first_s = 30.0
    with pytest.raises(RequestFailed, match=r"not done within 0\.3 s") as failed:
        await streamed(openai.url, timeout_s=0.3)
    assert failed.value.kind == TIMED_OUT
    openai.first_s = 0.0
    async with OpenAiServer(openai.url) as server:
        with pytest.raises(RequestFailed, match="content type application/json") as failed:
            await anext(server.stream("/v1/completions", BODY))
    assert failed.value.kind == BROKEN


async def test_nobody_there() -> None:
    """Where nothing listens, the error names the URL."""
    with openai_server() as gone:
        pass
    async with OpenAiServer(gone.url) as server:
        with pytest.raises(RequestFailed, match=gone.url) as failed:
            await server.models()
    assert failed.value.kind == NO_CONNECTION


async def test_the_key(openai: OpenAiTestServer) -> None:
    """The key is sent as OpenAI's clients send it; without it the server's refusal is shown."""
    openai.api_key = "secret"
    async with OpenAiServer(openai.url, api_key="secret") as server:
        assert await server.models()
    async with OpenAiServer(openai.url) as server:
        with pytest.raises(RequestFailed, match=r"HTTP 401: .*/v1/models: wrong key"):
            await server.models()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        ("0.25", 0.25),
        ("-1", 0.0),
        ("soon", None),
        ("nan", None),
        ("Wed, 01 Jan 2025 00:00:10 GMT", 10.0),
        ("Tue, 31 Dec 2024 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    """Retry-After is a number of seconds or a date; a past date is no wait, and anything else says nothing."""
    assert retry_after_s(header, datetime(2025, 1, 1, tzinfo=UTC)) == seconds


@pytest.mark.parametrize(
    "body",
    [b'{"error": {"message": "why"}}', b'{"error": "why"}', b'{"message": "why"}', b'{"detail": "why"}', b" why\n"],
)
def test_messages_of_errors(body: bytes) -> None:
    """The message of an error is found in the shapes that servers use."""
    assert error_message(body) == "why"

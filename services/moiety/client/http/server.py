"""An HTTP client of one server that speaks OpenAI's API."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from moiety.client.http.answers import error_message, retry_after_s
from moiety.client.http.sse import SseEvent, SseParser
from moiety.core.text import did_you_mean, reason_of
from moiety.errors import InvalidRequest, MoietyError, NotFound

# A connection that is idle for longer is not used again. uvicorn closes after 5 s: a request that is sent just then is lost.
IDLE_S = 4.0
SPARE_FILES = 64  # open files of this process that are no connections
MOST_BODY_BYTES = 256 << 20
NO_CONNECTION = "no connection"
LOST = "connection lost"
TIMED_OUT = "timeout"
BROKEN = "broken answer"


class RequestFailed(MoietyError):
    """A request got no answer, or an error instead of a stream.

    `kind` groups failures: NO_CONNECTION, LOST, TIMED_OUT, BROKEN, or "HTTP 429" and the like. `status` is the HTTP status, 0
    without an answer; `retry_after_s` the seconds that the server asks to wait.
    """

    def __init__(self, kind: str, message: str, *, status: int = 0, retry_after_s: float | None = None) -> None:
        self.kind, self.message, self.status, self.retry_after_s = kind, message, status, retry_after_s
        super().__init__(f"{kind}: {message}" if message else kind)


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A whole answer, of any status."""

    status: int
    body: bytes
    request_id: str = ""
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class TimedEvent:
    """An event of a stream, and when its last byte was read: seconds of the monotonic clock."""

    at: float
    event: SseEvent


class OpenAiServer:
    """Sends requests to one server. An async context manager.

    Connections are kept and reused; there are as many as requests at once, see `allow_connections`.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        """`url`: with or without /v1 at its end. `timeout_s`: for a whole request. Raises InvalidRequest for another URL."""
        self.url = _base_url(url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            headers=self._headers,
            read_bufsize=1 << 20,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def models(self) -> tuple[str, ...]:
        """Returns the names that /v1/models lists. Raises RequestFailed if the server does not answer with such a list."""
        async with self._request("GET", "/v1/models", None) as response:
            answer = await _read(response)
        if answer.status != 200:
            message = f"{self.url}/v1/models: {error_message(answer.body)}"
            raise RequestFailed(f"HTTP {answer.status}", message, status=answer.status)
        try:
            return tuple(str(model["id"]) for model in json.loads(answer.body)["data"])
        except (ValueError, KeyError, TypeError):
            raise RequestFailed(BROKEN, f"{self.url}/v1/models: not a list of models in OpenAI's form") from None

    async def model(self, wanted: str | None) -> str:
        """Returns `wanted`, or the server's first model if that is None.

        Raises NotFound, with the server's models, if `wanted` is not among them, RequestFailed as `models` does. The name is
        not checked where the server has no /v1/models.
        """
        try:
            names = await self.models()
        except RequestFailed as error:
            if wanted is not None and error.status == 404:
                return wanted
            raise
        if wanted is None and names:
            return names[0]
        if wanted is None or wanted not in names:
            near = did_you_mean(wanted or "", names)
            asked = "no model" if wanted is None else f"no model {wanted!r}"
            raise NotFound(f"{self.url} serves {asked}; its models: {', '.join(names) or 'none'}{near}")
        return wanted

    async def post(self, path: str, body: Mapping[str, Any]) -> HttpAnswer:
        """Sends one request and returns its answer, of whatever status. Raises RequestFailed where there is none."""
        async with self._request("POST", path, body) as response:
            return await _read(response)

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[TimedEvent]:
        """Sends one request and yields the events of its answer, the `[DONE]` of OpenAI's API included.

        Raises RequestFailed where the answer is no stream, or the stream breaks.
        """
        parser = SseParser()
        async with self._request("POST", path, body) as response:
            if response.status != 200:
                answer = await _read(response)
                kind, message = f"HTTP {answer.status}", error_message(answer.body)
                raise RequestFailed(kind, message, status=answer.status, retry_after_s=answer.retry_after_s)
            if response.content_type != "text/event-stream":
                raise RequestFailed(BROKEN, f"content type {response.content_type} instead of text/event-stream")
            async for data in response.content.iter_any():
                at = time.monotonic()
                try:
                    events = parser.feed(data)
                except InvalidRequest as error:
                    raise RequestFailed(BROKEN, str(error)) from None
                for event in events:
                    yield TimedEvent(at, event)

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._session is None:
            raise RuntimeError("OpenAiServer is an async context manager: enter it first")
        # A redirect would send the key, and a POST as a GET, to somewhere else: it counts as the answer.
        with self._named_failures():
            async with self._session.request(method, self.url + path, json=body, allow_redirects=False) as response:
                yield response

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Turns the client library's errors into RequestFailed."""
        try:
            yield
        except TimeoutError:
            raise RequestFailed(TIMED_OUT, f"{self.url}: not done within {self._timeout_s:g} s") from None
        except aiohttp.ClientConnectorError as error:
            raise RequestFailed(NO_CONNECTION, f"{self.url}: {reason_of(error.os_error)}") from None
        except aiohttp.ClientPayloadError:
            raise RequestFailed(LOST, "the answer broke off") from None
        except (aiohttp.ClientConnectionError, ConnectionError) as error:
            raise RequestFailed(LOST, str(error) or type(error).__name__) from None
        except aiohttp.ClientError as error:
            raise RequestFailed(BROKEN, f"{type(error).__name__}: {error}") from None


def allow_connections(number: int) -> None:
    """Lets this process open `number` connections. Raises InvalidRequest if the system does not allow it so many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = number + SPARE_FILES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        bound = f"at most {hard - SPARE_FILES}: this process may open {hard} files (ulimit -n)"
        raise InvalidRequest("requests at once", number, bound)
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


async def _read(response: aiohttp.ClientResponse) -> HttpAnswer:
    """Reads the whole answer. Raises RequestFailed if it is larger than MOST_BODY_BYTES."""
    body = bytearray()
    async for data in response.content.iter_any():
        body += data
        if len(body) > MOST_BODY_BYTES:
            raise RequestFailed(BROKEN, f"an answer of more than {MOST_BODY_BYTES} bytes")
    headers = response.headers
    wait_s = retry_after_s(headers.get("Retry-After"))
    return HttpAnswer(response.status, bytes(body), headers.get("X-Request-Id", ""), wait_s)


def _base_url(url: str) -> str:
    """Returns `url` without a /v1 and slashes at its end."""
    bound = "an http:// or https:// URL such as http://127.0.0.1:50080, without user, query and fragment"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment or "@" in parts.netloc:
        raise InvalidRequest("URL", url, bound)
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))

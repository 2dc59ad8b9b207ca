"""The requests without a body: models, health, readiness, version, and the description of the API."""

from __future__ import annotations

import time
from typing import Any

import moiety
from moiety.errors import DeadlineExceeded, NotFound, Unavailable
from moiety.gateway.core import GenerationCore
from moiety.gateway.http.exchange import Exchange
from moiety.gateway.http.openapi import document
from moiety.gateway.http.page import page
from moiety.gateway.request import Model
from moiety.wire.deadline import Deadline

READY_S = 0.05  # for a router that is known; `pick` does not wait where one is ready
_HTML = b"text/html; charset=utf-8"
# The page is one file without scripts, fonts or pictures, so nothing is loaded from elsewhere.
_PAGE_POLICY = (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'")


class Status:
    """Answers what needs no generation."""

    def __init__(self, core: GenerationCore):
        self._core = core
        self._since = int(time.time())
        self._document = document()
        self._page = page(self._document).encode()

    async def models(self, exchange: Exchange) -> None:
        """Lists the models. Raises Unavailable while no router is ready."""
        models = await self._core.models(Deadline())
        await exchange.send_json({"object": "list", "data": [self._shown(model) for model in models]})

    async def model(self, exchange: Exchange, name: str) -> None:
        """Describes one model. Raises NotFound for another one."""
        for model in await self._core.models(Deadline()):
            if name and model.name == name:
                await exchange.send_json(self._shown(model))
                return
        raise NotFound(f"model {name!r} is not served here; this is {self._core.model.name!r}")

    async def health(self, exchange: Exchange) -> None:
        """Says that the gateway lives."""
        await exchange.send_json({"status": "ok"})

    async def ready(self, exchange: Exchange) -> None:
        """Says whether the gateway can serve requests now: a router is ready, and the server does not shut down."""
        try:
            await self._core.models(Deadline.after(READY_S))
        except DeadlineExceeded:
            raise Unavailable("no router is ready") from None
        await exchange.send_json({"status": "ready"})

    async def version(self, exchange: Exchange) -> None:
        await exchange.send_json({"version": moiety.__version__})

    async def openapi(self, exchange: Exchange) -> None:
        """Sends the OpenAPI document."""
        await exchange.send_json(self._document)

    async def docs(self, exchange: Exchange) -> None:
        """Sends the OpenAPI document as a page."""
        await exchange.send_whole(self._page, _HTML, headers=[_PAGE_POLICY])

    def _shown(self, model: Model) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._since,
            "owned_by": "moiety",
            "root": model.name,
            "parent": None,
            "max_model_len": model.max_context,
            "revision": model.revision,
        }

"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moiety.errors import InvalidRequest
from moiety.gateway.core import GenerationCore
from moiety.gateway.http.chat import conversation_of
from moiety.gateway.http.exchange import Exchange
from moiety.gateway.http.sampling import field_names
from moiety.gateway.http.schema.bodies import DetokenizeBody, TokenizeBody
from moiety.gateway.request import GenerationRequest
from moiety.wire.deadline import Deadline

MOST_DETOKENIZED = 1 << 16  # ids of one request: some 20 ms on the event loop


class Tokenize:
    """Answers which tokens a text or a conversation becomes."""

    def __init__(self, core: GenerationCore):
        self._core = core

    async def __call__(self, exchange: Exchange, content: Mapping[str, Any]) -> None:
        """Answers one request. Raises the errors of errors.py."""
        body = TokenizeBody.read(content)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("prompt", None, "present, unless messages are, and not beside them")
        (model,) = await self._core.models(Deadline())
        if body.messages is not None:
            exchange.names = field_names("messages", None)
            prompt: Any = conversation_of(body, body.tools or ())
        else:
            exchange.names = field_names("prompt", None)
            prompt = body.prompt
        begin = body.add_special_tokens if body.add_special_tokens is not None else body.messages is None
        request = GenerationRequest(prompt=prompt, model=body.model or "")
        ids = await self._core.tokenize(request, begin=begin)
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": model.max_context, "tokens": [*ids]}
        if body.return_token_strs:
            answer["token_strs"] = [self._core.model.tokenizer.token(token_id).text for token_id in ids]
        await exchange.send_json(answer)


class Detokenize:
    """Answers which text tokens are."""

    def __init__(self, core: GenerationCore):
        self._core = core

    async def __call__(self, exchange: Exchange, content: Mapping[str, Any]) -> None:
        """Answers one request. Raises the errors of errors.py."""
        body = DetokenizeBody.read(content)
        self._core.check_model(body.model or "")
        if len(body.tokens) > MOST_DETOKENIZED:
            raise InvalidRequest("tokens", f"{len(body.tokens)} ids", f"at most {MOST_DETOKENIZED}")
        tokenizer = self._core.model.tokenizer
        tokenizer.require("tokens", f"{len(body.tokens)} ids", "left as they are")
        if body.tokens:
            tokenizer.token(max(body.tokens))  # refuses what the tokenizer does not have
        await exchange.send_json({"prompt": tokenizer.decode(body.tokens, special=True)})

"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moiety.errors import InvalidRequest
from moiety.gateway.core import GenerationCore
from moiety.gateway.http.answers.answer import Head, deltas_of, send_answer
from moiety.gateway.http.answers.completion_answer import CompletionAnswer, CompletionView
from moiety.gateway.http.answers.logprobs import TokenNames
from moiety.gateway.http.exchange import Exchange
from moiety.gateway.http.guides import guide_of
from moiety.gateway.http.sampling import COMPLETION_TOKENS, choices_of, field_names, options_of
from moiety.gateway.http.schema.bodies import CompletionBody
from moiety.gateway.request import GenerationRequest
from moiety.gateway.unread import Readers


class Completions:
    """Answers requests for completions."""

    def __init__(self, core: GenerationCore, readers: Readers):
        self._core, self._readers = core, readers

    async def __call__(self, exchange: Exchange, content: Mapping[str, Any]) -> None:
        """Answers one request. Raises the errors of errors.py."""
        body = CompletionBody.read(content)
        n = choices_of(body)
        if body.best_of not in (None, n):
            raise InvalidRequest("best_of", body.best_of, f"absent or n, {n}: the best are not picked out of more")
        if body.add_special_tokens is False:
            raise InvalidRequest("add_special_tokens", False, "true; token ids are taken as they are")
        served = self._core.model
        guided = guide_of(body)
        exchange.names = field_names("prompt", guided[1] if guided else None, top_logprobs="logprobs")
        prompt_only = body.max_tokens == 0 and bool(body.echo)
        wants = body.logprobs is not None
        sampling = options_of(
            body,
            served.defaults,
            max_tokens=1 if prompt_only else body.max_tokens,
            default_max_tokens=COMPLETION_TOKENS,
            guide=guided[0] if guided else None,
            logprobs=wants,
            top_logprobs=body.logprobs or 0,
            prompt_logprobs=wants and bool(body.echo),
        )
        several = len(body.prompt) > 1
        requests = [
            GenerationRequest(
                prompt=prompt,
                sampling=sampling,
                model=body.model or "",
                request_id=f"{exchange.request_id}-{place}" if several else exchange.request_id,
                priority=body.priority or 0,
                tenant=body.user or "",
                host=exchange.host,
                traceparent=exchange.traceparent,
                keep_special=body.skip_special_tokens is False,
            )
            for place, prompt in enumerate(body.prompt)
        ]
        view = CompletionView(
            n=n,
            echoes=body.prompt if body.echo else None,
            prompt_only=prompt_only,
            logprobs=wants,
            token_ids=bool(body.return_token_ids) or served.tokenizer.skipped,  # all that there is then
            usage=body.include_usage,
            usage_so_far=body.continuous_usage,
        )
        head = Head("text_completion", f"cmpl-{exchange.request_id}", served.name, served.system.revision)
        names = TokenNames(served.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        answer = CompletionAnswer(head, names, view, len(requests), served.tokenizer.decode)
        deltas = deltas_of(self._core, requests, n)
        await send_answer(exchange, self._readers, deltas, answer, stream=bool(body.stream))

"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moiety.errors import InvalidRequest
from moiety.gateway.core import GenerationCore
from moiety.gateway.http.answers.answer import Head, deltas_of, send_answer
from moiety.gateway.http.answers.chat_answer import ChatAnswer, ChatView
from moiety.gateway.http.answers.logprobs import TokenNames
from moiety.gateway.http.exchange import Exchange
from moiety.gateway.http.guides import guide_of
from moiety.gateway.http.sampling import choices_of, field_names, options_of
from moiety.gateway.http.schema.bodies import ChatBody, TokenizeBody
from moiety.gateway.http.tools import ChatFormat, OutputParser
from moiety.gateway.request import Conversation, GenerationRequest
from moiety.gateway.unread import Readers
from moiety.wire.deadline import Deadline


class Chat:
    """Answers requests for chat completions."""

    def __init__(self, core: GenerationCore, readers: Readers, chat_format: ChatFormat):
        self._core, self._readers, self._format = core, readers, chat_format

    async def __call__(self, exchange: Exchange, content: Mapping[str, Any]) -> None:
        """Answers one request. Raises the errors of errors.py."""
        body = ChatBody.read(content)
        n = choices_of(body)
        served = self._core.model
        served.tokenizer.require("messages", "a conversation", "absent, and the prompt token ids of a completion")
        choice = self._format.choice_of(body.tools, body.tool_choice, parallel=body.parallel_tool_calls is not False)
        guided = guide_of(body)
        if guided is not None and choice.forced:
            raise InvalidRequest(guided[1], "beside tool_choice", "absent where tool_choice forces a call")
        newer = body.max_completion_tokens is not None
        exchange.names = field_names(
            "messages",
            "tools" if choice.forced else guided[1] if guided else None,
            max_tokens="max_completion_tokens" if newer else "max_tokens",
        )
        request = GenerationRequest(
            prompt=conversation_of(body, choice.declared),
            sampling=options_of(
                body,
                served.defaults,
                max_tokens=body.max_completion_tokens if newer else body.max_tokens,
                default_max_tokens=None,
                guide=guided[0] if guided else None,
                logprobs=bool(body.logprobs),
                top_logprobs=body.top_logprobs or 0,
            ),
            model=body.model or "",
            request_id=exchange.request_id,
            priority=body.priority or 0,
            tenant=body.user or "",
            host=exchange.host,
            traceparent=exchange.traceparent,
            # A guide forces content alone, so there is nothing to parse.
            keep_special=body.skip_special_tokens is False or (guided is None and self._format.keeps_special),
        )
        if choice.forced:
            # The guide depends on how the prompt ends.
            ids = await self._core.prompt_ids(request, Deadline())
            guide = self._format.guide(choice, ids)
            request = replace(request, prompt=ids, sampling=replace(request.sampling, guide=guide))

        def parser_for(prompt_ids: Sequence[int]) -> OutputParser | None:
            if guided is not None:
                return None
            return self._format.parser(tools=bool(choice.tools), prompt_ids=prompt_ids)

        view = ChatView(
            n=n,
            logprobs=bool(body.logprobs),
            token_ids=bool(body.return_token_ids),
            usage=body.include_usage,
            usage_so_far=body.continuous_usage,
        )
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        head = Head(kind, f"chatcmpl-{exchange.request_id}", served.name, served.system.revision)
        names = TokenNames(served.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        answer = ChatAnswer(head, names, view, parser_for)
        deltas = deltas_of(self._core, [request], n)
        await send_answer(exchange, self._readers, deltas, answer, stream=bool(body.stream))


def conversation_of(body: ChatBody | TokenizeBody, tools: Sequence[Mapping[str, Any]]) -> Conversation:
    """Returns the conversation of a body, with the tools that its template is to show."""
    assert body.messages is not None
    continues = bool(body.continue_final_message)
    opens = body.add_generation_prompt if body.add_generation_prompt is not None else not continues
    if continues and opens:
        raise InvalidRequest("continue_final_message", True, "false where add_generation_prompt is true")
    arguments = dict(body.chat_template_kwargs or {})
    if isinstance(body, ChatBody) and body.reasoning_effort is not None:
        arguments.setdefault("reasoning_effort", body.reasoning_effort)
    return Conversation(body.messages, tools, arguments, opens, continues)

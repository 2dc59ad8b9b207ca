"""GenerationCore: from a request to the deltas of its output. It knows no transport; each API is an adapter on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from moiety.core.sampling import Sampling
from moiety.core.system import SystemId
from moiety.core.visible import visible
from moiety.errors import InvalidRequest, NotFound, Unavailable
from moiety.gateway.admission import Admission
from moiety.gateway.outputs import Outputs
from moiety.gateway.request import Conversation, Delta, GenerationRequest, Model, new_request_id
from moiety.gateway.routers.engine_request import engine_request
from moiety.gateway.routers.router_pool import RouterPool
from moiety.gateway.text.encoder import MOST_CHARACTERS, PromptEncoder
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.model.checkpoint.chat_template import ChatTemplate
from moiety.model.checkpoint.generation_defaults import GenerationDefaults
from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import Span, Tracer
from moiety.wire.deadline import Deadline
from moiety.wire.sampling_params import check_labels, check_prompt

SHUTTING_DOWN = "the server is shutting down"
# Characters of a text that is only tokenised: it is not cut at the context, and must leave prompts room in the budget.
MOST_COUNTED = MOST_CHARACTERS // 4


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What serves one model: the routers of one system, and the checkpoint's own text tools."""

    name: str
    system: SystemId
    routers: RouterPool
    tokenizer: Tokenizer
    encoder: PromptEncoder
    template: ChatTemplate | None = None
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)


class GenerationCore:
    """Serves one model. `_served` is the one place that would choose among several."""

    def __init__(self, served: ServedModel, max_concurrent: int, tracer: Tracer):
        self.model = served
        self._tracer = tracer
        self._admission = Admission(max_concurrent, served.routers.retry_after_s)
        # One template is rendered at a time. The loop's own threads also resolve names: they must not wait for templates.
        self._renders = ThreadPoolExecutor(1, thread_name_prefix="template")
        self.running = 0  # requests in progress
        self.begun = 0  # requests since the start
        self._refuses = False

    def close(self) -> None:
        """Drops the prompts that wait to be rendered or tokenised."""
        self._renders.shutdown(wait=False, cancel_futures=True)
        self.model.encoder.close()

    def refuse(self) -> None:
        """Refuses new requests from now on, because the server shuts down. Those that run go on."""
        self._refuses = True

    async def end(self) -> None:
        """Refuses new requests, and ends those that run with Unavailable."""
        self._refuses = True
        await self.model.routers.end(f"{SHUTTING_DOWN}: the time for running requests is over (setting drain_s)")

    def check_model(self, name: str) -> None:
        """Raises NotFound unless the model of this name is served; "" is the only one."""
        self._served(name)

    async def models(self, deadline: Deadline) -> tuple[Model, ...]:
        """Returns what can be asked for. Raises Unavailable or DeadlineExceeded while no router is ready, or after `refuse`."""
        self._check_open()
        served = self.model
        described = (await served.routers.pick(deadline)).description
        return (Model(served.name, served.system.revision, described.max_context),)

    async def prompt_ids(self, request: GenerationRequest, deadline: Deadline) -> Sequence[int]:
        """Returns the checked token ids of a request's prompt. Raises what `generate` raises for it."""
        served = self._served(request.model)
        self._check_open()
        served.routers.check_room()
        described = (await served.routers.pick(deadline)).description
        return await self._prompt_ids(served, request, described.vocabulary, described.max_context)

    async def tokenize(self, request: GenerationRequest, *, begin: bool) -> Sequence[int]:
        """Returns the token ids of a request's text or conversation, though they may not fit into the context.

        `begin`: with the special tokens that the tokenizer puts before a text.
        """
        served, prompt = self._served(request.model), request.prompt
        if isinstance(prompt, Conversation):
            prompt = await self._rendered(served, prompt)
        if not isinstance(prompt, str):
            return prompt
        if len(prompt) > MOST_COUNTED:
            raise InvalidRequest("prompt.text", f"{len(prompt)} characters", f"at most {MOST_COUNTED}")
        return await served.encoder.encode(prompt, MOST_CHARACTERS, begin=begin)

    async def generate(self, request: GenerationRequest, deadline: Deadline) -> AsyncGenerator[Delta, None]:
        """Yields the deltas of all choices until each has ended. Closing the generator cancels the request at its router.

        Raises the errors of errors.py only; they are meant for the client. A caller that ends a request because of an
        error of its own throws it into the generator, so that the trace shows it.
        """
        kind = "chat" if isinstance(request.prompt, Conversation) else "text_completion"
        span = self._tracer.start(
            SpanName.GENERATE,
            parent=request.traceparent,
            attributes={Attribute.OPERATION: kind, Attribute.REQUEST_MODEL: self.model.name},
        )
        request_id = request.request_id or new_request_id()
        arrived = time.monotonic()
        self.running += 1
        self.begun += 1
        try:
            check_labels(request)
            served = self._served(request.model)
            self._check_open()
            served.routers.check_room()
            with self._admission.place(request.tenant, request.host):
                span.set(Attribute.REQUEST_ID, request_id)
                async with aclosing(self._deltas(served, request, request_id, deadline, span, arrived)) as deltas:
                    async for delta in deltas:
                        yield delta
        except Exception as error:
            seen = visible(error, request_id)
            span.error(seen)
            raise seen from None
        finally:
            self.running -= 1
            span.end()

    async def _deltas(
        self,
        served: ServedModel,
        request: GenerationRequest,
        request_id: str,
        deadline: Deadline,
        span: Span,
        arrived: float,
    ) -> AsyncGenerator[Delta, None]:
        described = (await served.routers.pick(deadline)).description
        ids = await self._prompt_ids(served, request, described.vocabulary, described.max_context)
        continues = () if described.encoder_decoder else ids
        in_context = len(continues) or 1  # an encoder-decoder's output begins with its start token
        options = request.sampling
        first = served.tokenizer.token_id(options.first_token) if isinstance(options.first_token, str) else None
        sampling = options.resolved(in_context, described.vocabulary, described.max_context, first)
        _describe(span, ids, sampling)
        outputs = Outputs(
            ids,
            sampling,
            options.stop,
            served.tokenizer,
            continues=continues,
            keep_special=request.keep_special,
            arrived=arrived,
        )
        wanted = engine_request(request, request_id, ids, sampling, served.tokenizer.stop_ids, served.system)
        events = served.routers.generate(wanted, deadline, span.traceparent, outputs.ended)
        async with aclosing(events):  # leaving it cancels the request at its router
            async for event in events:
                if (delta := outputs.push(event)) is not None:
                    yield delta
                if outputs.complete:
                    break
        span.set(Attribute.OUTPUT_TOKENS, outputs.produced)
        span.set(Attribute.FINISH_REASONS, [str(reason) for reason in outputs.finish_reasons])

    async def _prompt_ids(
        self, served: ServedModel, request: GenerationRequest, vocabulary: int, max_context: int
    ) -> Sequence[int]:
        """Returns the checked token ids of the request's prompt."""
        prompt = request.prompt
        if isinstance(prompt, str | Conversation):
            begin = isinstance(prompt, str)  # a template writes the special tokens before a text itself
            text = prompt if isinstance(prompt, str) else await self._rendered(served, prompt)
            ids: Sequence[int] = await served.encoder.encode(text, max_context, begin=begin)
            check_prompt(ids, vocabulary, max_context)
        else:
            check_prompt(prompt, vocabulary, max_context)  # before it is copied
            ids = list(prompt)
        return ids

    async def _rendered(self, served: ServedModel, conversation: Conversation) -> str:
        """Returns a conversation as the checkpoint's template writes it. Raises InvalidRequest where there is none."""
        if (template := served.template) is None:
            raise InvalidRequest("messages", "a conversation", "a text: this checkpoint has no chat template")
        render = partial(
            template.render,
            conversation.messages,
            tools=conversation.tools,
            add_generation_prompt=conversation.opens_reply,
            continue_final_message=conversation.continues_last,
            arguments=conversation.arguments,
        )
        return await asyncio.get_running_loop().run_in_executor(self._renders, render)

    def _check_open(self) -> None:
        """Raises Unavailable if the server shuts down."""
        if self._refuses:
            raise Unavailable(SHUTTING_DOWN)

    def _served(self, model: str) -> ServedModel:
        """Returns what serves the model of this name. Raises NotFound."""
        if model and model != self.model.name:
            raise NotFound(f"model {model!r} is not served here; this is {self.model.name!r}")
        return self.model


def _describe(span: Span, ids: Sequence[int], sampling: Sampling) -> None:
    span.set(Attribute.INPUT_TOKENS, len(ids))
    span.set(Attribute.MAX_TOKENS, sampling.max_tokens)
    span.set(Attribute.TEMPERATURE, sampling.temperature)
    span.set(Attribute.TOP_P, sampling.top_p)
    span.set(Attribute.TOP_K, sampling.top_k)

"""What has been streamed of a request, and what another router is asked for when the one that ran it is lost."""

from __future__ import annotations

from moiety.wire import engine_pb2


class Progress:
    """A request's choices, each with the tokens that the client has."""

    def __init__(self, request: engine_pb2.EngineRequest):
        self._request, self._streamed = request, False
        choices = range(request.choice, request.choice + (request.sampling.n or 1))
        self._open = {choice: list(request.generated_ids) for choice in choices}

    def take(self, event: engine_pb2.EngineEvent) -> None:
        self._streamed = True
        if event.finish_reason:
            del self._open[event.choice]
        else:
            self._open[event.choice].extend(event.token_ids)

    @property
    def tokens(self) -> int:
        """Streamed so far, of the choices that go on."""
        return sum(map(len, self._open.values()))

    def rest(self) -> list[engine_pb2.EngineRequest]:
        """The requests for all that has not come: the first one again, or one for each choice that is not finished."""
        if not self._open or not self._streamed:
            return [self._request] if self._open else []
        return [self._of(choice, tokens) for choice, tokens in self._open.items()]

    def _of(self, choice: int, tokens: list[int]) -> engine_pb2.EngineRequest:
        request = engine_pb2.EngineRequest()
        request.CopyFrom(self._request)
        request.choice, request.generated_ids[:] = choice, tokens
        if self._request.sampling.n > 1:
            request.sampling.n = 1
        request.sampling.prompt_logprobs = False  # they came before the first token
        return request

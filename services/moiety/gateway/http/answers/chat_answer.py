"""The answers of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moiety.core.sampling import FinishReason
from moiety.gateway.http.answers.answer import Counts, Head
from moiety.gateway.http.answers.logprobs import TokenNames, chat_logprobs
from moiety.gateway.http.tools import CallArguments, CallBegins, Content, OutputParser, Piece, Reasoning
from moiety.gateway.request import Delta

ParserFor = Callable[[Sequence[int]], OutputParser | None]  # from the ids of the prompt to the parser of one output


@dataclass(frozen=True, slots=True)
class ChatView:
    """What a client wants to see of its chat completions."""

    n: int = 1
    logprobs: bool = False
    token_ids: bool = False
    usage: bool = False  # of a stream: at its end
    usage_so_far: bool = False  # of a stream: in every chunk


@dataclass(slots=True)
class _Choice:
    """One choice of the answer."""

    parser: OutputParser | None = None
    began: bool = False
    calls: bool = False  # whether it has called a tool
    pieces: list[Piece] = field(default_factory=list)  # the rest serves answers that are sent as a whole
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish: str | None = None
    matched: str | int | None = None


class ChatAnswer:
    """Turns deltas into chat completions."""

    def __init__(self, head: Head, names: TokenNames, view: ChatView, parser_for: ParserFor):
        self._head, self._names, self._view, self._parser_for = head, names, view, parser_for
        self._counts = Counts()
        self._prompt_ids: Sequence[int] = ()
        self._choices = [_Choice() for _ in range(view.n)]

    def chunk(self, delta: Delta) -> bytes:
        view, choice = self._view, self._choices[delta.choice]
        first, began = not choice.began, bool(delta.prompt_ids)
        pieces = self._take(choice, delta)
        changed = _changed(pieces)
        if first:
            changed = {"role": "assistant", "content": "", **changed}
        if not changed and delta.finish is None and not (view.logprobs or view.token_ids):
            return b""
        made: dict[str, Any] = {
            "index": delta.choice,
            "delta": changed,
            "logprobs": self._logprobs(self._scored(delta)),
            "finish_reason": _finish(choice, delta.finish),
        }
        if delta.finish is not None:
            made["stop_reason"] = delta.matched_stop
        others: dict[str, Any] = {}
        if view.token_ids:
            made["token_ids"] = list(delta.token_ids)
            if began:
                others["prompt_token_ids"] = list(self._prompt_ids)
        if view.usage:
            others["usage"] = self._counts.usage() if view.usage_so_far else None
        return self._head.event([made], **others)

    def end(self) -> bytes:
        return self._head.event([], usage=self._counts.usage()) if self._view.usage else b""

    def add(self, delta: Delta) -> None:
        choice = self._choices[delta.choice]
        choice.pieces += self._take(choice, delta)
        choice.logprobs += self._scored(delta)
        if self._view.token_ids:
            choice.token_ids += delta.token_ids
        choice.finish, choice.matched = _finish(choice, delta.finish), delta.matched_stop

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, choice in enumerate(self._choices):
            made: dict[str, Any] = {
                "index": index,
                "message": _message(choice.pieces),
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": choice.finish,
                "stop_reason": choice.matched,
            }
            if self._view.token_ids:
                made["token_ids"] = choice.token_ids
            choices.append(made)
        answer = {**self._head.fields, "choices": choices, "usage": self._counts.usage()}
        if self._view.token_ids:
            answer["prompt_token_ids"] = list(self._prompt_ids)
        return answer

    def _take(self, choice: _Choice, delta: Delta) -> list[Piece]:
        """Returns the pieces that a delta adds to its choice."""
        self._counts.add(delta)
        if delta.prompt_ids:
            self._prompt_ids = delta.prompt_ids
        if not choice.began:
            choice.began = True
            choice.parser = self._parser_for(self._prompt_ids)
        if (parser := choice.parser) is None:
            return [Content(delta.text)] if delta.text else []
        pieces = parser.push(delta.text) if delta.text else []
        if delta.finish is not None:
            pieces = [*pieces, *parser.end()]
        choice.calls = choice.calls or any(isinstance(piece, CallBegins) for piece in pieces)
        return pieces

    def _scored(self, delta: Delta) -> list[dict[str, Any]]:
        if not self._view.logprobs:
            return []
        return chat_logprobs(self._names, delta.token_ids, delta.logprobs, delta.top_logprobs)

    def _logprobs(self, content: list[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": content, "refusal": None} if self._view.logprobs else None


def _finish(choice: _Choice, finish: FinishReason | None) -> str | None:
    """Returns OpenAI's reason: an output that ends by itself after calls ends for the client to make them."""
    return "tool_calls" if finish is FinishReason.STOP and choice.calls else finish


def _changed(pieces: Iterable[Piece]) -> dict[str, Any]:
    """Returns pieces as the `delta` of a chunk."""
    changed: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        match piece:
            case Content(text):
                changed["content"] = changed.get("content", "") + text
            case Reasoning(text):
                changed["reasoning_content"] = changed.get("reasoning_content", "") + text
            case CallBegins(index, call_id, name):
                function = {"name": name, "arguments": ""}
                calls[index] = {"index": index, "id": call_id, "type": "function", "function": function}
            case CallArguments(index, text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
    if calls:
        changed["tool_calls"] = [*calls.values()]
    return changed


def _message(pieces: Iterable[Piece]) -> dict[str, Any]:
    """Returns all pieces of an output as a message."""
    changed = _changed(pieces)
    calls = [{key: value for key, value in call.items() if key != "index"} for call in changed.get("tool_calls", ())]
    message: dict[str, Any] = {"role": "assistant", "content": changed.get("content", None if calls else "")}
    message["refusal"] = None
    if "reasoning_content" in changed:
        message["reasoning_content"] = changed["reasoning_content"]
    if calls:
        message["tool_calls"] = calls
    return message

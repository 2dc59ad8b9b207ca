"""The answers of POST /v1/completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moiety.core.sampling import FinishReason, TopLogprobs
from moiety.gateway.http.answers.answer import Counts, Head
from moiety.gateway.http.answers.logprobs import CompletionLogprobs, TokenNames
from moiety.gateway.http.schema.fields import Prompt
from moiety.gateway.request import Delta


@dataclass(frozen=True, slots=True)
class CompletionView:
    """What a client wants to see of its completions."""

    n: int = 1  # choices of each prompt
    echoes: Sequence[Prompt] | None = None  # the prompts, where outputs begin with them
    prompt_only: bool = False  # whether the client wants no output: the one token that is generated is not shown
    logprobs: bool = False
    token_ids: bool = False
    usage: bool = False  # of a stream: at its end
    usage_so_far: bool = False  # of a stream: in every chunk


@dataclass(slots=True)
class _Prompt:
    """A prompt's tokens, which its choices repeat, as its deltas tell them."""

    ids: Sequence[int] = ()
    logprobs: Sequence[float | None] = ()
    tops: Sequence[TopLogprobs | None] = ()
    text: str | None = None  # of ids, once it is needed


@dataclass(slots=True)
class _Choice:
    """One choice of the answer."""

    logprobs: CompletionLogprobs
    began: bool = False
    texts: list[str] = field(default_factory=list)  # the rest serves answers that are sent as a whole
    token_ids: list[int] = field(default_factory=list)
    listed: dict[str, list[Any]] | None = None
    finish: FinishReason | None = None
    matched: str | int | None = None


class CompletionAnswer:
    """Turns deltas into completions."""

    def __init__(
        self, head: Head, names: TokenNames, view: CompletionView, prompts: int, decode: Callable[[Sequence[int]], str]
    ):
        """`decode` returns the text of a prompt of token ids, where it is to be echoed."""
        self._head, self._view, self._counts, self._decode = head, view, Counts(), decode
        self._prompts = [_Prompt() for _ in range(prompts)]
        self._choices = [_Choice(CompletionLogprobs(names)) for _ in range(prompts * view.n)]

    def chunk(self, delta: Delta) -> bytes:
        part = self._part(delta)
        if not part["text"] and delta.finish is None and not (self._view.logprobs or self._view.token_ids):
            return b""
        if self._view.usage_so_far:
            return self._head.event([part], usage=self._counts.usage())
        return self._head.event([part], usage=None) if self._view.usage else self._head.event([part])

    def end(self) -> bytes:
        return self._head.event([], usage=self._counts.usage()) if self._view.usage else b""

    def add(self, delta: Delta) -> None:
        choice, part = self._choices[delta.choice], self._part(delta)
        choice.texts.append(part["text"])
        choice.token_ids.extend(part.get("token_ids", ()))
        if (listed := part["logprobs"]) is not None:
            if choice.listed is None:
                choice.listed = listed
            else:
                for name, values in choice.listed.items():
                    values.extend(listed[name])
        choice.finish, choice.matched = delta.finish, delta.matched_stop

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, choice in enumerate(self._choices):
            made = _choice(index, "".join(choice.texts), choice.listed, choice.finish, choice.matched)
            if self._view.token_ids:
                made["prompt_token_ids"] = list(self._prompts[index // self._view.n].ids)
                made["token_ids"] = choice.token_ids
            choices.append(made)
        return {**self._head.fields, "choices": choices, "usage": self._counts.usage()}

    def _part(self, delta: Delta) -> dict[str, Any]:
        """Returns what a delta adds to its choice."""
        view, choice = self._view, self._choices[delta.choice]
        place = delta.choice // view.n
        prompt = self._prompts[place]
        self._note_prompt(prompt, delta)
        self._counts.add(delta)
        text, ids = delta.text, list(delta.token_ids)
        listed: dict[str, list[Any]] | None = None
        if view.prompt_only:
            self._counts.completion -= len(ids)
            text, ids = "", []
        began, choice.began = not choice.began, True
        echoes = began and view.echoes is not None
        if echoes and view.echoes is not None:
            text = self._echo(view.echoes[place], prompt) + text
        if view.logprobs:
            all_ids: Sequence[int] = [*prompt.ids, *ids] if echoes else ids
            own, tops = delta.logprobs[: len(ids)], delta.top_logprobs[: len(ids)]
            logprobs: Sequence[float | None] = [*prompt.logprobs, *own] if echoes else own
            all_tops: Sequence[TopLogprobs | None] = [*prompt.tops, *tops] if echoes else tops
            listed = choice.logprobs.part(all_ids, logprobs, all_tops)
        finish = FinishReason.LENGTH if view.prompt_only and delta.finish else delta.finish
        part = _choice(delta.choice, text, listed, finish, None if view.prompt_only else delta.matched_stop)
        if view.token_ids:
            part["token_ids"] = ids
            if began:
                part["prompt_token_ids"] = list(prompt.ids)
        return part

    def _echo(self, given: Prompt, prompt: _Prompt) -> str:
        """Returns the text of a prompt. Ids are decoded here and not before, as the core has checked them by now."""
        if isinstance(given, str):
            return given
        if prompt.text is None:
            prompt.text = self._decode(prompt.ids)
        return prompt.text

    def _note_prompt(self, prompt: _Prompt, delta: Delta) -> None:
        if delta.prompt_ids:
            prompt.ids = delta.prompt_ids
            nothing = (None,) * len(prompt.ids)
            prompt.logprobs, prompt.tops = nothing, nothing
        if delta.prompt_logprobs:
            prompt.logprobs = [None, *delta.prompt_logprobs]
        if delta.prompt_top_logprobs:
            prompt.tops = [None, *delta.prompt_top_logprobs]


def _choice(
    index: int,
    text: str,
    logprobs: Mapping[str, list[Any]] | None,
    finish: FinishReason | None,
    matched: str | int | None,
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish, "stop_reason": matched}

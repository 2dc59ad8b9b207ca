"""Guided output: a grammar, compiled for the checkpoint's tokenizer, says which tokens may come next (llguidance).

`Guides` compiles, off the engine's thread and before a request is admitted. A `Matcher` follows one sequence; it is always
brought up to date from the sequence's tokens, so that resumed, preempted and forked sequences need nothing special.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np

from moiety.core.sampling import Guide, GuideKind
from moiety.errors import CheckpointError, FailedPrecondition, InvalidRequest, MoietyError, ResourceExhausted
from moiety.model.checkpoint.tokenizer import open_tokenizer

COMPILE_S = 5.0  # a large JSON schema takes some 100 ms
KEPT = 64  # compiled guides: the same schema comes again and again
MAX_PROBLEM = 200  # characters of a compiler's complaint that a client is told
# Fuel for building lexer and grammar; at llguidance's own measure of 50,000 a millisecond that is 20 ms. What one mask
# may cost on the engine's thread is bounded too: 50,000 items at 20,000 a millisecond, 50,000 fuel at 14,000.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000, step_lexer_fuel=50_000, step_max_items=50_000, verbose_errors=False
)
# White space between the parts of JSON is bounded: a model may otherwise fill all of max_tokens with it.
_JSON: llguidance._lib.JsonCompileOptions = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}"}
_EXPECTED = {
    GuideKind.JSON_SCHEMA: "a JSON Schema that can be compiled",
    GuideKind.REGEX: "a regular expression (of Rust's regex syntax) that can be compiled",
    GuideKind.GRAMMAR: "a Lark grammar that can be compiled",
}


class CompiledGuide:
    """A guide ready for use, shared by every sequence that follows it."""

    def __init__(self, fresh: llguidance.LLMatcher, executor: llguidance.LLExecutor):
        self._fresh, self.executor = fresh, executor

    def matcher(self) -> Matcher:
        """At the start of an output."""
        return Matcher(self._fresh.deep_copy(), self.executor)


class Matcher:
    """Where one sequence stands in its guide."""

    def __init__(self, state: llguidance.LLMatcher, executor: llguidance.LLExecutor):
        self.state, self.executor = state, executor
        self._followed = 0

    def follow(self, generated: Sequence[int]) -> None:
        """Takes in what the output has gained since the last call."""
        if new := list(generated[self._followed :]):
            self.state.consume_tokens(new)
            self._followed = len(generated)


def allowed_tokens(matchers: Sequence[Matcher], vocabulary: int) -> tuple[np.ndarray, dict[int, MoietyError]]:
    """uint8 [matchers, vocabulary], 1 where a token may come next, and the matchers that failed, by their place."""
    words = llguidance.numpy.allocate_token_bitmask(len(matchers), vocabulary)
    batch = [(matcher.state, place) for place, matcher in enumerate(matchers)]
    llguidance.numpy.fill_next_token_bitmask_par(matchers[0].executor, batch, words)
    failed = {
        place: MoietyError(f"the guide cannot be followed: {_shortened(matcher.state.get_error())}")
        for place, matcher in enumerate(matchers)
        if matcher.state.is_error()
    }
    bits = np.unpackbits(words.astype("<i4", copy=False).view(np.uint8), axis=1, bitorder="little")
    return bits[:, :vocabulary], failed


class Guides:
    """Compiles guides for one checkpoint, whose tokenizer is read when the first one comes."""

    def __init__(self, folder: str, vocabulary: int, threads: int):
        self._folder, self._vocabulary, self._threads = folder, vocabulary, threads
        self._kept: OrderedDict[Guide, CompiledGuide] = OrderedDict()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._executor: llguidance.LLExecutor | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="guides")
        self.eos_ids: tuple[int, ...] = ()  # known once a guide was compiled

    async def compile(self, guide: Guide) -> CompiledGuide:
        """Raises InvalidRequest saying what is wrong with it, FailedPrecondition where the checkpoint has no tokenizer,
        ResourceExhausted where others' guides take too long.
        """
        try:
            async with asyncio.timeout(COMPILE_S):
                return await asyncio.get_running_loop().run_in_executor(self._thread, self._compile, guide)
        except TimeoutError:
            raise ResourceExhausted(f"the guide was not compiled within {COMPILE_S:g} s", COMPILE_S) from None

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, guide: Guide) -> CompiledGuide:
        if guide in self._kept:
            self._kept.move_to_end(guide)
            return self._kept[guide]
        tokenizer, executor = self._opened()
        problem = ""
        try:
            matcher = llguidance.LLMatcher(tokenizer, _grammar(guide), log_level=0, limits=_LIMITS)
            problem = matcher.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:
            bound = f"{_EXPECTED[guide.kind]}: {_shortened(problem)}"
            raise InvalidRequest(f"sampling.guide.{guide.kind}", guide.text, bound)
        compiled = self._kept[guide] = CompiledGuide(matcher, executor)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return compiled

    def _opened(self) -> tuple[llguidance.LLTokenizer, llguidance.LLExecutor]:
        if self._tokenizer is None or self._executor is None:
            try:
                tokenizer, self.eos_ids = open_tokenizer(self._folder)
                self._tokenizer = llguidance.hf.from_tokenizer(
                    tokenizer, n_vocab=self._vocabulary, eos_token=list(self.eos_ids)
                )
            except (CheckpointError, ValueError) as error:
                raise FailedPrecondition(f"guided output needs the checkpoint's tokenizer: {error}") from error
            self._executor = llguidance.LLExecutor(num_threads=self._threads)
        return self._tokenizer, self._executor


def _grammar(guide: Guide) -> str:
    """In llguidance's own form. Raises ValueError where a JSON schema is no JSON."""
    match guide.kind:
        case GuideKind.JSON_SCHEMA:
            options = _JSON if guide.text.lstrip().startswith("{") else None  # `true` is a schema too, and takes none
            return llguidance.LLMatcher.grammar_from_json_schema(guide.text, defaults=options)
        case GuideKind.REGEX:
            return llguidance.LLMatcher.grammar_from_regex(guide.text)
        case GuideKind.GRAMMAR:
            return llguidance.LLMatcher.grammar_from_lark(guide.text)


def _shortened(problem: str) -> str:
    text = " ".join(problem.split())
    return text if len(text) <= MAX_PROBLEM else f"{text[: MAX_PROBLEM - 1]}…"

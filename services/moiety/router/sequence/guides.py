"""Guided output: a grammar, compiled for the checkpoint's tokenizer, determines which tokens may come next (llguidance).

A guide describes the text that the client receives. At the start of a text (after a prompt of nothing but special tokens, or
in an encoder-decoder) some tokenizers drop a leading space, so there a guide is compiled with that space before it.

`Guides` compiles guides off the engine's thread, before a request is queued, and in another process first
(`guide_trial.py`). A `Matcher` follows one sequence. It is updated from the sequence's tokens alone, so resumed, preempted
and forked sequences need no special handling.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders

from moiety.core.sampling import Guide, GuideKind
from moiety.core.sampling_options import MAX_GUIDE_CHARACTERS
from moiety.errors import CheckpointError, FailedPrecondition, InvalidRequest, MoietyError, ResourceExhausted
from moiety.model.checkpoint.tokenizer import TokenKinds, open_tokenizer
from moiety.router.sequence.guide_trial import LIMITS, GuideTrial, first_mask_problem

COMPILE_S = 5.0  # a large JSON schema takes some 100 ms
KEPT_BYTES = 256 << 20  # of compiled guides in the cache: clients send the same schema repeatedly
# What a compiled guide takes. All sequences that follow it share its lexer, which gains states with the tokens that they
# generate. Measured with 60,000 tokens in the vocabulary: 28 to 53 KB for a text of five characters, 4 MB for one of 50,000,
# 54 MB after 3,000 tokens.
LEAST_BYTES, CHARACTER_BYTES, FOLLOWED_BYTES, MOST_FOLLOWED_BYTES = 64 << 10, 100, 18 << 10, 100 << 20
# Processor time of the engine's thread for following one output. An ambiguous grammar, such as `start: start start | "a"`,
# takes time that grows with the square of the output, up to 0.5 s per token. A JSON schema takes some 20 µs.
STEP_S, TOKEN_S = 0.02, 200e-6  # for each step, and for each token in it: an output that is resumed is followed at once
TOGETHER_S = 0.05  # for each step, of all outputs together beyond TOKEN_S: the costliest ones end
AT_ONCE = 16  # tokens that are followed between two looks at the clock
MAX_PROBLEM = 200  # characters of a compiler's error message that a client receives
# llguidance would compute the whole text that a guide forces, such as a million characters of `(a{1000}){1000}`, in one
# mask on the engine's thread: 1 s and 180 MB. Without forcing, the model chooses how a forced text is cut into tokens.
_OPTIONS = '%llguidance {"no_forcing": true}'
# White space between parts of JSON is bounded, as a model may otherwise fill all of max_tokens with it.
_JSON: llguidance._lib.JsonCompileOptions = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}"}
# The trial's tokenizer has 262 tokens, so a special token that a grammar names by its id becomes one that it has.
_TOKEN_ID, _TRIAL_TOKEN = re.compile(r"<\[\d+\]>"), "<[256]>"
_EXPECTED = {
    GuideKind.JSON_SCHEMA: "a JSON Schema that compiles",
    GuideKind.REGEX: "a regular expression in Rust's regex syntax that compiles",
    GuideKind.GRAMMAR: "a Lark grammar that compiles",
}


class CompiledGuide:
    """A compiled guide, shared by all sequences that follow it."""

    def __init__(self, guide: Guide, fresh: llguidance.LLMatcher, executor: llguidance.LLExecutor):
        self.kind, self.text = guide.kind, guide.text
        self._fresh, self.executor = fresh, executor
        self.followed = 0  # tokens, by all matchers

    @property
    def bytes(self) -> int:
        """Memory that the guide takes, estimated."""
        followed = min(FOLLOWED_BYTES * self.followed, MOST_FOLLOWED_BYTES)
        return LEAST_BYTES + CHARACTER_BYTES * len(self.text) + followed

    def matcher(self) -> Matcher:
        """Returns a new matcher at the start of an output."""
        return Matcher(self, self._fresh.deep_copy())


class Matcher:
    """The position of one sequence in its guide."""

    def __init__(self, guide: CompiledGuide, state: llguidance.LLMatcher):
        self.guide, self.state = guide, state
        self.too_costly: MoietyError | None = None  # why this output must end, if it must
        self.over_s = 0.0  # processor time that the last `follow` took beyond TOKEN_S per token
        self._followed = 0

    def follow(self, generated: Sequence[int]) -> None:
        """Advances over the tokens that the output has gained since the last call, unless that takes too long."""
        self.over_s = 0.0
        if self.too_costly or not (new := list(generated[self._followed :])):
            return
        began = time.thread_time() + TOKEN_S * len(new)
        for start in range(0, len(new), AT_ONCE):
            self.state.consume_tokens(new[start : start + AT_ONCE])
            self.over_s = time.thread_time() - began
            if self.over_s > STEP_S:
                self.too_costly = InvalidRequest(
                    f"sampling.guide.{self.guide.kind}",
                    self.guide.text,
                    f"one that takes less than {STEP_S:g} s per token",
                )
                return
        self._followed = len(generated)
        self.guide.followed += len(new)

    def problem(self) -> MoietyError | None:
        """Returns why the output cannot go on under its guide; None if it can."""
        if self.too_costly:
            return self.too_costly
        if self.state.is_error():
            return MoietyError(f"the output cannot follow its guide: {_shortened(self.state.get_error())}")
        return None


def allowed_tokens(matchers: Sequence[Matcher], vocabulary: int) -> tuple[np.ndarray, dict[int, MoietyError]]:
    """Returns uint8 [matchers, vocabulary], 1 where a token may come next, and the errors of failed matchers by index.

    `matchers` have followed their outputs in this step. The costliest ones fail if all of them took too long together.
    """
    _end_costliest(matchers)
    words = llguidance.numpy.allocate_token_bitmask(len(matchers), vocabulary)
    batch = [(matcher.state, index) for index, matcher in enumerate(matchers) if not matcher.too_costly]
    if batch:
        llguidance.numpy.fill_next_token_bitmask_par(matchers[0].guide.executor, batch, words)
    failed = {index: error for index, matcher in enumerate(matchers) if (error := matcher.problem()) is not None}
    bits = np.unpackbits(words.astype("<i4", copy=False).view(np.uint8), axis=1, bitorder="little")
    return bits[:, :vocabulary], failed


def _end_costliest(matchers: Sequence[Matcher]) -> None:
    costly = sorted((each for each in matchers if each.over_s > 0), key=lambda each: each.over_s)
    together_s = sum(each.over_s for each in costly)
    while together_s > TOGETHER_S:
        ended = costly.pop()
        together_s -= ended.over_s
        ended.too_costly = ended.too_costly or ResourceExhausted(
            f"the guides of this step take more than {TOGETHER_S:g} s; this one, which took {ended.over_s:.3f} s, must end",
            COMPILE_S,
        )


class Guides:
    """Compiles guides for one checkpoint. Reads the checkpoint's tokenizer when it compiles the first guide."""

    def __init__(self, folder: str, vocabulary: int, threads: int):
        self._folder, self._vocabulary, self._threads = folder, vocabulary, threads
        self._kept: OrderedDict[tuple[Guide, int], CompiledGuide | str] = OrderedDict()  # or the problem
        self._trial = GuideTrial()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._executor: llguidance.LLExecutor | None = None
        self._kinds: TokenKinds | None = None
        self._dropped_spaces = 0  # by decoding, at the start of a text
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="guides")
        self.eos_ids: tuple[int, ...] = ()  # known once a guide has been compiled

    async def compile(self, guide: Guide, prompt: Sequence[int]) -> CompiledGuide:
        """Compiles a guide for an output after the ids `prompt`, or takes it from the cache.

        Raises InvalidRequest if the guide does not compile, FailedPrecondition if the checkpoint has no usable tokenizer,
        ResourceExhausted if the wait for other guides and compiling this one take longer than COMPILE_S together.
        """
        try:
            async with asyncio.timeout(COMPILE_S):
                return await asyncio.get_running_loop().run_in_executor(self._thread, self._compile, guide, prompt)
        except TimeoutError:
            raise ResourceExhausted(f"compiling the guide took longer than {COMPILE_S:g} s", COMPILE_S) from None

    def close(self) -> None:
        self._thread.submit(self._trial.close)
        self._thread.shutdown(wait=False, cancel_futures=False)

    def _compile(self, guide: Guide, prompt: Sequence[int]) -> CompiledGuide:
        tokenizer, executor, kinds = self._open()
        key = guide, 0 if any(map(kinds.has_text, prompt)) else self._dropped_spaces
        if (made := self._kept.get(key)) is None:
            made = self._kept[key] = self._make(*key, tokenizer, executor)
        self._kept.move_to_end(key)
        used = sum(map(_bytes, self._kept.values()))
        while used > KEPT_BYTES:
            used -= _bytes(self._kept.popitem(last=False)[1])
        if isinstance(made, str):
            raise InvalidRequest(f"sampling.guide.{guide.kind}", guide.text, f"{_EXPECTED[guide.kind]}: {made}")
        return made

    def _make(
        self, guide: Guide, spaces: int, tokenizer: llguidance.LLTokenizer, executor: llguidance.LLExecutor
    ) -> CompiledGuide | str:
        """Compiles a guide for an output that begins after `spaces` dropped spaces. Returns the problem if there is one."""
        try:
            grammar = _grammar(guide, spaces)
        except (ValueError, RecursionError) as error:
            return _shortened(str(error))
        if problem := self._trial.problem(_TOKEN_ID.sub(_TRIAL_TOKEN, grammar)):
            return _shortened(problem)
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
        # Only the checkpoint's tokenizer shows some problems, such as characters for which its vocabulary has no token.
        if problem := first_mask_problem(matcher.deep_copy()):
            return _shortened(problem)
        return CompiledGuide(guide, matcher, executor)

    def _open(self) -> tuple[llguidance.LLTokenizer, llguidance.LLExecutor, TokenKinds]:
        if self._tokenizer is None or self._executor is None or self._kinds is None:
            try:
                tokenizer, self.eos_ids = open_tokenizer(self._folder)
                self._kinds = TokenKinds(tokenizer)
                _check_kind(tokenizer)
                self._dropped_spaces = _prepare(tokenizer.backend_tokenizer)
                self._tokenizer = llguidance.LLTokenizer(
                    _within(tokenizer.backend_tokenizer, self._vocabulary),
                    n_vocab=self._vocabulary,
                    eos_token=[end for end in self.eos_ids if end < self._vocabulary],
                )
            except (CheckpointError, ValueError) as error:
                why = f"guided output is not possible with this checkpoint's tokenizer: {error}"
                raise FailedPrecondition(why) from error
            self._executor = llguidance.LLExecutor(num_threads=self._threads)
        return self._tokenizer, self._executor, self._kinds


def _check_kind(tokenizer: Any) -> None:
    """Raises CheckpointError for a tokenizer whose tokens have no text of their own."""
    if not tokenizer.is_fast:
        raise CheckpointError(f"{type(tokenizer).__name__} of transformers does not tell the text of a token")
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.WordPiece):
        raise CheckpointError("in WordPiece the text of a token depends on the tokens around it")


def _within(backend: Tokenizer, vocabulary: int) -> str:
    """Returns a tokenizer as JSON, without tokens beyond the `vocabulary` of the model, as one for padding often is."""
    form: str = backend.to_str()
    if max(backend.get_vocab().values()) < vocabulary:
        return form
    whole = json.loads(form)
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["id"] < vocabulary]
    model = whole["model"]
    if isinstance(pieces := model["vocab"], list):
        model["vocab"] = pieces[:vocabulary]
    else:
        model["vocab"] = {piece: token for piece, token in pieces.items() if token < vocabulary}
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if _merged(pair) in model["vocab"]]
    return json.dumps(whole)


def _merged(pair: str | list[str]) -> str:
    """Returns the piece that a merge gives. Older files write the pair as one text with a space between."""
    return pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair)


def _prepare(backend: Tokenizer) -> int:
    """Makes a tokenizer readable for llguidance; returns how many spaces its decoder drops at the start of a text.

    llguidance does not know the decoder Metaspace, so it gets an equal one. They differ in the first token of a text, in
    which Metaspace drops every space. A guide must not use tokens with several spaces, which are therefore made special.
    """
    decoder = backend.decoder
    if decoder is None:
        return 0
    dropped = max(3 - len(decoder.decode(["▁"] * 3)), 0)
    if isinstance(decoder, decoders.Metaspace):
        spaced = [token for token in backend.get_vocab() if token.count("▁") > 1]
        backend.add_special_tokens([AddedToken(token, special=True) for token in spaced])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return dropped


def _grammar(guide: Guide, spaces: int) -> str:
    """Returns a grammar of `spaces` spaces, then the guide. Raises ValueError if a JSON schema is not valid JSON."""
    match guide.kind:
        case GuideKind.JSON_SCHEMA:
            options = _JSON if guide.text.lstrip().startswith("{") else None  # the schema `true` takes no options
            made = llguidance.LLMatcher.grammar_from_json_schema(guide.text, defaults=options)
            grammars = json.loads(made)["grammars"]
        case GuideKind.REGEX:
            grammars = json.loads(llguidance.LLMatcher.grammar_from_regex(guide.text))["grammars"]
        case GuideKind.GRAMMAR:
            grammars = [{"lark_grammar": guide.text}]
    grammars[0]["name"] = "guide"
    before = f'"{" " * spaces}" ' if spaces else ""
    return json.dumps({"grammars": [{"lark_grammar": f"{_OPTIONS}\nstart: {before}@guide"}, *grammars]})


def _bytes(kept: CompiledGuide | str) -> int:
    return kept.bytes if isinstance(kept, CompiledGuide) else MAX_GUIDE_CHARACTERS


def _shortened(problem: str) -> str:
    text = " ".join(problem.split())
    return text if len(text) <= MAX_PROBLEM else f"{text[: MAX_PROBLEM - 1]}…"

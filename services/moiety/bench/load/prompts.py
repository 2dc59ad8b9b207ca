"""The requests of a run, in their order: synthetic prompts or those of a dataset, with times and lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice, repeat, takewhile
from random import Random
from typing import Any

from moiety.bench.load.arrivals import arrival_times
from moiety.bench.load.files import Prompt, TraceEntry, read_dataset, read_trace
from moiety.bench.load.work import LoadWork

BLOCK_TOKENS = 512  # of a trace's block
# Words that most tokenizers have as one token with the space before them, so that a word is about a token.
_WORDS = (
    "the of and to in is that it was for on are with as his they be at one have this from or had by word but what some we "
    "can out other were all there when up use your how said an each she which do their time if will way about many then "
    "them write would like so these her long make thing see him two has look more day could go come did number sound no "
    "most people my over know water than call first who may down side been now find any new work part take get place made "
    "live where after back little only round man year came show every good me give our under name very through just form"
)
_BY_BYTE = [_WORDS.split()[byte % len(_WORDS.split())] for byte in range(256)]  # the word that a random byte chooses


@dataclass(frozen=True, slots=True)
class Planned:
    """One request before it is sent. `at_s`: its time of arrival from the start of the run, 0 in a closed loop."""

    at_s: float
    body: dict[str, Any]


def words(tokens: int, random: Random) -> list[str]:
    """Returns so many words at random, which are about as many tokens."""
    # `random.choices` takes ten times as long, and the event loop waits for it.
    return list(map(_BY_BYTE.__getitem__, random.randbytes(tokens)))


def trace_prompt(entry: TraceEntry, seed: int, number: int) -> str:
    """Returns a text of about `entry.input_tokens` tokens. Blocks with the same id have the same words in every prompt."""
    shared = [word for block in entry.blocks for word in _block_words(seed, block)][: entry.input_tokens]
    return " ".join(shared + words(entry.input_tokens - len(shared), Random(f"{seed}/prompt/{number}")))


@lru_cache(maxsize=1024)
def _block_words(seed: int, block: int) -> list[str]:
    return words(BLOCK_TOKENS, Random(f"{seed}/block/{block}"))


class Plan:
    """The requests of one run. Reads its files at once, so that a wrong line is found before anything is sent."""

    def __init__(self, work: LoadWork, model: str) -> None:
        """Raises InvalidRequest for a file that cannot be used."""
        self._work, self._model = work, model
        self._trace = None if work.trace is None else read_trace(work.trace, work.speed)
        self._dataset = None if work.dataset is None else read_dataset(work.dataset, work.endpoint)

    def requests(self) -> Iterator[Planned]:
        """Yields the requests, up to `most_requests` of them, and of an open loop those that arrive within `seconds`."""
        work = self._work
        planned = self._traced() if self._trace is not None else self._untraced()
        if work.seconds is not None:
            limit_s = work.seconds
            planned = takewhile(lambda request: request.at_s < limit_s, planned)
        return islice(planned, work.most_requests)

    def warmup(self) -> Iterator[Planned]:
        """Yields the requests to send before the measurement. Their synthetic prompts are not used in it."""
        lengths, random = self._lengths(), Random(f"{self._work.seed}/warmup")
        for _ in range(self._work.warmup):
            tokens, output_tokens = next(lengths)
            yield Planned(0.0, self._body(self._as_prompt(" ".join(words(tokens, random))), output_tokens))

    def _traced(self) -> Iterator[Planned]:
        for number, entry in enumerate(self._trace or ()):
            prompt = self._as_prompt(trace_prompt(entry, self._work.seed, number))
            yield Planned(entry.at_s, self._body(prompt, entry.output_tokens))

    def _untraced(self) -> Iterator[Planned]:
        work, lengths = self._work, self._lengths()
        times = (
            repeat(0.0)
            if work.rate is None
            else arrival_times(work.arrivals, work.rate, work.burstiness, Random(f"{work.seed}/arrivals"))
        )
        for number, at_s in zip(count(), times):
            tokens, output_tokens = next(lengths)
            if self._dataset is not None:
                prompt = self._dataset[number % len(self._dataset)]
            else:
                prompt = self._as_prompt(" ".join(words(tokens, Random(f"{work.seed}/prompt/{number}"))))
            yield Planned(at_s, self._body(prompt, output_tokens))

    def _lengths(self) -> Iterator[tuple[int, int]]:
        """Yields (input tokens, output tokens) without end."""
        work, random = self._work, Random(f"{self._work.seed}/lengths")
        while True:
            yield work.input_tokens.draw(random), work.output_tokens.draw(random)

    def _as_prompt(self, text: str) -> Prompt:
        return text if self._work.endpoint == "completions" else [{"role": "user", "content": text}]

    def _body(self, prompt: Prompt, output_tokens: int) -> dict[str, Any]:
        work = self._work
        return {
            "model": self._model,
            "prompt" if work.endpoint == "completions" else "messages": prompt,
            "max_tokens": output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if work.ignore_eos else {}),
            **work.extra,
        }

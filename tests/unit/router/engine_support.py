"""Small arithmetic models that replace a network, and helpers to run an engine with them."""

from __future__ import annotations

import random
import threading
from collections import abc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from moiety.core.sampling import Sampling
from moiety.model.seam import current_batch, current_prompts
from moiety.router.cache.cache_spec import CacheSpec, LayerSpec
from moiety.router.cache.kv_cache import KVCache
from moiety.router.engine import Engine
from moiety.router.sequence.sequence import Emitted, Sequence
from moiety.router.step_runner import StepRunner
from moiety.telemetry.tracing import NO_TRACER

VOCABULARY = 32
STOP = 9
START = 1  # first token of a TranslatingModel's output
BLOCK_TOKENS = 4
SPEC = CacheSpec({0: LayerSpec(1, 2, 2, torch.float32)})
_LOGITS = torch.randn(257, VOCABULARY, generator=torch.Generator().manual_seed(0))


class CountingModel(torch.nn.Module):
    """Predicts the last token plus one. `before` receives the step's ids and may raise, as a hop does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.before: Callable[[list[int]], None] = lambda _: None
        self.steps: list[list[int]] = []

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **_: Any) -> Any:
        ids = input_ids[0].tolist()
        self.before(ids)
        self.steps.append(ids)
        following = (input_ids[0, logits_to_keep] + 1) % VOCABULARY
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, VOCABULARY)[None].float())


class RememberingModel(CountingModel):
    """Keeps its tokens in the KV cache. Its logits are a function of the cached tokens, of the last `window` if given.

    A block that is lost, given to two sequences, or not copied in a fork changes the output.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window

    def forward(
        self,
        input_ids: torch.Tensor,
        logits_to_keep: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> Any:
        self.before(input_ids[0].tolist())
        self.steps.append(input_ids[0].tolist())
        assert position_ids is not None
        batch = current_batch()
        assert torch.equal(position_ids[0] + 1, batch.length)
        key = input_ids[0].float().view(-1, 1, 1).expand(-1, 1, 2)
        keys, values = batch.store(0, key, key + 1, self.window)
        rows = []
        for token in logits_to_keep.tolist():
            length, table = int(batch.length[token]), batch.tables[batch.sequence[token]]
            kept = keys[table, 0, :, 0].flatten()[:length]
            first = max(0, length - self.window) if self.window else 0
            assert torch.equal(values[table, 0, :, 1].flatten()[first:length], kept[first:] + 1)
            rows.append(expected_logits(kept.int().tolist(), self.window))
        return SimpleNamespace(logits=torch.stack(rows)[None])


class TranslatingModel(CountingModel):
    """An encoder-decoder that keeps prompts and outputs in the KV cache. Its logits are a function of all cached tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[tuple[int, ...]] = []  # lengths of the prompts that each step encoded

    def forward(
        self,
        input_ids: torch.Tensor,
        logits_to_keep: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> Any:
        batch, prompts = current_batch(), current_prompts()
        self.before(prompts.ids.tolist())
        self.steps.append(input_ids[0].tolist())
        self.encoded.append(prompts.lengths)
        key = prompts.ids.float().view(-1, 1, 1).expand(-1, 1, 2)
        prompts.store(0, key, key + 1)
        key = input_ids[0].float().view(-1, 1, 1).expand(-1, 1, 2)
        keys, values = batch.store(0, key, key + 1)
        rows = []
        for token in logits_to_keep.tolist():
            sequence = batch.sequence[token]
            text: list[int] = []
            for table, length in ((prompts.tables, prompts.length), (batch.tables, batch.length)):
                kept = keys[table[sequence], 0, :, 0].flatten()[: int(length[token])]
                assert torch.equal(values[table[sequence], 0, :, 1].flatten()[: len(kept)], kept + 1)
                text += kept.int().tolist()
            rows.append(expected_logits(text))
        return SimpleNamespace(logits=torch.stack(rows)[None])


def expected_translation(prompt: abc.Sequence[int], count: int, output: abc.Sequence[int] = ()) -> list[int]:
    """Returns the next `count` greedy tokens of a TranslatingModel after START and `output`, computed naively."""
    return expected_tokens([*prompt, START, *output], count)


def expected_logits(tokens: abc.Sequence[int], window: int | None = None) -> torch.Tensor:
    """Returns the logits [V] of a RememberingModel after `tokens`."""
    seen = list(enumerate(tokens))[-window if window else 0 :]
    return _LOGITS[sum((position % 11 + 1) * (token + 1) for position, token in seen) % len(_LOGITS)]


def expected_tokens(prompt: abc.Sequence[int], count: int, window: int | None = None) -> list[int]:
    """Returns the next `count` greedy tokens of a RememberingModel after `prompt`, computed naively."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(expected_logits(tokens, window).argmax()))
    return tokens[len(prompt) :]


class NoHop:
    """A StepBackend that records the current step. These models call no experts."""

    layer_began_ns = 0

    def begin_step(self, step: Any) -> NoHop:
        self.step = step
        return self

    def poll(self) -> None:
        """Does nothing: no message arrives."""


class Listener:
    """Collects the events of a request by choice."""

    def __init__(self) -> None:
        self.choices: dict[int, list[int]] = {}
        self.ends: dict[int, Emitted] = {}
        self.cached_tokens: dict[int, int] = {}
        self.prompt_logprobs: list[float] = []
        self.ended = threading.Event()  # set when all choices that started have ended

    def __call__(self, emitted: Emitted) -> None:
        assert emitted.choice not in self.ends, "an event came after the end"
        if emitted.choice not in self.choices:
            self.cached_tokens[emitted.choice] = emitted.cached_tokens
        self.prompt_logprobs += emitted.prompt_logprobs
        self.choices.setdefault(emitted.choice, []).extend(emitted.token_ids)
        if emitted.finish is not None or emitted.error is not None:
            self.ends[emitted.choice] = emitted
            if len(self.ends) == len(self.choices):
                self.ended.set()

    @property
    def tokens(self) -> list[int]:
        """The tokens of a request with one choice."""
        return self.choices.get(0, [])

    @property
    def end(self) -> Emitted | None:
        """The last event of a request with one choice."""
        return self.ends.get(0)


def greedy(max_tokens: int, **options: bool) -> Sampling:
    """Returns greedy sampling that ignores the stop token."""
    return Sampling(max_tokens=max_tokens, ignore_eos=True, **options)


def prompt_of(seed: int, length: int) -> list[int]:
    """Returns `length` random tokens."""
    return random.Random(seed).choices(range(VOCABULARY), k=length)


def engine_of(
    model: CountingModel,
    *,
    hop: NoHop | None = None,
    slots: int = 4,
    token_budget: int = 10,
    queue_limit: int = 1000,
    blocks: int = 25,
    revision: str | None = "r",
    window: int | None = None,
    speculative_tokens: int = 0,
    cross_attention: bool = False,
    threads: int = 1,
) -> Engine:
    """Builds an engine that is not started: the test steps or starts it."""
    spec = CacheSpec({0: LayerSpec(1, 2, 2, torch.float32, window=window)}, cross_attention=cross_attention)
    memory = blocks * BLOCK_TOKENS * spec.bytes_per_token
    cache = KVCache(spec, memory, torch.device("cpu"), block_tokens=BLOCK_TOKENS, revision=revision)
    return Engine(
        StepRunner(model, cache, [hop or NoHop()]),
        cache,
        slots=slots,
        token_budget=token_budget,
        queue_limit=queue_limit,
        threads=threads,
        report_missing=lambda *_: None,
        tracer=NO_TRACER,
        speculative_tokens=speculative_tokens,
    )


def submit(
    engine: Engine, prompt: abc.Sequence[int], *, max_tokens: int = 3, sampling: Sampling | None = None, **options: Any
) -> tuple[Sequence, Listener]:
    """Submits a request with this prompt."""
    listener = Listener()
    sampling = sampling or Sampling(max_tokens=max_tokens)
    sequence = Sequence(
        request_id="-".join(map(str, prompt[:4])),
        tokens=list(prompt),
        prompt_tokens=len(prompt),
        sampling=sampling,
        stop_ids=sampling.ends([STOP]),
        emit=listener,
        **options,
    )
    engine.submit(sequence)
    return sequence, listener


def finish(engine: Engine, steps: int = 1000) -> None:
    """Steps until nothing is left to do, and checks that no block is lost."""
    for _ in range(steps):
        if not engine.step():
            assert (engine.load.running, engine.load.waiting) == (0, 0)
            assert engine.load.free_blocks == engine.blocks
            engine.check_integrity()
            return
    raise AssertionError(f"the engine still had work after {steps} steps")

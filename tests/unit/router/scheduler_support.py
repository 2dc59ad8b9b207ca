"""Sequences, and a scheduler that runs steps as an engine would."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from moiety.core.sampling import Sampling
from moiety.router.cache.cache_spec import CacheSpec, LayerSpec
from moiety.router.cache.kv_cache import KVCache
from moiety.router.schedule.scheduler import Scheduler
from moiety.router.sequence.sequence import Sequence
from moiety.router.sequence.step_plan import StepPlan

SPEC = CacheSpec({0: LayerSpec(1, 2, 2, torch.float32)})
BLOCK_TOKENS = 4


def sequence(name: str, prompt: int = 1, *, computed: int = 0, max_tokens: int = 4, **options: object) -> Sequence:
    """Builds a request with `prompt` tokens that no other name shares; `computed` of them are in the cache."""
    return Sequence(
        request_id=name,
        tokens=[sum(name.encode())] * prompt,
        prompt_tokens=prompt,
        sampling=Sampling(max_tokens=max_tokens),
        stop_ids=frozenset(),
        emit=lambda _: None,
        computed=computed,
        **options,  # type: ignore[arg-type]
    )


class Bench:
    """A scheduler with a cache, and the steps that an engine would do on it."""

    def __init__(
        self, *sequences: Sequence, slots: int = 8, budget: int = 10, blocks: int = 100, revision: str | None = None
    ):
        memory = blocks * BLOCK_TOKENS * SPEC.bytes_per_token
        self.cache = KVCache(SPEC, memory, torch.device("cpu"), block_tokens=BLOCK_TOKENS, revision=revision)
        self.scheduler = Scheduler(self.cache, slots, budget)
        self.add(*sequences)

    def add(self, *sequences: Sequence) -> None:
        for one in sequences:
            self.scheduler.add(one)

    def admitted(self) -> list[str]:
        return names(iter(self.scheduler.admit_next, None))

    @property
    def running(self) -> list[str]:
        return names(self.scheduler.running)

    def plan(self) -> StepPlan:
        """Returns the next step's plan; checks that its tokens have blocks."""
        plan = self.scheduler.plan_step()
        for item in plan.scheduled:
            assert item.sequence.table.count * BLOCK_TOKENS >= item.sequence.computed + item.count
        self.check()
        return plan

    def step(self) -> StepPlan:
        """Admits and runs one step as an engine would, and appends a token to each sequence that samples."""
        self.admitted()
        plan = self.plan()
        for item in plan.scheduled:
            item.sequence.computed += item.count
            self.cache.commit(item.sequence.table, item.sequence.tokens, item.sequence.computed, item.sequence.tenant)
            if item.samples:
                item.sequence.tokens.append(1)
                if item.sequence.generated == item.sequence.sampling.max_tokens:
                    self.scheduler.remove(item.sequence)
        self.check()
        return plan

    def check(self) -> None:
        self.cache.check_integrity(one.table for one in self.scheduler.running)


def names(sequences: Iterable[Sequence]) -> list[str]:
    """Returns the request ids."""
    return [one.request_id for one in sequences]


def summary(plan: StepPlan) -> list[tuple[str, int, bool]]:
    """Returns (request id, tokens, whether its next token is sampled) of each item."""
    return [(item.sequence.request_id, item.count, item.samples) for item in plan.scheduled]

"""What runs next: admits waiting sequences, packs a step from decode tokens and prefill chunks, and shares out blocks.

Running sequences are kept in order of rank (priority, then arrival). Blocks are taken as tokens need them. When none is
left, the running sequence of the highest rank number gives its own back and waits again, its tokens kept: they are
computed once more later, as far as the prefix cache has not kept them. So the first in rank always advances, and whatever
fits alone comes to its end.
"""

from __future__ import annotations

from bisect import insort
from itertools import count

from moiety.router.cache.kv_cache import KVCache
from moiety.router.schedule.waiting import WaitingQueue
from moiety.router.sequence.drafts import Drafter
from moiety.router.sequence.sequence import Sequence
from moiety.router.sequence.step_plan import Scheduled, StepPlan


class Scheduler:
    """Decode goes first, so that running streams never wait for somebody's prompt."""

    def __init__(self, cache: KVCache, slots: int, token_budget: int, speculative_tokens: int = 0):
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # in order of rank
        self._cache, self._slots, self._token_budget = cache, slots, token_budget
        self._speculative_tokens = speculative_tokens  # drafts of a sequence in one step, at most
        self._arrivals = count()
        self._refused: tuple[Sequence, int, int] | None = (
            None  # who is next, and the slots and blocks it was refused at
        )

    def add(self, sequence: Sequence) -> None:
        """A new request."""
        sequence.arrival = next(self._arrivals)
        for sibling in sequence.siblings:
            sibling.arrival = sequence.arrival
        self.waiting.push(sequence)

    def admit(self) -> list[Sequence]:
        """Moves waiting sequences to running while slots and blocks last; returns those admitted.

        Nobody overtakes who is next. A higher priority takes the place of lower ones.
        """
        admitted = []
        while (sequence := self.waiting.first()) is not None:
            slots, blocks = self._free_slots, self._spare_blocks
            if self._refused is not None:
                who, slots_then, blocks_then = self._refused
                if who is sequence and slots <= slots_then and blocks <= blocks_then:
                    break  # nothing has come free: save the look for its prefix, which takes long for long prompts
            found = self._match(sequence)
            if not self._has_place(sequence, found):
                self._refused = sequence, slots, blocks
                break
            self._refused = None
            self.waiting.pop()
            sequence.computed = self._cache.adopt(sequence.table, found)
            if sequence.encoder_ids:  # blocks for all of it: a prompt is encoded in one piece
                self._cache.grow(sequence.cross_table, len(sequence.encoder_ids))
            insort(self.running, sequence, key=_rank)
            admitted.append(sequence)
        return admitted

    def plan_step(self) -> StepPlan:
        """Every decoding sequence's token, then prompt chunks, then drafts, as far as the token budget goes; may be empty.

        Each of them has its blocks when this returns.
        """
        chosen: list[Scheduled] = []
        left = self._token_budget
        for prefill in (False, True):
            at = 0
            while at < len(self.running) and left > 0:  # preemption takes from the end only
                sequence = self.running[at]
                at += 1
                encode = sequence.to_encode
                if encode > left and any(item.encode for item in chosen):
                    continue  # prompts are encoded in one piece; only the first of a step may be beyond its budget
                if sequence.prefilling is prefill:
                    wish = min(max(left - encode, 1), len(sequence.tokens) - sequence.computed)
                    granted = self._make_room(sequence, wish)
                    if granted > 0:
                        chosen.append(Scheduled.of(sequence, granted))
                        left -= granted + encode
        chosen = [item for item in chosen if item.sequence.table.count]  # less who had to make room
        return StepPlan(tuple(self._with_drafts(chosen, left) if self._speculative_tokens else chosen))

    def _with_drafts(self, chosen: list[Scheduled], left: int) -> list[Scheduled]:
        """Lets sequences guess ahead with what is left of the token budget, in blocks that nobody else needs."""
        extended = []
        for item in chosen:
            sequence = item.sequence
            most = min(left, sequence.sampling.max_tokens - sequence.generated - 1)
            if sequence.drafts and most > 0:
                sequence.drafter = sequence.drafter or Drafter(self._speculative_tokens)
                drafts = sequence.drafter.draft(sequence.tokens, most)
                room = self._cache.grow(sequence.table, len(sequence.tokens) + len(drafts)) - len(sequence.tokens)
                item = item.with_drafts(drafts[:room])
                left -= len(item.drafts)
            extended.append(item)
        return extended

    def fork(self, sequence: Sequence) -> None:
        """The siblings of a sequence whose prompt is computed begin to run beside it, in the slots held for them.

        They share its blocks; one for which there is no block left waits, and computes the prompt again.
        """
        for sibling in sequence.siblings:
            sibling.admitted, sibling.cached_tokens = True, sequence.cached_tokens
            table = self._cache.fork(sequence.table, sequence.computed)
            if table is None:
                self.waiting.push_front(sibling)
            else:
                sibling.table, sibling.computed = table, sequence.computed
                sibling.cross_table, sibling.encoded = self._cache.share(sequence.cross_table), sequence.encoded
                insort(self.running, sibling, key=_rank)
        sequence.siblings = ()

    def remove(self, sequence: Sequence) -> None:
        """Frees whatever the sequence holds, running or waiting."""
        if not self.waiting.remove(sequence) and sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.restart()
        self.waiting.push_front(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._cache.release(sequence.table)
        self._cache.release(sequence.cross_table)

    # Admission ---------------------------------------------------------------------------------------------------

    def _match(self, sequence: Sequence) -> list[int]:
        if sequence.scores_prompt:
            return []
        return self._cache.match(sequence.table, sequence.tokens, sequence.tenant)

    def _has_place(self, sequence: Sequence, found: list[int]) -> bool:
        """Whether there are slots and blocks for all tokens it has; sees to it where lower priorities are in the way."""
        needed = self._cache.blocks_for(len(sequence.tokens)) - len(found) + self._cache.unheld(found)
        needed += self._cache.blocks_for(len(sequence.encoder_ids))
        lower = [other for other in self.running if other.priority > sequence.priority]
        slots = self._free_slots + sum(other.slots for other in lower)
        blocks = self._cache.free_blocks + sum(other.held_blocks for other in lower)
        if slots < sequence.slots or blocks < needed:
            return False
        while self._free_slots < sequence.slots or self._spare_blocks < needed:
            if not lower:
                return False
            self._preempt(lower.pop())
        return True

    @property
    def _free_slots(self) -> int:
        return self._slots - sum(sequence.slots for sequence in self.running)

    @property
    def _spare_blocks(self) -> int:
        """Free blocks, less those that running prompts have yet to take, and one for each sequence to decode into.

        Without that margin a sequence would be admitted only to be sent back a few steps later.
        """
        promised = sum(
            max(0, self._cache.blocks_for(len(sequence.tokens)) - len(sequence.table.held)) + 1
            for sequence in self.running
        )
        return self._cache.free_blocks - promised

    # Blocks for a step -------------------------------------------------------------------------------------------

    def _make_room(self, sequence: Sequence, wish: int) -> int:
        """Takes blocks for up to `wish` tokens, from sequences of higher rank numbers if need be; returns for how many.

        A sequence that gets none keeps what it has and waits for others to end: nothing is computed twice for it
        unless somebody before it needs its blocks.
        """
        while True:
            granted = self._cache.grow(sequence.table, sequence.computed + wish) - sequence.computed
            if granted > 0 or self.running[-1] is sequence:
                return granted
            self._preempt(self.running[-1])


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank

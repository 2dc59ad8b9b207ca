"""Schedules: admits waiting sequences, packs a step from decode tokens and prefill chunks, and allocates blocks.

Running sequences are kept in order of rank (priority, then arrival). Blocks are allocated as tokens need them. When no
block is free, the running sequence with the highest rank number is preempted: it frees its blocks, keeps its tokens and
waits again. When it runs again, it recomputes its tokens, except a prefix that is still cached. So the first sequence in rank
always advances, and a sequence that fits in the whole cache can finish.
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
    """Plans each step with decode tokens first, so that running streams do not wait for the prompts of others."""

    def __init__(self, cache: KVCache, slots: int, token_budget: int, speculative_tokens: int = 0):
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # in order of rank
        self._cache, self._slots, self._token_budget = cache, slots, token_budget
        self._speculative_tokens = speculative_tokens  # most drafts of one sequence in one step
        self._arrivals = count()
        # The first waiting sequence that did not fit, with the free slots and spare blocks at that time.
        self._refused: tuple[Sequence, int, int] | None = None

    def add(self, sequence: Sequence) -> None:
        """Queues a new request."""
        sequence.arrival = next(self._arrivals)
        for sibling in sequence.siblings:
            sibling.arrival = sequence.arrival
        self.waiting.push(sequence)

    def admit(self) -> list[Sequence]:
        """Moves waiting sequences to running while slots and blocks last; returns the admitted ones.

        Admission follows queue order strictly. A waiting sequence may preempt running sequences of lower priority.
        """
        admitted = []
        while (sequence := self.waiting.first()) is not None:
            slots, blocks = self._free_slots, self._spare_blocks
            if self._refused is not None:
                refused, slots_then, blocks_then = self._refused
                if refused is sequence and slots <= slots_then and blocks <= blocks_then:
                    break  # nothing was freed: skip the prefix lookup, which is slow for long prompts
            found = self._match(sequence)
            if not self._make_place(sequence, found):
                self._refused = sequence, slots, blocks
                break
            self._refused = None
            self.waiting.pop()
            sequence.computed = self._cache.adopt(sequence.table, found)
            if sequence.encoder_ids:  # a prompt is encoded in one piece, so it needs all its blocks now
                self._cache.grow(sequence.cross_table, len(sequence.encoder_ids))
            insort(self.running, sequence, key=_rank)
            admitted.append(sequence)
        return admitted

    def plan_step(self) -> StepPlan:
        """Plans decode tokens, then prompt chunks, then drafts, within the token budget. The plan may be empty.

        Only an encoder's prompt, which is not split, may exceed the budget. When this returns, all blocks that the plan
        needs are allocated.
        """
        chosen: list[Scheduled] = []
        left = self._token_budget
        for prefill in (False, True):
            at = 0
            while at < len(self.running) and left > 0:  # preemption removes from the end only
                sequence = self.running[at]
                at += 1
                encode = sequence.to_encode
                if encode > left and any(item.encode for item in chosen):
                    continue  # prompts are encoded in one piece; only the first of a step may exceed the budget
                if sequence.prefilling is prefill:
                    wanted = min(max(left - encode, 1), len(sequence.tokens) - sequence.computed)
                    granted = self._allocate(sequence, wanted)
                    if granted > 0:
                        chosen.append(Scheduled.of(sequence, granted))
                        left -= granted + encode
        chosen = [item for item in chosen if item.sequence.table.count]  # without sequences preempted meanwhile
        return StepPlan(tuple(self._with_drafts(chosen, left) if self._speculative_tokens else chosen))

    def _with_drafts(self, chosen: list[Scheduled], left: int) -> list[Scheduled]:
        """Adds drafts to decoding sequences, within the rest of the token budget and the free blocks."""
        extended = []
        for item in chosen:
            sequence = item.sequence
            most = min(left, sequence.sampling.max_tokens - sequence.generated - 1)
            if sequence.drafts and most > 0:
                sequence.drafter = sequence.drafter or Drafter(self._speculative_tokens)
                drafts = sequence.drafter.draft(sequence.tokens, most)
                granted = self._cache.grow(sequence.table, len(sequence.tokens) + len(drafts)) - len(sequence.tokens)
                item = item.with_drafts(drafts[:granted])
                left -= len(item.drafts)
            extended.append(item)
        return extended

    def fork(self, sequence: Sequence) -> None:
        """Starts the siblings of a sequence whose prompt is computed, in the slots reserved for them.

        Siblings share its full blocks and copy a partly filled last one. A sibling that gets no block for its copy waits
        in the queue, and computes the prompt again.
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
        """Removes a running or waiting sequence and frees its blocks."""
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
        if sequence.needs_prompt_logits:
            return []
        return self._cache.match(sequence.table, sequence.tokens, sequence.tenant)

    def _make_place(self, sequence: Sequence, found: list[int]) -> bool:
        """Makes room for all tokens of a sequence whose cached prefix is in the blocks `found`; returns False if it cannot.

        Preempts running sequences of lower priority as needed.
        """
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
        """Number of free blocks less a reserve: what running prompts still need, and one block per running sequence.

        A running sequence decodes into that block. Without the reserve, a new one could soon be preempted again.
        """
        reserved = sum(
            max(0, self._cache.blocks_for(len(sequence.tokens)) - len(sequence.table.held)) + 1
            for sequence in self.running
        )
        return self._cache.free_blocks - reserved

    # Blocks for a step -------------------------------------------------------------------------------------------

    def _allocate(self, sequence: Sequence, wanted: int) -> int:
        """Allocates blocks for up to `wanted` more tokens of the sequence; returns for how many tokens it got blocks.

        While no block is free, preempts the last sequence in rank. If `sequence` is the last, it keeps its blocks and
        waits until others free some. So a sequence loses its blocks only to one before it in rank.
        """
        while True:
            granted = self._cache.grow(sequence.table, sequence.computed + wanted) - sequence.computed
            if granted > 0 or self.running[-1] is sequence:
                return granted
            self._preempt(self.running[-1])


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank

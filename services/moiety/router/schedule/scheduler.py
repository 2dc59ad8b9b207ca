"""Schedules: admits waiting sequences, packs a step from decode tokens and prefill chunks, and allocates blocks.

Running sequences are kept in order of rank (priority, then arrival). Blocks are allocated as tokens need them. When no
block is free, the running sequence with the highest rank number is preempted: it frees its blocks, keeps its tokens and
waits again. When it runs again, it recomputes its tokens, except a prefix that is still cached. So the first sequence in rank
always advances, and a sequence that fits in the whole cache can finish.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from itertools import count

from moiety.router.cache.kv_cache import KVCache
from moiety.router.schedule.waiting import WaitingQueue
from moiety.router.sequence.drafts import Drafter
from moiety.router.sequence.sequence import Sequence, SequenceFault
from moiety.router.sequence.step_plan import Scheduled, StepPlan

# Rows of logits that a step computes for log probabilities of prompts: 128 MiB in float32 at a vocabulary of 262,144.
PROMPT_LOGITS = 128
INDEX_TOKENS = 1024  # of all sequences, whose n-grams a step adds for drafts: 1.3 ms


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

    def admit_next(self) -> Sequence | None:
        """Moves the first waiting sequence to running and returns it; returns None if none waits or there is no room for it.

        Admission follows queue order strictly. A waiting sequence may preempt running sequences of lower priority.
        """
        if (sequence := self.waiting.first()) is None:
            return None
        try:
            slots, blocks = self._free_slots, self._spare_blocks
            if self._refused is not None:
                refused, slots_then, blocks_then = self._refused
                if refused is sequence and slots <= slots_then and blocks <= blocks_then:
                    return None  # nothing was freed: skip the prefix lookup, which is slow for long prompts
            found = self._match(sequence)
            if not self._make_place(sequence, found):
                self._refused = sequence, slots, blocks
                return None
            self._refused = None
            self.waiting.pop()
            sequence.computed = self._cache.adopt(sequence.table, found)
            if sequence.encoder_ids:  # a prompt is encoded in one piece, so it needs all its blocks now
                self._cache.grow(sequence.cross_table, len(sequence.encoder_ids))
            insort(self.running, sequence, key=_rank)
        except Exception as error:
            raise SequenceFault(sequence) from error
        return sequence

    def plan_step(self) -> StepPlan:
        """Plans decode tokens, then prompt chunks, then drafts, within the token budget. The plan may be empty.

        Only an encoder's prompt, which is not split, may exceed the budget. When this returns, all blocks that the plan
        needs are allocated. Raises SequenceFault, after which it may be called again.
        """
        chosen: list[Scheduled] = []
        left, logits_left = self._token_budget, PROMPT_LOGITS
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
                    if sequence.needs_prompt_logits:
                        wanted = min(wanted, max(logits_left, 1))
                        logits_left -= wanted
                    try:
                        granted = self._allocate(sequence, wanted)
                    except Exception as error:
                        raise SequenceFault(sequence) from error
                    if granted > 0:
                        chosen.append(Scheduled.of(sequence, granted))
                        left -= granted + encode
        chosen = [item for item in chosen if item.sequence.table.count]  # without sequences preempted meanwhile
        return StepPlan(tuple(self._with_drafts(chosen, left) if self._speculative_tokens else chosen))

    def _with_drafts(self, chosen: list[Scheduled], left: int) -> list[Scheduled]:
        """Adds drafts to decoding sequences, within the rest of the token budget and the free blocks."""
        extended, index_left = [], INDEX_TOKENS
        for item in chosen:
            sequence = item.sequence
            if sequence.may_draft:
                try:
                    drafter = sequence.drafter = sequence.drafter or Drafter(self._speculative_tokens)
                    index_left -= drafter.index(sequence.tokens, index_left)
                    most = min(left, sequence.sampling.max_tokens - sequence.generated - 1)
                    decoding = sequence.generated > 0 and not sequence.prefilling
                    if decoding and (drafts := drafter.draft(sequence.tokens, most)):
                        item = self._with_room(item, drafts)
                except Exception as error:
                    raise SequenceFault(sequence) from error
            left -= len(item.drafts)
            extended.append(item)
        return extended

    def _with_room(self, item: Scheduled, drafts: tuple[int, ...]) -> Scheduled:
        """Returns the part of a decoding sequence with as many of `drafts` as get blocks."""
        tokens = len(item.sequence.tokens)
        granted = self._cache.grow(item.sequence.table, tokens + len(drafts)) - tokens
        return item.with_drafts(drafts[:granted])

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
        sequence.forked, sequence.siblings = sequence.siblings, ()

    def remove(self, sequence: Sequence) -> None:
        """Removes a running or waiting sequence and frees its blocks, also those of an admission that failed."""
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

        Preempts running sequences of lower priority, last in rank first: as few as make the room, none if all would not.
        """
        reused = frozenset(found)
        needed = self._cache.blocks_for(len(sequence.tokens)) + self._cache.blocks_for(len(sequence.encoder_ids))
        needed -= sum(self._cache.references(block) > 0 for block in reused)
        slots, spare = self._free_slots, self._spare_blocks
        lower, preempted = self._freed(reversed(self.running)), list[Sequence]()
        while slots < sequence.slots or spare < needed:
            other, freed = next(lower, (sequence, []))
            if other.priority <= sequence.priority:
                return False
            preempted.append(other)
            slots += other.slots
            spare += len(freed) + self._reserve(other)
            needed += sum(block in reused for block in freed)
        for other in preempted:
            self._preempt(other)
        return True

    def _freed(self, sequences: Iterable[Sequence]) -> Iterator[tuple[Sequence, list[int]]]:
        """Yields each of `sequences` with the blocks that nobody holds any more once it, after those before it, has none."""
        left: dict[int, int] = {}  # block -> sequences that would still hold it
        for sequence in sequences:
            freed = []
            for block in (*sequence.table.held, *sequence.cross_table.held):
                left[block] = left.get(block, self._cache.references(block)) - 1
                if not left[block]:
                    freed.append(block)
            yield sequence, freed

    @property
    def _free_slots(self) -> int:
        return self._slots - sum(sequence.slots for sequence in self.running)

    @property
    def _spare_blocks(self) -> int:
        """Number of free blocks less those reserved for running sequences. Else a new one could soon be preempted again."""
        return self._cache.free_blocks - sum(map(self._reserve, self.running))

    def _reserve(self, sequence: Sequence) -> int:
        """Returns how many blocks a running sequence's prompt still needs, and one more, into which it decodes."""
        return max(0, self._cache.blocks_for(len(sequence.tokens)) - sequence.table.size) + 1

    # Blocks for a step -------------------------------------------------------------------------------------------

    def _allocate(self, sequence: Sequence, wanted: int) -> int:
        """Allocates blocks for up to `wanted` more tokens of the sequence; returns for how many tokens it got blocks.

        If no block is free, preempts the last sequences in rank, down to the first that frees one. If only `sequence` and
        those before it could free one, it keeps its blocks and waits. So a sequence loses its blocks only to one before it
        in rank.
        """
        until = sequence.computed + wanted
        if (granted := self._cache.grow(sequence.table, until) - sequence.computed) > 0:
            return granted
        preempted: list[Sequence] = []
        for other, freed in self._freed(reversed(self.running)):
            if other is sequence:
                return 0
            preempted.append(other)
            if freed:
                break
        for other in preempted:
            self._preempt(other)
        return self._cache.grow(sequence.table, until) - sequence.computed


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank

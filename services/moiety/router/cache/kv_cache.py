"""Keys and values in blocks that sequences share, and the slots of their states: bounded by one memory setting.

Which of a table's tokens are valid is the engine's business, and it commits at the end of a step: writing the same
positions again is harmless, and states are written aside (`state_slots.py`).

Shape legend: B blocks, G key/value heads, P tokens per block, Dk and Dv head widths, T tokens of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from moiety.router.cache.blocks import BlockPool, BlockTable, chained, root
from moiety.router.cache.cache_spec import CacheSpec
from moiety.router.cache.state_slots import SlotStates

BLOCK_TOKENS = 16


class KVCache:
    """States for `slots` sequences, as many blocks as fit beside them in `memory_bytes`, and all layers' tensors.

    With a `revision`, full blocks are found again by the tokens they and all before them hold; without one, never. Nor
    where there are states: nobody could go on behind a prefix without the state at its end. Nor behind an encoder's prompt.
    """

    def __init__(
        self,
        spec: CacheSpec,
        memory_bytes: int,
        device: torch.device,
        *,
        slots: int = 1,
        block_tokens: int = BLOCK_TOKENS,
        revision: str | None = None,
    ):
        self.spec, self.block_tokens = spec, block_tokens
        left = memory_bytes - slots * spec.bytes_per_slot
        self.blocks = max(0, left) // max(1, spec.bytes_per_token * block_tokens)
        self._pool = BlockPool(self.blocks)
        self.states = SlotStates(spec.states, slots if left >= 0 else 0, device)
        self._revision, self._reach = None if spec.states or spec.cross_attention else revision, spec.reach
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for index, layer in spec.layers.items():
            # Uninitialised, so on a CPU the kernel hands out pages only as they are written.
            shape = self.blocks, layer.heads, block_tokens
            keys = torch.empty(*shape, layer.key_width, dtype=layer.dtype, device=device)
            if layer.shared:
                values = keys[..., : layer.value_width]
            else:
                values = torch.empty(*shape, layer.value_width, dtype=layer.dtype, device=device)
            self._layers[index] = keys, values

    @property
    def capacity(self) -> int:
        """Tokens in all blocks."""
        return self.blocks * self.block_tokens

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence holds, cached prefixes among them."""
        return self._pool.available

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys [B, G, P, Dk] and values [B, G, P, Dv]; where shared, values are columns of the keys."""
        return self._layers[index]

    def blocks_for(self, tokens: int) -> int:
        """The fewest blocks with which a sequence can come to `tokens` tokens."""
        whole = -(-tokens // self.block_tokens)
        return whole if self._reach is None else min(whole, -(-self._reach // self.block_tokens) + 2)

    # Tables ------------------------------------------------------------------------------------------------------

    def grow(self, table: BlockTable, tokens: int) -> int:
        """Takes blocks until `table` has room for `tokens` or no block is left; returns the tokens it has room for.

        A table without a slot takes one, where there are states: the scheduler runs no more sequences than there are.
        """
        if self.spec.states and table.slot is None:
            table.slot = self.states.take()
        for _ in range(min(-(-tokens // self.block_tokens) - table.count, self._pool.available)):
            table.append(self._pool.take())
        return min(tokens, table.count * self.block_tokens)

    def commit(self, table: BlockTable, tokens: Sequence[int], computed: int, tenant: str) -> None:
        """The step is done, the first `computed` of `tokens` are written: the states that it wrote are the sequence's.

        Full blocks are named, those out of every window given back.
        """
        if table.slot is not None:
            self.states.commit(table.slot)
        full = computed // self.block_tokens
        if self._revision is not None and full > table.named:
            self._digest(table, tokens, full, tenant)
            for at in range(max(table.named, table.first), full):
                self._pool.name(int(table.ids[at]), table.digests[at])
            table.named = full
        if self._reach is not None:
            needed = min(self.spec.first_needed(computed) // self.block_tokens, table.count)
            for at in range(table.first, needed):
                self._pool.give_back(int(table.ids[at]))
            table.first = max(table.first, needed)

    def release(self, table: BlockTable) -> None:
        """Gives slot and blocks back. The last ones are forgotten first, so that what is left of a prefix can be used."""
        for block in reversed(table.held):
            self._pool.give_back(block)
        if table.slot is not None:
            self.states.give_back(table.slot)
        table.clear()

    # Sharing -----------------------------------------------------------------------------------------------------

    def match(self, table: BlockTable, tokens: Sequence[int], tenant: str) -> list[int]:
        """Blocks that hold the longest known prefix of `tokens` but the last, which is always computed."""
        found: list[int] = []
        if self._revision is not None:
            for at in range((len(tokens) - 1) // self.block_tokens):
                self._digest(table, tokens, at + 1, tenant)
                if (block := self._pool.find(table.digests[at])) is None:
                    break
                found.append(block)
        return found

    def unheld(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody holds."""
        return sum(not self._pool.is_held(block) for block in blocks)

    def adopt(self, table: BlockTable, blocks: Sequence[int]) -> int:
        """Makes matched `blocks` the beginning of an empty `table`; returns the tokens that need not be computed."""
        for block in blocks:
            self._pool.hold(block)
            table.append(block)
        table.named = table.count
        return table.count * self.block_tokens

    def fork(self, table: BlockTable, computed: int) -> BlockTable | None:
        """A second table with the same `computed` tokens: full blocks are shared, the last, unfinished one and states copied.

        None where there is no block for the copy.
        """
        full = computed // self.block_tokens
        if computed % self.block_tokens and not self._pool.available:
            return None
        forked = BlockTable()
        forked.ids, forked.digests = table.ids.copy(), list(table.digests)
        forked.first, forked.count, forked.named = table.first, full, min(table.named, full)
        for block in forked.held:
            self._pool.hold(block)
        if computed % self.block_tokens:
            forked.append(self._pool.take())
            source, target = int(table.ids[full]), int(forked.ids[full])
            for keys, values in self._layers.values():
                keys[target] = keys[source]
                values[target] = values[source]
        if table.slot is not None:
            forked.slot = self.states.take()
            self.states.copy(table.slot, forked.slot)
        return forked

    def share(self, table: BlockTable) -> BlockTable:
        """A second table of the same blocks, whose tokens nobody will change."""
        shared = BlockTable()
        for block in table.held:
            self._pool.hold(block)
            shared.append(block)
        return shared

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Raises RuntimeError unless `tables` account for every block that is neither free nor cached, and every slot."""
        tables = list(tables)
        self._pool.check(block for table in tables for block in table.held)
        self.states.check(table.slot for table in tables if table.slot is not None)

    def _digest(self, table: BlockTable, tokens: Sequence[int], blocks: int, tenant: str) -> None:
        """Sees to it that the digests of the first `blocks` full blocks are known."""
        for at in range(len(table.digests), blocks):
            before = table.digests[-1] if at else root(self._revision or "", tenant)
            table.digests.append(chained(before, tokens[at * self.block_tokens : (at + 1) * self.block_tokens]))

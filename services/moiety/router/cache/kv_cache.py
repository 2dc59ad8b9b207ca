"""Keys and values in blocks that sequences can share, and one state slot per sequence, within the setting `kv_memory`.

The engine knows which tokens of a table are valid, and commits at the end of a step. A step may run again: it overwrites
the same positions, and writes states to a second row (`state_slots.py`).

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
    """States for `slots` sequences, and all layers' keys and values in as many blocks as fit in the rest of `memory_bytes`.

    With a `revision`, the cache is also a prefix cache: `match` finds full blocks by their tokens and all tokens before
    them. There is no prefix cache without a `revision`, for models with states (a sequence cannot continue a prefix
    without the state at its end), or for models with cross attention (keys and values depend on the encoder's prompt too).
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
            # Uninitialised: on a CPU the operating system allocates pages only as they are written.
            shape = self.blocks, layer.heads, block_tokens
            keys = torch.empty(*shape, layer.key_width, dtype=layer.dtype, device=device)
            if layer.shared:
                values = keys[..., : layer.value_width]
            else:
                values = torch.empty(*shape, layer.value_width, dtype=layer.dtype, device=device)
            self._layers[index] = keys, values

    @property
    def capacity(self) -> int:
        """Number of tokens that all blocks together can hold."""
        return self.blocks * self.block_tokens

    @property
    def free_blocks(self) -> int:
        """Number of blocks that no sequence holds, including cached prefixes."""
        return self._pool.available

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a layer's keys [B, G, P, Dk] and values [B, G, P, Dv]. Shared values are a view of the key columns."""
        return self._layers[index]

    def blocks_for(self, tokens: int) -> int:
        """Returns how many blocks at a time suffice for a sequence of `tokens` tokens. Blocks out of every window are freed."""
        whole = -(-tokens // self.block_tokens)
        return whole if self._reach is None else min(whole, -(-self._reach // self.block_tokens) + 2)

    # Tables ------------------------------------------------------------------------------------------------------

    def grow(self, table: BlockTable, tokens: int) -> int:
        """Takes blocks until `table` has room for `tokens` or no block is left; returns how many of `tokens` have room.

        If the model keeps states, a table without a slot takes one. The scheduler makes sure that one is free.
        """
        if self.spec.states and table.slot is None:
            table.slot = self.states.take()
        for _ in range(min(-(-tokens // self.block_tokens) - table.count, self._pool.available)):
            table.append(self._pool.take())
        return min(tokens, table.count * self.block_tokens)

    def commit(self, table: BlockTable, tokens: Sequence[int], computed: int, tenant: str) -> None:
        """Commits a step after which the first `computed` of `tokens` are written.

        Commits the states that the step wrote, registers full blocks by digest, and gives the pool back the blocks that
        are out of every window.
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
                self._pool.release(int(table.ids[at]))
            table.first = max(table.first, needed)

    def release(self, table: BlockTable) -> None:
        """Returns the table's slot and blocks to their pools.

        Releases the last block first, so that a cached block is evicted before the blocks of its prefix.
        """
        for block in reversed(table.held):
            self._pool.release(block)
        if table.slot is not None:
            self.states.release(table.slot)
        table.clear()

    # Sharing -----------------------------------------------------------------------------------------------------

    def match(self, table: BlockTable, tokens: Sequence[int], tenant: str) -> list[int]:
        """Returns the blocks of the longest cached prefix of `tokens` that ends before the last token."""
        found: list[int] = []
        if self._revision is not None:
            for at in range((len(tokens) - 1) // self.block_tokens):
                self._digest(table, tokens, at + 1, tenant)
                if (block := self._pool.find(table.digests[at])) is None:
                    break
                found.append(block)
        return found

    def references(self, block: int) -> int:
        """Returns how many sequences hold this block."""
        return self._pool.references(block)

    def adopt(self, table: BlockTable, blocks: Sequence[int]) -> int:
        """Puts matched `blocks` into an empty `table`; returns the number of tokens that need not be computed."""
        for block in blocks:
            self._pool.hold(block)
            table.append(block)
        table.named = table.count
        return table.count * self.block_tokens

    def fork(self, table: BlockTable, computed: int) -> BlockTable | None:
        """Returns a second table with the same `computed` tokens; None if it needs a free block and there is none.

        The tables share full blocks. A partly filled last block and the states are copied.
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
        """Returns a second table of the same blocks, whose tokens must not change any more."""
        shared = BlockTable()
        for block in table.held:
            self._pool.hold(block)
            shared.append(block)
        return shared

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Raises RuntimeError unless `tables` hold exactly the slots not free and the blocks neither free nor cached."""
        tables = list(tables)
        self._pool.check(block for table in tables for block in table.held)
        self.states.check(table.slot for table in tables if table.slot is not None)

    def _digest(self, table: BlockTable, tokens: Sequence[int], blocks: int, tenant: str) -> None:
        """Extends `table.digests` to the first `blocks` blocks, which must be full."""
        for at in range(len(table.digests), blocks):
            before = table.digests[-1] if at else root(self._revision or "", tenant)
            table.digests.append(chained(before, tokens[at * self.block_tokens : (at + 1) * self.block_tokens]))

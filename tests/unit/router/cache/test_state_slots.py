"""State slots: a step writes a second row, no slot is lost, forks are independent, one setting bounds all memory."""

from __future__ import annotations

import pytest
import torch

from moiety.router.cache.blocks import BlockTable
from moiety.router.cache.cache_spec import CacheSpec, LayerSpec, StateSpec
from moiety.router.cache.kv_cache import KVCache

RECURRENT, CONVOLUTION = (0, "recurrent"), (1, "convolution")
SPEC = CacheSpec(
    {1: LayerSpec(1, 2, 2, torch.float32)},
    {
        RECURRENT: StateSpec("recurrent", (3, 2), torch.float32),
        CONVOLUTION: StateSpec("convolution", (5,), torch.bfloat16),
    },
)
CPU = torch.device("cpu")


def cache_of(slots: int, blocks: int = 8) -> KVCache:
    """Builds a cache with exactly `slots` slots and `blocks` blocks."""
    memory = slots * SPEC.bytes_per_slot + blocks * 4 * SPEC.bytes_per_token
    return KVCache(SPEC, memory, CPU, slots=slots, block_tokens=4, revision="r")


def test_states_and_blocks_share_one_memory_setting():
    """Slots take both rows of every state, and blocks get the rest, to the byte."""
    assert SPEC.bytes_per_slot == 2 * (3 * 2 * 4 + 5 * 2)
    assert cache_of(3, 8).blocks == 8
    assert KVCache(SPEC, 3 * SPEC.bytes_per_slot + 63, CPU, slots=3, block_tokens=4).blocks == 0
    assert KVCache(SPEC, 3 * SPEC.bytes_per_slot - 1, CPU, slots=3, block_tokens=4).states.slots == 0
    rows = cache_of(3).states.rows
    assert (rows(RECURRENT).shape, rows(CONVOLUTION).shape) == ((6, 3, 2), (6, 5))


def test_a_step_that_runs_again_reads_the_same_state():
    """What a step writes becomes the state only when the step is committed."""
    cache, table = cache_of(2), BlockTable()
    cache.grow(table, 3)
    states, rows = cache.states, cache.states.rows(RECURRENT)
    for step in range(1, 4):
        for attempt in range(2):
            assert step == 1 or bool((rows[states.committed(table.slot)] == step - 1).all())
            rows[states.pending(table.slot)] = step + 100 * (1 - attempt)
        cache.commit(table, [1, 2, 3], step, "")
    assert bool((rows[states.committed(table.slot)] == 3).all())


def test_forks_are_independent():
    """A forked table starts with the states of the first and changes only its own."""
    cache, table = cache_of(2), BlockTable()
    cache.grow(table, 3)
    states, rows = cache.states, cache.states.rows(RECURRENT)
    rows[states.pending(table.slot)] = 7
    states.rows(CONVOLUTION)[states.pending(table.slot)] = 5
    cache.commit(table, [1, 2, 3], 3, "")
    forked = cache.fork(table, 3)
    assert forked is not None
    assert bool((rows[states.committed(forked.slot)] == 7).all())
    assert bool((states.rows(CONVOLUTION)[states.committed(forked.slot)] == 5).all())
    rows[states.pending(forked.slot)] = 8
    cache.commit(forked, [1, 2, 3, 4], 4, "")
    assert bool((rows[states.committed(table.slot)] == 7).all())
    cache.check_integrity([table, forked])


def test_a_lost_slot_is_reported():
    """The check raises for a slot that is neither free nor held by a table."""
    cache, table = cache_of(2), BlockTable()
    cache.grow(table, 1)
    cache.check_integrity([table])
    block = BlockTable()
    block.append(table.held[0])
    with pytest.raises(RuntimeError, match=r"state slot 0 is listed 0 times as free or held"):
        cache.check_integrity([block])
    cache.release(table)
    cache.check_integrity([])


def test_no_prefix_is_found_where_there_are_states():
    """No prefix is reused, because continuing from it would need the state at its end."""
    cache, table = cache_of(2), BlockTable()
    cache.grow(table, 8)
    cache.commit(table, list(range(8)), 8, "")
    assert cache.match(BlockTable(), list(range(9)), "") == []

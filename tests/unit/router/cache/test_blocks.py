"""The block pool and the cache against naive twins: no block is lost, or shared by sequences with different tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moiety.router.cache.blocks import BlockPool, BlockTable, chained, root
from moiety.router.cache.cache_spec import CacheSpec, LayerSpec
from moiety.router.cache.kv_cache import KVCache

BLOCKS = 6
SPEC = CacheSpec({0: LayerSpec(1, 2, 2, torch.float32)})


class PoolAgainstTwin(RuleBasedStateMachine):
    """The twin keeps each block's references and digest, and the order in which blocks lost their last reference."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.references: dict[int, int] = {}  # of held blocks
        self.digests: dict[int, bytes] = {}
        self.abandoned: list[int] = []  # cached blocks, least recently held first

    @precondition(lambda self: len(self.references) < BLOCKS)
    @rule()
    def take(self) -> None:
        cached_only = len(self.references) + len(self.abandoned) == BLOCKS
        block = self.pool.take()
        assert block not in self.references
        if cached_only:
            assert block == self.abandoned.pop(0), "the block without references for longest is reused first"
            del self.digests[block]
        else:
            assert block not in self.abandoned, "cached blocks are kept while any block is free"
        self.references[block] = 1

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.references)))
        self.pool.release(block)
        self.references[block] -= 1
        if self.references[block] == 0:
            del self.references[block]
            if block in self.digests:
                self.abandoned.append(block)

    @precondition(lambda self: self.references)
    @rule(data=st.data(), digest=st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f", b"g"]))
    def name(self, data: st.DataObject, digest: bytes) -> None:
        block = data.draw(st.sampled_from(sorted(self.references)))
        self.pool.name(block, digest)
        if block not in self.digests and digest not in self.digests.values():
            self.digests[block] = digest

    @precondition(lambda self: self.digests)
    @rule(data=st.data())
    def find_and_hold(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.digests)))
        assert self.pool.find(self.digests[block]) == block
        self.pool.hold(block)
        self.references[block] = self.references.get(block, 0) + 1
        if block in self.abandoned:
            self.abandoned.remove(block)

    @invariant()
    def they_agree(self) -> None:
        assert self.pool.available == BLOCKS - len(self.references)
        self.pool.check(block for block, times in self.references.items() for _ in range(times))


TestPoolAgainstTwin = PoolAgainstTwin.TestCase
TestPoolAgainstTwin.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda pool: pool.check([]), "counts 1 references, and tables hold it 0 times"),
        (lambda pool: pool.check([0, 0]), "counts 1 references, and tables hold it 2 times"),
        (lambda pool: pool.check([0, 1]), "block 1 counts 0 references, and tables hold it 1 times"),
        (lambda pool: (pool.release(0), pool.release(0), pool.check([0])), "KV block 0"),
    ],
    ids=["leaked", "shared without a reference", "used after it was freed", "freed twice"],
)
def test_the_check_notices(wrong: Callable[[BlockPool], object], message: str):
    """Each kind of wrong reference count raises an error that names the block."""
    pool = BlockPool(2)
    assert pool.take() == 0
    with pytest.raises(RuntimeError, match=message):
        wrong(pool)


def test_digests_tell_prefixes_revisions_and_tenants_apart():
    """A digest covers all blocks before it, and differs between tenants and between revisions."""
    first = chained(root("r", "t"), [1, 2])
    assert first == chained(root("r", "t"), [1, 2])
    others = [chained(root("r", "u"), [1, 2]), chained(root("s", "t"), [1, 2]), chained(root("rt", ""), [1, 2])]
    others += [chained(root("r", "t"), [2, 1]), chained(first, [1, 2])]
    assert len({first, *others}) == 6


# The cache -------------------------------------------------------------------------------------------------------


def cache_of(blocks: int, block_tokens: int = 4, spec: CacheSpec = SPEC, revision: str | None = "r") -> KVCache:
    """Builds a cache of exactly `blocks` blocks."""
    memory = blocks * block_tokens * spec.bytes_per_token
    return KVCache(spec, memory, torch.device("cpu"), block_tokens=block_tokens, revision=revision)


def test_memory_is_blocks_times_what_all_layers_keep():
    """K and V of all layers count with their own widths and dtypes, and a latent is stored once."""
    spec = CacheSpec({0: LayerSpec(2, 8, 4, torch.float32), 3: LayerSpec(1, 16, 12, torch.bfloat16, shared=True)})
    assert spec.bytes_per_token == 2 * (8 + 4) * 4 + 16 * 2
    cache = KVCache(spec, 3 * 16 * spec.bytes_per_token + 1, torch.device("cpu"), block_tokens=16)
    assert (cache.blocks, cache.capacity, cache.free_blocks) == (3, 48, 3)
    assert [part.shape for part in cache.layer(0)] == [(3, 2, 16, 8), (3, 2, 16, 4)]
    keys, values = cache.layer(3)
    assert (keys.shape, values.shape, values.data_ptr()) == ((3, 1, 16, 16), (3, 1, 16, 12), keys.data_ptr())


def test_growing_takes_blocks_as_needed_and_available():
    """A block is taken for its first token; when none is left, `grow` returns the tokens that have room."""
    cache, table, other = cache_of(4), BlockTable(), BlockTable()
    assert [(cache.grow(table, tokens), cache.free_blocks) for tokens in (1, 4, 5)] == [(1, 3), (4, 3), (5, 2)]
    assert (cache.grow(other, 20), cache.free_blocks) == (8, 0)
    assert cache.grow(table, 9) == 8
    cache.check_integrity([table, other])
    cache.release(other)
    cache.release(other)
    assert cache.free_blocks == 2
    cache.check_integrity([table])


def test_a_known_prefix_is_found_but_for_the_last_token():
    """Full blocks of equal tokens are shared, also after their sequence has ended; the last token is always computed."""
    cache, first = cache_of(8), BlockTable()
    tokens = list(range(12))
    cache.grow(first, 12)
    cache.commit(first, tokens, 10, "t")
    assert cache.match(BlockTable(), tokens, "t") == first.held[:2], "the third block is not full yet"
    cache.commit(first, tokens, 12, "t")
    assert len(cache.match(BlockTable(), tokens, "t")) == 2, "two of three: the last token is in the third"
    assert len(cache.match(BlockTable(), [*tokens, 7], "t")) == 3
    assert cache.match(BlockTable(), [9, *tokens], "t") == []
    assert cache.match(BlockTable(), tokens, "u") == [], "another tenant"
    held = first.held
    cache.release(first)
    again = BlockTable()
    assert cache.adopt(again, cache.match(again, [*tokens, 7], "t")) == 12
    assert again.held == held
    cache.check_integrity([again])


def test_without_a_revision_nothing_is_found_again():
    """With the setting prefix_cache off, released blocks are free at once and no prefix is found."""
    cache, table = cache_of(4, revision=None), BlockTable()
    cache.grow(table, 8)
    cache.commit(table, list(range(8)), 8, "")
    cache.release(table)
    assert cache.match(BlockTable(), list(range(8)), "") == []


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    """The last blocks of an ended sequence are reused first, since a prefix without its beginning is useless."""
    cache, table, new = cache_of(4), BlockTable(), BlockTable()
    tokens = list(range(16))
    cache.grow(table, 16)
    cache.commit(table, tokens, 16, "")
    held = table.held
    cache.release(table)
    cache.grow(new, 8)
    assert cache.match(BlockTable(), [*tokens, 1], "") == held[:2]


def test_a_fork_shares_full_blocks_and_copies_the_last():
    """Both tables hold the same tokens, and neither sees what the other writes next."""
    cache, table = cache_of(5), BlockTable()
    keys, values = cache.layer(0)
    cache.grow(table, 6)
    for position, block in enumerate(table.held):
        keys[block], values[block] = position + 1, -position - 1
    forked = cache.fork(table, 6)
    assert forked is not None
    assert forked.held[0] == table.held[0]
    assert forked.held[1] != table.held[1]
    assert torch.equal(keys[forked.held[1]], keys[table.held[1]])
    assert torch.equal(values[forked.held[1]], values[table.held[1]])
    cache.check_integrity([table, forked])
    even = cache.fork(table, 4)
    assert even is not None
    assert even.held == table.held[:1], "no partial block: nothing to copy"
    cache.grow(BlockTable(), 8)
    assert cache.free_blocks == 0
    assert cache.fork(table, 6) is None, "no block for the copy, so none is taken"
    for gone in (table, forked, even):
        cache.release(gone)
    assert cache.free_blocks == 3


@pytest.mark.parametrize(
    ("kinds", "held"),
    [
        ([(8, None), (3, None)], 2),  # the next token, at position 20, sees positions from 13 on: blocks 3 and 4
        ([(None, 8)], 1),  # its chunk is 16 to 23: block 4
        ([(8, None), (None, None)], 5),  # one layer with full attention keeps all
    ],
    ids=["windows", "chunks", "mixed"],
)
def test_blocks_out_of_every_window_are_freed(kinds: list[tuple[int | None, int | None]], held: int):
    """If all layers have windows or chunks, only blocks within reach are held, and a sequence of any length fits."""
    layers = {i: LayerSpec(1, 2, 2, torch.float32, window=w, chunk=c) for i, (w, c) in enumerate(kinds)}
    cache, table = cache_of(6, spec=CacheSpec(layers), revision=None), BlockTable()
    for computed in range(1, 21):
        assert cache.grow(table, computed) == computed
        cache.commit(table, [0] * 20, computed, "")
    assert len(table.held) == held
    assert table.count == 5
    cache.check_integrity([table])
    assert cache.blocks_for(10_000) == (2500 if held == 5 else 4)
    cache.release(table)
    assert cache.free_blocks == 6


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_sequences_see_only_their_own_tokens(data: st.DataObject):
    """While random sequences grow, fork, end and return, each table leads to exactly the tokens of its sequence."""
    cache = cache_of(8, block_tokens=2)
    keys = cache.layer(0)[0]
    alive: list[tuple[BlockTable, list[int]]] = []

    def write(table: BlockTable, tokens: list[int], start: int) -> None:
        for at in range(start, len(tokens)):
            keys[int(table.ids[at // 2]), 0, at % 2, 0] = tokens[at]
        cache.commit(table, tokens, len(tokens), "")

    for _ in range(30):
        action = data.draw(st.sampled_from(["begin", "append", "fork", "end"]))
        if action == "begin":
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=6))
            table = BlockTable()
            known = cache.adopt(table, cache.match(table, tokens, ""))
            if cache.grow(table, len(tokens)) == len(tokens):
                write(table, tokens, known)
                alive.append((table, tokens))
            else:
                cache.release(table)
        elif alive:
            at = data.draw(st.integers(0, len(alive) - 1))
            table, tokens = alive[at]
            if action == "append" and cache.grow(table, len(tokens) + 1) == len(tokens) + 1:
                tokens.append(data.draw(st.integers(0, 1)))
                write(table, tokens, len(tokens) - 1)
            elif action == "fork" and (forked := cache.fork(table, len(tokens))) is not None:
                alive.append((forked, list(tokens)))
            elif action == "end":
                cache.release(table)
                del alive[at]
        for table, tokens in alive:
            assert keys[table.ids[: table.count], 0, :, 0].flatten()[: len(tokens)].tolist() == tokens
        cache.check_integrity(table for table, _ in alive)

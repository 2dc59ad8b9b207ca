"""Sets of experts and their text form, and the default partition."""

from __future__ import annotations

import gc
import time
import tracemalloc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moiety.core.experts import ExpertMLP, ExpertSet, ModelShape

expert_sets = st.dictionaries(
    st.integers(0, 80), st.frozensets(st.integers(0, 300), min_size=1, max_size=12), max_size=12
).map(ExpertSet)


def shape_of(experts: int, layers: int = 3) -> ModelShape:
    """Returns a shape with `experts` in each of its MoE layers."""
    return ModelShape("tiny", layers, experts, 2, ExpertMLP(8, 16), "float32", 320, 64)


@given(held=expert_sets)
def test_the_text_form_round_trips(held: ExpertSet):
    """Parsing a set's text gives the set; equal sets have the same text."""
    assert ExpertSet.parse(str(held)) == held
    assert str(ExpertSet(dict(reversed(held.by_layer.items())))) == str(held)


@given(held=expert_sets, layer=st.integers(0, 80), expert=st.integers(0, 300))
def test_a_set_agrees_with_its_iteration(held: ExpertSet, layer: int, expert: int):
    """Length, membership and layers agree with the iteration, which is sorted."""
    pairs = list(held)
    assert pairs == sorted(set(pairs))
    assert len(held) == len(pairs)
    assert ((layer, expert) in held) == ((layer, expert) in pairs) == (expert in held.layer(layer))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        ("0-31:0-7", "0-31:0-7"),
        ("0:1,5;3:2", "0:1,5;3:2"),
        (" 3:2 ; 0:5,1 ", "0:1,5;3:2"),
        ("0-2:0;1:1", "0,2:0;1:0-1"),
        ("0:0-1;0:2", "0:0-2"),
        ("0,1,2:3,4,5", "0-2:3-5"),
    ],
)
def test_text_is_read_leniently_and_written_in_one_form(text: str, canonical: str):
    """Spaces, order and overlaps in the text do not matter."""
    assert str(ExpertSet.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("5", "'5': expected LAYERS:EXPERTS"),
        ("0-3", "'0-3': expected LAYERS:EXPERTS"),
        ("0:1;2", "'2': expected LAYERS:EXPERTS"),
        ("0:3-1", "'3-1': the range runs backwards"),
        *((text, "invalid literal for int") for text in ("a:b", "0:", ":0", "0:1-", "0:-1")),
    ],
)
def test_malformed_text_is_refused(text: str, why: str):
    """Malformed text raises ValueError, which settings and Describe replies turn into their own errors."""
    with pytest.raises(ValueError, match=why):
        ExpertSet.parse(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0-30000:0-3000", "layer '0-30000': must be 0 to 57"),
        ("0-57:0-3000", "expert '0-3000': must be 0 to 255"),
        ("0-57:0-255;0:0", "names more than 14848 experts"),
        ("0:" + ",".join(["0-255"] * 1000), "names experts again and again"),
        ("0:0;" * 100_000, "at most .* for 14848 experts"),
    ],
)
def test_reading_costs_no_more_than_the_model_has_experts(text: str, why: str):
    """A set of a peer beyond the model's shape is refused before anything of its size is allocated."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=why):
            ExpertSet.parse(text, layers=58, experts=256)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def test_a_layer_may_be_named_many_times():
    """Each repetition costs what it names, not what the layer has already: a peer's text cannot hold up the reader."""
    began = time.process_time()
    assert len(ExpertSet.parse("0:0-65535" + ";0:1" * 20_000)) == 65536
    assert time.process_time() - began < 2.0


def test_a_set_is_bounded_where_the_model_is_unknown():
    """Without a model's shape, absolute bounds hold."""
    with pytest.raises(ValueError, match="layer '0-30000': must be 0 to 1023"):
        ExpertSet.parse("0-30000:0-3000")
    with pytest.raises(ValueError, match="names more than 1048576 experts"):
        ExpertSet.parse("0-1000:0-3000")


def test_equal_texts_share_one_set_while_it_is_used():
    """Replicas with equal texts share one object; memory of sets that nobody uses is freed."""
    first = ExpertSet.parse("0-3:7-9")
    assert ExpertSet.parse("0-3:7-9") is first
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None


def test_a_block_is_the_same_experts_in_every_layer():
    """A block holds the same experts in every layer; an empty block is the empty set."""
    assert str(ExpertSet.uniform(4, [2, 0, 1])) == "0-3:0-2"
    assert ExpertSet.uniform(4, []) == ExpertSet()
    assert (3, 2) in ExpertSet.uniform(4, [2])
    assert (4, 2) not in ExpertSet.uniform(4, [2])


@given(experts=st.integers(1, 130), data=st.data())
def test_a_partition_covers_every_expert_once_in_near_equal_blocks(experts: int, data: st.DataObject):
    """Groups are contiguous, differ by at most one expert, and together hold the model."""
    groups = data.draw(st.integers(1, experts))
    parts = shape_of(experts).partition(groups)
    assert len(parts) == groups
    assert [pair for part in parts for pair in part if pair[0] == 0] == [(0, expert) for expert in range(experts)]
    sizes = {len(part) // 3 for part in parts}
    assert max(sizes) - min(sizes) <= 1
    assert all(part.layer(0) == part.layer(2) for part in parts)

"""The waterfall that a person reads of a trace, and how much of a step the trace explains."""

from __future__ import annotations

import dataclasses
import random
import time

import pytest
from synthetic_trace import TRACE_ID, Trace, answer

from moiety.telemetry import SpanName
from moiety.tools.trace.tree import coverage
from moiety.tools.trace.waterfall import waterfall


def test_one_layer_reads_at_a_glance():
    """Golden output: a failed hop, its hedged retry, offsets, and bars scaled to the trace."""
    trace = Trace()
    layer = trace.add("layer", 0, 10, LAYER=2)
    trace.add("hop", 1, 4, layer, REPLICA="experts-0-a1", error="UNAVAILABLE")
    trace.add("hop", 4, 9, layer, REPLICA="experts-0-b7", ATTEMPT=1, HEDGE=True)
    assert waterfall(trace.spans, TRACE_ID, width=80).splitlines() == [
        f"trace {TRACE_ID} · 10.0 ms · 3 spans · 1 service · 1 failed",
        "span                                 service           at ms   took ms",
        "layer 2                              moiety-router      0.00      10.0  ████████",
        "├─ hop → experts-0-a1 ✗ UNAVAILABLE  moiety-router      1.00      3.00  ███▏",
        "└─ hop → experts-0-b7, try 2, hedge  moiety-router      4.00      5.00     ████▏",
    ]


def test_repetition_is_summed_up():
    """120 steps of 8 layers fit a screen: one of each kind in full, the others as a count with their median."""
    text = waterfall(answer().spans, TRACE_ID)
    assert "├─ prefill step" in text
    assert "└─ … 118 more decode steps, 4.10 ms each (p50)" in text
    assert text.count("… 7 more layers, 0.50 ms each (p50)") == 2
    assert len(text.splitlines()) <= 52


def test_an_outlier_is_shown():
    """A step that takes 60 ms longer is shown by itself, not hidden in a median."""
    lines = waterfall(answer(slow_step=40).spans, TRACE_ID).splitlines()
    (slow,) = (line for line in lines if "decode step " in line and "64.1" in line)
    assert "165.2" in slow
    assert any("… 117 more decode steps" in line for line in lines)


@pytest.mark.parametrize("width", [60, 80, 110, 160])
@pytest.mark.parametrize("max_rows", [3, 10, 50])
def test_it_fits_the_given_size(width, max_rows):
    """No line is wider than `width`, and there are at most `max_rows` lines besides title and header."""
    lines = waterfall(answer(4).spans, TRACE_ID, width=width, max_rows=max_rows).splitlines()
    assert max(map(len, lines[1:])) <= width
    assert len(lines) <= max_rows + 2
    if max_rows == 3:
        assert lines[-1].startswith("… ")


def test_focus_shows_one_span_alone():
    """`focus` shows one step alone, with bars scaled to it."""
    spans = answer(10).spans
    step = [span for span in spans if span.name == SpanName.STEP][3]
    lines = waterfall(spans, TRACE_ID, focus=step.span_id).splitlines()
    assert "4.10 ms" in lines[0]
    assert lines[2].startswith("decode step")
    assert "generate" not in "".join(lines)


def test_order_and_repeats_of_arrival_do_not_matter():
    """Neither the order of spans nor repeated ones change the output: an exporter's retry may send a span twice."""
    spans = answer(5).spans
    shuffled = random.Random(7).sample(spans, len(spans)) + spans[:20]
    assert waterfall(shuffled, TRACE_ID) == waterfall(spans, TRACE_ID)


def test_an_incomplete_trace_is_still_shown():
    """Spans without their parent are shown at the top, other traces are left out, and an empty trace is reported."""
    trace = Trace()
    trace.add("layer", 0, 1, "f" * 16, LAYER=0)
    other = dataclasses.replace(trace.spans[0], trace_id="cd" * 16, name="elsewhere")
    text = waterfall([*trace.spans, other], TRACE_ID)
    assert "layer 0" in text
    assert "elsewhere" not in text
    assert waterfall(trace.spans, "00" * 16) == f"trace {'00' * 16}: no spans"


def test_a_long_trace_takes_seconds():
    """1,000 steps (19,000 spans) take seconds at most to lay out, not time quadratic in their number."""
    spans = answer(1000, layers=2).spans
    began = time.monotonic()
    waterfall(spans, TRACE_ID)
    assert time.monotonic() - began < 10


def test_coverage_counts_overlap_once_and_only_inside():
    """Children that overlap, extend beyond the step or leave a gap explain 1–7 and 9–10 of its 10 ms."""
    trace = Trace()
    step = trace.add("step", 0, 10)
    trace.add("layer", 1, 5, step)
    trace.add("layer", 3, 7, step)
    trace.add("layer", 9, 12, step)
    assert coverage(trace.spans, TRACE_ID) == pytest.approx(0.7)


def test_coverage_by_leaves_sees_gaps_inside_layers():
    """A layer whose one hop takes half its time explains the whole step, but only half of it with `leaves`."""
    trace = Trace()
    step = trace.add("step", 0, 10)
    layer = trace.add("layer", 0, 10, step)
    trace.add("hop", 2, 7, layer)
    assert coverage(trace.spans, TRACE_ID) == 1.0
    assert coverage(trace.spans, TRACE_ID, leaves=True) == pytest.approx(0.5)
    assert coverage(trace.spans, TRACE_ID, of=SpanName.LAYER) == pytest.approx(0.5)


def test_coverage_without_children_is_zero():
    """Coverage is 0 without a step, and for a step without children."""
    trace = Trace()
    trace.add("step", 0, 10)
    assert coverage(trace.spans, TRACE_ID) == 0.0
    assert coverage([], TRACE_ID) == 0.0

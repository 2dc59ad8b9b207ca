"""What a person sees of a trace, and how much of it is explained."""

from __future__ import annotations

import dataclasses
import random
import time

import pytest
from synthetic_trace import TRACE_ID, Trace, answer

from moiety.telemetry import SpanName
from moiety.tools.trace.waterfall import coverage, waterfall


def test_one_layer_reads_at_a_glance():
    """Golden: a failed hop, its hedged retry, offsets and bars scaled to the trace."""
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
    """120 steps of 8 layers fit a screen: one of each in full, the rest counted with their median."""
    text = waterfall(answer().spans, TRACE_ID)
    assert "├─ prefill step" in text
    assert "└─ … 118 more decode steps, 4.10 ms each (p50)" in text
    assert text.count("… 7 more layers, 0.50 ms each (p50)") == 2
    assert len(text.splitlines()) <= 52


def test_the_odd_one_out_is_shown():
    """The one step that took 60 ms more is on the screen, not inside a median."""
    lines = waterfall(answer(slow_step=40).spans, TRACE_ID).splitlines()
    (slow,) = (line for line in lines if "decode step " in line and "64.1" in line)
    assert "165.2" in slow
    assert any("… 117 more decode steps" in line for line in lines)


@pytest.mark.parametrize("width", [60, 80, 110, 160])
@pytest.mark.parametrize("max_rows", [3, 10, 50])
def test_it_fits_where_it_is_asked_to(width, max_rows):
    """No line is wider than asked, and no more lines of spans than asked (title and header come on top)."""
    lines = waterfall(answer(4).spans, TRACE_ID, width=width, max_rows=max_rows).splitlines()
    assert max(map(len, lines[1:])) <= width
    assert len(lines) <= max_rows + 2
    if max_rows == 3:
        assert lines[-1].startswith("… ")


def test_focus_shows_one_span_alone():
    """A single step, its bars scaled to itself."""
    spans = answer(10).spans
    step = [span for span in spans if span.name == SpanName.STEP][3]
    lines = waterfall(spans, TRACE_ID, focus=step.span_id).splitlines()
    assert "4.10 ms" in lines[0]
    assert lines[2].startswith("decode step")
    assert "generate" not in "".join(lines)


def test_order_and_repeats_of_arrival_do_not_matter():
    """Spans come from several services in any order, and an exporter's retry may bring one twice."""
    spans = answer(5).spans
    shuffled = random.Random(7).sample(spans, len(spans)) + spans[:20]
    assert waterfall(shuffled, TRACE_ID) == waterfall(spans, TRACE_ID)


def test_an_incomplete_trace_is_still_shown():
    """Spans whose parent never arrived stand at the top; other traces are left out; nothing is said to be nothing."""
    trace = Trace()
    trace.add("layer", 0, 1, "f" * 16, LAYER=0)
    other = dataclasses.replace(trace.spans[0], trace_id="cd" * 16, name="elsewhere")
    text = waterfall([*trace.spans, other], TRACE_ID)
    assert "layer 0" in text
    assert "elsewhere" not in text
    assert waterfall(trace.spans, "00" * 16) == f"trace {'00' * 16}: no spans"


def test_a_long_answer_takes_no_time():
    """4,000 steps (76,000 spans) are laid out in seconds, not in the square of their number."""
    spans = answer(4000, layers=2).spans
    began = time.monotonic()
    waterfall(spans, TRACE_ID)
    assert time.monotonic() - began < 10


def test_coverage_counts_overlap_once_and_only_inside():
    """Children that overlap, stick out or leave a hole: 1–7 and 9–10 of 10 ms are explained."""
    trace = Trace()
    step = trace.add("step", 0, 10)
    trace.add("layer", 1, 5, step)
    trace.add("layer", 3, 7, step)
    trace.add("layer", 9, 12, step)
    assert coverage(trace.spans, TRACE_ID) == pytest.approx(0.7)


def test_coverage_by_leaves_sees_holes_inside_layers():
    """A layer with one hop of half its time explains all of the step, or half of it in the stricter reading."""
    trace = Trace()
    step = trace.add("step", 0, 10)
    layer = trace.add("layer", 0, 10, step)
    trace.add("hop", 2, 7, layer)
    assert coverage(trace.spans, TRACE_ID) == 1.0
    assert coverage(trace.spans, TRACE_ID, leaves=True) == pytest.approx(0.5)
    assert coverage(trace.spans, TRACE_ID, of=SpanName.LAYER) == pytest.approx(0.5)


def test_coverage_of_nothing_is_nothing():
    """No such span, or one without children: 0."""
    trace = Trace()
    trace.add("step", 0, 10)
    assert coverage(trace.spans, TRACE_ID) == 0.0
    assert coverage([], TRACE_ID) == 0.0

"""Names are declared once, and code uses the declarations."""

from __future__ import annotations

import re
from pathlib import Path

import moiety
from moiety.telemetry import names

SOURCES = sorted(path for path in Path(moiety.__file__).parent.rglob("*.py") if "telemetry" not in path.parts)
LITERAL = re.compile(r"""(?:\.start\(\s*|\.set\(\s*|\.observe\(\s*)(?:name=)?f?["']([a-z][^"']*)["']""")
CONSTANT = re.compile(r"\b(SpanName|MetricName|Attribute|ResourceAttribute)\.([A-Z][A-Z_0-9]*)\b")
DECLARED = {*names.SpanName, *names.MetricName, *names.Attribute, *names.ResourceAttribute}


def test_span_and_attribute_names_are_not_spelled_out():
    """No code outside telemetry/ names a span, metric or attribute by a string literal."""
    spelled = [f"{path}: {match[1]}" for path in SOURCES for match in LITERAL.finditer(path.read_text("utf-8"))]
    assert spelled == []


def test_constants_in_use_are_declared():
    """Each `SpanName.X` in the source is a member; a wrong one would only fail on the first sampled request."""
    missing = [
        f"{path}: {match[0]}"
        for path in SOURCES
        for match in CONSTANT.finditer(path.read_text("utf-8"))
        if match[2] not in getattr(names, match[1]).__members__
    ]
    assert missing == []


def test_the_scan_would_find_them():
    """LITERAL matches each way of naming a span or attribute by a string."""
    assert LITERAL.search('tracer.start("hop", parent=None)')
    assert LITERAL.search('tracer.start(\n    f"layer {index}",\n    parent=step)')
    assert LITERAL.search("span.set('moiety.layer', 3)")
    assert not LITERAL.search("span.set(Attribute.LAYER, 3)")


def test_every_metric_is_declared_and_used() -> None:
    """Each metric is declared with description, unit and kind, and some code observes it."""
    assert set(names.METRICS) == set(names.MetricName)
    used = {
        match[2] for path in SOURCES for match in CONSTANT.finditer(path.read_text("utf-8")) if match[1] == "MetricName"
    }
    assert used == set(names.MetricName.__members__)


def test_names_are_well_formed():
    """Names are lower-case dotted words; keys without the prefix moiety. are OpenTelemetry's own."""
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*(\.[a-z]+(_[a-z]+)*)*", name) for name in DECLARED)
    from opentelemetry.semconv._incubating.attributes import (
        error_attributes,
        gen_ai_attributes,
        rpc_attributes,
        server_attributes,
        service_attributes,
    )

    modules = (error_attributes, gen_ai_attributes, rpc_attributes, server_attributes, service_attributes)
    conventions = {value for module in modules for value in vars(module).values() if isinstance(value, str)}
    keys = {*names.Attribute, *names.ResourceAttribute}
    assert {key.value for key in keys if not key.startswith("moiety.")} <= conventions

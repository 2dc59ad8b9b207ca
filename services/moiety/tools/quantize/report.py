"""The report of `moiety quantize`: lines of text, JSON, and a picture of how many bits each expert got."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any
from xml.sax.saxutils import escape

from moiety.model.experts.layout import ExpertLayout
from moiety.policy.precision import Precision
from moiety.tools.quantize.quantize import PLAIN, SMALLER, Quantised

COLOURS = {Precision(16): "#0b3c5d", Precision(8): "#328cc1", Precision(4, 32): "#f2b134", Precision(4, 128): "#d9702a"}
_CELL, _LEFT, _TOP = 12, 70, 70


def lines(quantised: Quantised, memory: int) -> Iterator[str]:
    """Yields the lines of a table: all experts at one precision, for each precision, then the chosen mix."""
    counts = Counter(option.precision for option in quantised.allocation.chosen.values())
    yield f"{'':<28} {'experts':>8} {'bytes':>15} {'relative error':>15}"
    for precision in (PLAIN, *SMALLER):
        if uniform := quantised.uniform(precision):
            size = quantised.other_bytes + uniform.nbytes
            yield f"{f'all at {precision}':<28} {len(uniform.chosen):>8} {size:>15,} {uniform.error:>15.3g}"
    mix = "; ".join(f"{counts[precision]} at {precision}" for precision in sorted(counts, reverse=True))
    size, error = quantised.nbytes, quantised.allocation.error
    yield f"{'chosen':<28} {len(quantised.allocation.chosen):>8} {size:>15,} {error:>15.3g}   {mix}"
    yield f"memory {memory:,} bytes; weights other than experts take {quantised.other_bytes:,}"


def as_json(quantised: Quantised, layout: ExpertLayout, memory: int, source: str) -> dict[str, Any]:
    """Returns everything that was measured and chosen, as plain values for the JSON report.

    The error of an expert is relative to the hidden states of its layer.
    """
    sensitivity = quantised.sensitivity
    return {
        "source": source,
        "memory": memory,
        "bytes": quantised.nbytes,
        "other_bytes": quantised.other_bytes,
        "calibration_tokens": sensitivity.tokens,
        "error": quantised.allocation.error,
        "uniform": {
            str(precision): {"bytes": quantised.other_bytes + uniform.nbytes, "error": uniform.error}
            for precision in (PLAIN, *SMALLER)
            if (uniform := quantised.uniform(precision))
        },
        "experts": [
            {
                "layer": layer,
                "expert": expert,
                "uses": sensitivity.uses[layer, expert],
                "bits": option.precision.bits,
                "group": option.precision.group or None,
                "bytes": option.nbytes,
                "errors": {str(precision): error for precision, error in sensitivity.errors[layer, expert].items()},
            }
            for (layer, expert), option in sorted(quantised.allocation.chosen.items())
        ],
        "layers": [layer.module for layer in layout.layers],
    }


def picture(quantised: Quantised, layout: ExpertLayout, title: str) -> str:
    """Returns an SVG: a row per MoE layer, a cell per expert. Colour shows precision; paler cells were used less."""
    shape = layout.shape
    width, height = _LEFT + max(shape.experts * _CELL, 420) + 20, _TOP + shape.moe_layers * _CELL + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    counts = Counter(option.precision for option in quantised.allocation.chosen.values())
    for place, precision in enumerate((PLAIN, *SMALLER)):
        x = _LEFT + place * 150
        parts.append(f'<rect x="{x}" y="34" width="10" height="10" fill="{COLOURS[precision]}"/>')
        parts.append(f'<text x="{x + 14}" y="43">{precision}: {counts[precision]}</text>')
    most = [
        max(1, *(quantised.sensitivity.uses[layer, expert] for expert in range(shape.experts)))
        for layer in range(shape.moe_layers)
    ]
    for (layer, expert), option in quantised.allocation.chosen.items():
        uses = quantised.sensitivity.uses[layer, expert]
        x, y = _LEFT + expert * _CELL, _TOP + layer * _CELL
        tooltip = f"layer {layer}, expert {expert}: {option.precision}, used {uses} times"
        parts.append(
            f'<rect x="{x}" y="{y}" width="{_CELL - 1}" height="{_CELL - 1}" fill="{COLOURS[option.precision]}" '
            f'fill-opacity="{0.35 + 0.65 * uses / most[layer]:.2f}"><title>{tooltip}</title></rect>'
        )
    for layer in range(shape.moe_layers):
        y = _TOP + layer * _CELL + 9
        parts.append(f'<text x="{_LEFT - 6}" y="{y}" text-anchor="end">layer {layer}</text>')
    foot = _TOP + shape.moe_layers * _CELL + 18
    parts.append(f'<text x="{_LEFT}" y="{foot}">expert 0 to {shape.experts - 1}; paler: used less</text>')
    return "\n".join([*parts, "</svg>"])

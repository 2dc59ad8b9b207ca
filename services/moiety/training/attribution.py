"""Writes SOURCES.md, which goes with the weights: what the model has learned from, under which licences, and whose it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moiety.training.corpus import DOMAINS
from moiety.training.sources import SOURCES
from moiety.training.sources.source import Source

FILE = "SOURCES.md"
_TOP = """# Sources

The texts that this model has learned from. They were cleaned and shortened: code, tables and paragraphs in other
languages were left out of manuals, and notices of licences out of code. Each licence is the one that the package states.
"""


def write_sources(folder: Path, sizes: Mapping[tuple[str, str], int], sources: Sequence[Source] = SOURCES) -> Path:
    """Writes SOURCES.md to `folder` and returns it. `sizes`: bytes of a text by domain and name, as `text_sizes` gives them."""
    parts = [_TOP]
    for domain in DOMAINS:
        of_domain = [source for source in sources if source.domain == domain]
        total = sum(sizes.get((domain, source.name), 0) for source in of_domain)
        rows = [
            f"| {source.attribution} | {source.archive.title} | {source.licence} | {source.stated} |"
            f" {sizes.get((domain, source.name), 0) / 1e6:.2f} |"
            for source in of_domain
        ]
        header = "| text and owner | package | licence | stated in | MB |\n|---|---|---|---|---:|"
        parts.append("\n".join([f"## {domain.capitalize()}: {total / 1e6:.1f} MB\n", header, *rows]) + "\n")
    file = folder / FILE
    file.write_text("\n".join(parts), encoding="utf-8")
    return file


def text_sizes(texts: Path) -> dict[tuple[str, str], int]:
    """Returns the bytes of each text below the folder `texts`, by domain and name."""
    return {(file.parent.name, file.stem): file.stat().st_size for file in sorted(texts.glob("*/*.txt"))}

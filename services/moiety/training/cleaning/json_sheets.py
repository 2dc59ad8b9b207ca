"""Information sheets, statutes and documentation that packages hold as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moiety.training.cleaning import markdown
from moiety.training.cleaning.documents import joined, squeeze
from moiety.training.cleaning.html_pages import paragraphs

_SECTION = 60  # articles of a statute in one document


def _load(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def clean_labour_sheets(files: Sequence[Path]) -> Iterator[str]:
    """Yields sheets of sections in HTML: a list of {title, intro, sections: [{title, html}]}."""
    for file in files:
        for sheet in _load(file):
            parts = [sheet["title"], *paragraphs(sheet.get("intro") or "")]
            for section in sheet["sections"]:
                found = paragraphs(section["html"])
                parts += [section["title"], *found] if section["title"] and found else found
            yield joined(squeeze(part) for part in parts)


def clean_answers(files: Sequence[Path]) -> Iterator[str]:
    """Yields questions with their general answers in Markdown: a list of {title, answers: {generic: {markdown}}}."""
    for file in files:
        for question in _load(file):
            found = markdown.paragraphs(question["answers"]["generic"].get("markdown") or "")
            if found:
                yield joined([squeeze(question["title"]), *found])


def clean_statutes(files: Sequence[Path]) -> Iterator[str]:
    """Yields the articles in force of statutes, about 60 in a document, each section below its title."""
    for file in files:
        articles = list(_articles(_load(file)))
        for start in range(0, len(articles), _SECTION):
            yield joined(paragraph for article in articles[start : start + _SECTION] for paragraph in article)


def _articles(node: dict[str, Any], title: str = "") -> Iterator[list[str]]:
    """Yields the paragraphs of each article below a node; the first article of a section begins with its title."""
    values = node.get("data", {})
    if node.get("type") == "article":
        if (values.get("etat") or "VIGUEUR").startswith("VIGUEUR"):
            found = paragraphs(values.get("texteHtml") or values.get("texte") or "")
            yield [title, *found] if title and found else found
        return
    if not node.get("children") or (values.get("etat") or "").startswith("ABROGE"):
        return
    title = re.sub(r"\s*\(.*\)$", "", squeeze(values.get("title", "")))
    for child in node["children"]:
        yield from _articles(child, title)
        title = ""


def electron(locale: str) -> Callable[[Sequence[Path]], Iterator[str]]:
    """Returns the cleaner of one locale of {locale: {page: {html}}}."""

    def clean(files: Sequence[Path]) -> Iterator[str]:
        for file in files:
            for page in _load(file)[locale].values():
                if found := paragraphs(page["html"]):
                    yield joined(found)

    return clean

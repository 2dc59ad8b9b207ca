"""Texts that packages hold as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moiety.training.cleaning import json_sheets

LONG = "L’employeur informe les salariés des postes qui sont disponibles."


def _file(folder: Path, value: Any) -> Path:
    file = folder / "a.json"
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


def test_labour_sheets(tmp_path: Path) -> None:
    """A sheet is its title, introduction and sections; a section without text has no title."""
    sections = [{"title": "Postes", "html": f"<p>{LONG}</p>"}, {"title": "Vide", "html": "<p></p>"}]
    file = _file(tmp_path, [{"title": "Emploi", "intro": f"<p>Intro. {LONG}</p>", "sections": sections}])
    assert list(json_sheets.clean_labour_sheets([file])) == [f"Emploi\n\nIntro. {LONG}\n\nPostes\n\n{LONG}"]


def test_answers(tmp_path: Path) -> None:
    """A question stands above its general answer; one without an answer is left out."""
    answered = {"title": "Qui ?", "answers": {"generic": {"markdown": f"- **{LONG}**"}}}
    file = _file(tmp_path, [answered, {"title": "Quand ?", "answers": {"generic": {"markdown": ""}}}])
    assert list(json_sheets.clean_answers([file])) == [f"Qui ?\n\n{LONG}"]


def test_statutes(tmp_path: Path) -> None:
    """The articles that are in force stand below the title of their section."""
    articles = [
        {"type": "article", "data": {"etat": state, "texteHtml": f"<p>{state} {LONG}</p>"}}
        for state in ("VIGUEUR", "ABROGE")
    ]
    section = {"type": "section", "data": {"title": "Chapitre\r\n (Articles 1 à 2)"}, "children": articles}
    file = _file(tmp_path, {"type": "code", "data": {"title": "Code"}, "children": [section]})
    assert list(json_sheets.clean_statutes([file])) == [f"Chapitre\n\nVIGUEUR {LONG}"]


def test_electron(tmp_path: Path) -> None:
    """The pages of one locale are documents."""
    file = _file(tmp_path, {"fr-FR": {"a": {"html": f"<p>{LONG}</p>"}, "b": {"html": ""}}, "en-US": {}})
    assert list(json_sheets.electron("fr-FR")([file])) == [LONG]

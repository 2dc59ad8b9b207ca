"""Prose: HTML pages, Markdown, and the paragraphs of one language."""

from __future__ import annotations

from pathlib import Path

from moiety.training.cleaning import html_pages, language, markdown
from moiety.training.cleaning.documents import at_most, joined, unique, unique_paragraphs, without_addresses

LONG = "This is a paragraph of the manual that is long enough to be kept."


def test_a_page_gives_its_paragraphs_and_their_headings() -> None:
    """Code, navigation, scripts and labels are left out; a heading stays if a paragraph follows it."""
    page = f"""<html><head><title>Title of the page that is long enough</title></head><body>
    <div class="related"><div>Navigation with more than forty characters in it.</div></div>
    <h1>Empty</h1><h2>Chapter<a class="headerlink">¶</a></h2>
    <p>{LONG}<pre>code code code code code code code code code code code</pre>
    <ul><li>short<li>{LONG} &amp; <code>more</code><br></ul>
    <script>var x = "text in a script, which is no text of the page";</script></body></html>"""
    assert html_pages.paragraphs(page) == ["Chapter", LONG, f"{LONG} & more"]


def test_a_page_says_its_encoding(tmp_path: Path) -> None:
    """A page in ISO 8859-1 is read as such, others as UTF-8."""
    text = "Der größte Teil der Server läuft für gewöhnlich nachts."
    old, new = tmp_path / "a.html", tmp_path / "b.html"
    old.write_bytes(b'<meta charset="iso-8859-1"><p>' + text.encode("latin-1"))
    new.write_bytes(b"<p>" + text.encode())
    assert list(html_pages.clean([old, new])) == [text, text]


def test_pages_in_script_elements(tmp_path: Path) -> None:
    """Templates are read as if they stood in the page."""
    file = tmp_path / "a.html"
    file.write_text(f'<!-- notice --><script type="text/html" data-help-name="x"><p>{LONG}</p></script>')
    assert list(html_pages.clean_templates([file])) == [LONG]


def test_markdown_gives_prose() -> None:
    """Marks, code, images, tables and targets of links are left out."""
    text = f"""---
title: x
---
# The heading

!!! note "Title"
    {LONG}

```python
print("This line of code is long enough to be a paragraph.")
```
* [{LONG}](https://example.org/a_b) It is **really** *so* _**or**_ so. ![an image](x.png)
* short

| a table with a row | that is long enough to be one |
"""
    assert markdown.paragraphs(text) == ["The heading", LONG, f"{LONG} It is really so or so."]


def test_a_whole_markdown_file_keeps_its_code(tmp_path: Path) -> None:
    """Manuals for the terminal keep their commands, but neither header nor comments; a file under the GPL is left out."""
    free, other = tmp_path / "a.md", tmp_path / "b.md"
    free.write_text("---\nx: y\n---\n<!-- no -->\n# Run\n\n```\n$ run it\n```\n")
    other.write_text("# Copied\n\nUnder the GNU General Public License.\n")
    assert list(markdown.clean_whole([free, other])) == ["# Run\n\n```\n$ run it\n```"]


def test_the_language_of_a_paragraph() -> None:
    """Frequent words tell; a paragraph that has none of them is in no language."""
    assert language.is_in("german", "Das ist der Text, der nicht auf Englisch geschrieben ist.")
    assert not language.is_in("german", "This is the text that is not in German.")
    assert not language.is_in("spanish", "Windows 95, Linux 2.0, FreeBSD 3.1")


def test_only_one_language_stays() -> None:
    """Paragraphs of other languages are left out together with their headings."""
    german = "Das ist ein Absatz, der auf Deutsch geschrieben ist und bleibt."
    document = joined(["Titel", german, "Heading", "This is the text that is not in German, and it is left out."])
    assert list(language.only("german", [document, LONG])) == [joined(["Titel", german])]


def test_repeated_texts() -> None:
    """A repeated document or long paragraph is left out, even of another source; so is a heading with nothing below it."""
    other = LONG.replace("manual", "book")
    assert list(unique(["a  b", "a b", "c"])) == ["a  b", "c"]
    assert list(unique_paragraphs([joined(["Top", LONG]), joined(["Top", other, "Next", LONG])], set())) == [
        joined(["Top", LONG]),
        joined(["Top", other]),
    ]
    assert list(unique_paragraphs([LONG], {LONG})) == []


def test_a_limit_takes_documents_from_all_parts_in_their_order() -> None:
    """The documents that fit are the same in whatever order they come, and not merely the first ones."""
    documents = [f"{number:03} " + "x" * 96 for number in range(200)]
    chosen = at_most(documents, 2_000)
    assert len(chosen) == 20
    assert chosen == sorted(chosen)
    assert chosen == sorted(at_most(documents[::-1], 2_000))
    assert chosen != documents[:20]
    assert at_most(documents, None) == documents


def test_addresses_of_people_are_replaced() -> None:
    """Addresses of e-mail become one that is nobody's; decorators, units of systemd and names of protocols stay."""
    kept = "@pytest.fixture git@github.com:a/b getty@tty1.service ssh-rsa-cert-v01@openssh.com a@example.com"
    assert (
        without_addresses(f"A. Person <a.person@mail.example-host.org>, {kept}")
        == f"A. Person <someone@example.org>, {kept}"
    )

"""Keeps the paragraphs of one language: translated manuals are partly left in the original."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moiety.training.cleaning.documents import BETWEEN_PARAGRAPHS, SHORTEST, joined

# Frequent words of each language; a word of two languages counts for both.
_FREQUENT = {
    "english": "the of and is to in that for this with are be as or it by on if can not from which an you will at has was",
    "german": "der die das und ist nicht mit den von zu ein eine dem des für auf im wird sich werden als auch oder wenn sie"
    " es kann bei durch aus sind dass nach einer wie an zum zur",
    "french": "le la les des et est une un pour dans que qui sur avec par pas ne vous au aux ce cette du en de il elle sont"
    " se son sa plus ou si",
    "spanish": "el la los las y es una un para en que de por con no se su al del como más este esta si o lo son puede ser"
    " cuando",
}
_WORDS = {language: frozenset(words.split()) for language, words in _FREQUENT.items()}
_CLEARLY = 1.3  # times as many frequent words as any other language has


def is_in(language: str, paragraph: str) -> bool:
    """Whether a paragraph is in one of english, german, french, spanish. A paragraph without frequent words is in none."""
    words = [word.strip(".,;:()\"«»“”„¿¡!?'’").lower() for word in paragraph.split()]
    counts = {name: sum(word in frequent for word in words) for name, frequent in _WORDS.items()}
    own = counts.pop(language)
    others = max(counts.values())
    return (own >= 2 and own >= _CLEARLY * others) or (own == 1 and others == 0)


def only(language: str, documents: Iterable[str]) -> Iterator[str]:
    """Yields documents without their paragraphs in other languages; documents without any other are left out.

    A heading has too few words to tell: it is kept with the paragraph below it.
    """
    for document in documents:
        kept: list[str] = []
        heading = ""
        for paragraph in document.split(BETWEEN_PARAGRAPHS):
            if len(paragraph) < SHORTEST:
                heading = paragraph
                continue
            if is_in(language, paragraph):
                kept += [heading, paragraph] if heading else [paragraph]
            heading = ""
        if kept:
            yield joined(kept)

"""Spanish: a Bible, and manuals."""

from __future__ import annotations

from moiety.training.cleaning import bibles
from moiety.training.sources.manuals import apache, electron_manual, fastapi
from moiety.training.sources.source import Archive, Source

REINA_VALERA = Source(
    name="bible",
    domain="spanish",
    archive=Archive(
        "debian",
        "sword-text-sparv",
        "2.60-1",
        "sword-text-sparv_2.60-1_all.deb",
        "5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
    ),
    licence="public domain",
    stated="debian/copyright, in the package",
    attribution="Reina-Valera 1909, in the edition of eBible.org; here with some accents of today.",
    files=("usr/share/sword/modules/**/*.bzz",),
    clean=bibles.clean_spanish,
)
SPANISH = (REINA_VALERA, apache("spanish"), electron_manual("spanish"), fastapi("spanish"))

"""Spanish: a Bible, manuals, and messages of programs."""

from __future__ import annotations

from moiety.training.cleaning import bibles, markdown
from moiety.training.sources.manuals import apache, electron_manual, fastapi
from moiety.training.sources.messages import messages
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
LEARN_NODE = Source(
    name="learn-node",
    domain="spanish",
    archive=Archive(
        "npm",
        "learnyounode",
        "4.2.2",
        "learnyounode-4.2.2.tgz",
        "c51ff981a2751b7daf141a92ecf1c7eff4a5d9bca1cff3b879b1fee2c268745f",
    ),
    licence="MIT",
    stated="package.json of the package",
    attribution="learnyounode: exercises. Copyright NodeSchool contributors.",
    files=("package/exercises/*/problem.es.md",),
    clean=markdown.clean,
    sift=True,
)
SPANISH = (
    REINA_VALERA,
    apache("spanish"),
    electron_manual("spanish"),
    fastapi("spanish"),
    LEARN_NODE,
    *messages("spanish"),
)

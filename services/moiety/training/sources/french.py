"""French: what the ministry of labour explains, statutes, and manuals."""

from __future__ import annotations

from moiety.training.cleaning import json_sheets
from moiety.training.sources.manuals import apache, electron_manual, fastapi
from moiety.training.sources.source import Archive, Source

LABOUR_SHEETS = Source(
    name="labour-sheets",
    domain="french",
    archive=Archive(
        "npm",
        "@socialgouv/fiches-travail-data",
        "4.1174.0",
        "socialgouv-fiches-travail-data-4.1174.0.tgz",
        "6f9d01da5ae5b9f1a45671bffeff9487e332b17cbe86d519cf23de9e93ded64f",
    ),
    licence="Apache-2.0",
    stated="the file LICENSE of the package",
    attribution="Fiches pratiques du ministère du Travail, SocialGouv (fiches-travail-data).",
    files=("package/data/fiches-travail.json",),
    clean=json_sheets.clean_labour_sheets,
    sift=True,
)
ANSWERS = Source(
    name="labour-answers",
    domain="french",
    archive=Archive(
        "npm",
        "@socialgouv/contributions-data",
        "1.16.0",
        "socialgouv-contributions-data-1.16.0.tgz",
        "20c24878c13fbf83de1c6fc27aae00cac03184805115f66e34fa47debc8cfb86",
    ),
    licence="Apache-2.0",
    stated="package.json of the package, which holds nothing but these texts",
    attribution="Réponses du Code du travail numérique, SocialGouv (contributions-data).",
    files=("package/data/contributions.json",),
    clean=json_sheets.clean_answers,
    sift=True,
)
STATUTES = Source(
    name="statutes",
    domain="french",
    archive=Archive(
        "npm",
        "@socialgouv/legi-data",
        "2.513.0",
        "socialgouv-legi-data-2.513.0.tgz",
        "10b1764253677990bb889057a49e8ddbc8486173502b38e7a1c75a7260b42de5",
    ),
    licence="Apache-2.0",
    stated="the file LICENSE of the package",
    attribution="Codes de la base LEGI (DILA), SocialGouv (legi-data).",
    files=("package/data/LEGITEXT*.json",),
    clean=json_sheets.clean_statutes,
    most=3_500_000,
    sift=True,
)
FRENCH = (LABOUR_SHEETS, ANSWERS, STATUTES, apache("french"), electron_manual("french"), fastapi("french"))

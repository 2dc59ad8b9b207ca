"""English: novels, a Bible, a commentary, and manuals."""

from __future__ import annotations

from moiety.training.cleaning import bibles, html_pages, r_data
from moiety.training.sources.manuals import apache
from moiety.training.sources.source import Archive, Source

_COPYRIGHT = "debian/copyright, in the package"

AUSTEN = Source(
    name="austen",
    domain="english",
    archive=Archive(
        "debian",
        "r-cran-janeaustenr",
        "1.0.0-1",
        "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    ),
    licence="MIT",
    stated=_COPYRIGHT,
    attribution="janeaustenr: the six novels of Jane Austen (1775-1817). Copyright 2016-2017 Julia Silge.",
    files=("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",),
    clean=r_data.clean,
)
WORLD_ENGLISH_BIBLE = Source(
    name="bible",
    domain="english",
    archive=Archive(
        "debian",
        "sword-text-web",
        "426.0-1",
        "sword-text-web_426.0-1_all.deb",
        "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
    ),
    licence="public domain",
    stated=_COPYRIGHT,
    attribution="Based on the World English Bible, which is in the public domain.",
    files=("usr/share/sword/modules/**/*.bzz",),
    clean=bibles.clean,
    most=2_000_000,
)
TREASURY_OF_DAVID = Source(
    name="treasury-of-david",
    domain="english",
    archive=Archive(
        "debian",
        "sword-comm-tdavid",
        "2.1-1",
        "sword-comm-tdavid_2.1-1_all.deb",
        "bcbfad701c5c4a061475b58309cebc42755a59e87478c8355227c5e046412b3f",
    ),
    licence="public domain",
    stated=_COPYRIGHT,
    attribution="The Treasury of David (1885), C. H. Spurgeon, in the edition of CrossWire.",
    files=("usr/share/sword/modules/**/ot.czz",),
    clean=bibles.clean,
    most=2_000_000,
)
PYTHON_MANUAL = Source(
    name="python-manual",
    domain="english",
    archive=Archive(
        "debian",
        "python3.11-doc",
        "3.11.2-6+deb12u9",
        "python3.11-doc_3.11.2-6+deb12u9_all.deb",
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
    ),
    licence="PSF-2.0",
    stated=_COPYRIGHT,
    attribution="Python documentation. Copyright Python Software Foundation.",
    files=tuple(
        f"usr/share/doc/python3.11/html/{folder}/**/*.html"
        for folder in ("faq", "howto", "library", "reference", "tutorial", "using", "whatsnew")
    ),
    clean=html_pages.clean,
    most=2_000_000,
    sift=True,
)
POSTGRESQL_MANUAL = Source(
    name="postgresql-manual",
    domain="english",
    archive=Archive(
        "debian",
        "postgresql-doc-15",
        "15.20-0+deb12u1",
        "postgresql-doc-15_15.20-0+deb12u1_all.deb",
        "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7",
    ),
    licence="PostgreSQL",
    stated=_COPYRIGHT,
    attribution=(
        "PostgreSQL documentation. Copyright 1996 onwards The PostgreSQL Global Development Group, 1994 The Regents of"
        " the University of California."
    ),
    files=("usr/share/doc/postgresql-doc-15/html/**/*.html",),
    clean=html_pages.clean,
    most=1_500_000,
    sift=True,
)
DJANGO_MANUAL = Source(
    name="django-manual",
    domain="english",
    archive=Archive(
        "debian",
        "python-django-doc",
        "3:3.2.25-0+deb12u7",
        "python-django-doc_3.2.25-0+deb12u7_all.deb",
        "87307f067916df72e17180d35b7cde5c7ea6080336cda518efd7f6e66988a7ca",
    ),
    licence="BSD-3-Clause",
    stated=_COPYRIGHT,
    attribution="Django documentation. Copyright Django Software Foundation and individual contributors.",
    files=tuple(
        f"usr/share/doc/python-django-doc/html/{folder}/**/*.html"
        for folder in ("faq", "howto", "intro", "ref", "topics")
    ),
    clean=html_pages.clean,
    most=1_000_000,
    sift=True,
)
ENGLISH = (
    AUSTEN,
    WORLD_ENGLISH_BIBLE,
    TREASURY_OF_DAVID,
    PYTHON_MANUAL,
    POSTGRESQL_MANUAL,
    DJANGO_MANUAL,
    apache("english", most=700_000),
)

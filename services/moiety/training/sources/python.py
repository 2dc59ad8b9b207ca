"""Python: the standard library, and libraries that are read a lot."""

from __future__ import annotations

from moiety.training.cleaning import python_code
from moiety.training.sources.source import Archive, Source

STANDARD_LIBRARY = Source(
    name="standard-library",
    domain="python",
    archive=Archive(
        "debian source",
        "python3.11",
        "3.11.2",
        "python3.11_3.11.2.orig.tar.gz",
        "2411c74bda5bbcfcddaf4531f66d1adc73f247f529aee981b029513aefdbf849",
    ),
    licence="PSF-2.0",
    stated="the file LICENSE of the package",
    attribution="Python's standard library. Copyright Python Software Foundation.",
    files=("*/Lib/**/*.py",),
    clean=python_code.clean,
    most=4_000_000,
)


def _wheel(package: str, version: str, sha256: str, licence: str, owner: str, most: int | None = None) -> Source:
    """Returns the modules of a wheel without compiled code, which states its licence in its metadata."""
    name = package.lower().replace("-", "_")
    return Source(
        name=package.lower(),
        domain="python",
        archive=Archive("pypi", package, version, f"{name}-{version}-py3-none-any.whl", sha256),
        licence=licence,
        stated="metadata of the package",
        attribution=f"{package}. Copyright {owner}.",
        files=("**/*.py",),
        clean=python_code.clean,
        most=most,
    )


PYTHON = (
    STANDARD_LIBRARY,
    _wheel(
        "Django",
        "5.2",
        "91ceed4e3a6db5aedced65e3c8f963118ea9ba753fc620831c77074e620e7d83",
        "BSD-3-Clause",
        "Django Software Foundation and individual contributors",
        2_000_000,
    ),
    _wheel(
        "networkx",
        "3.4.2",
        "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f",
        "BSD-3-Clause",
        "NetworkX Developers",
        1_200_000,
    ),
    _wheel(
        "SQLAlchemy",
        "2.0.40",
        "32587e2e1e359276957e6fe5dad089758bc042a971a8a09ae8ecf7a8fe23d07a",
        "MIT",
        "SQLAlchemy authors and contributors",
        1_300_000,
    ),
    _wheel(
        "Twisted",
        "24.11.0",
        "fe403076c71f04d5d2d789a755b687c5637ec3bcd3b2b8252d76f2ba65f54261",
        "MIT",
        "Twisted Matrix Laboratories and contributors",
        800_000,
    ),
    _wheel(
        "pydantic",
        "2.11.3",
        "a082753436a07f9ba1289c6ffa01cd93db3548776088aa917cc43b63f68fa60f",
        "MIT",
        "Pydantic Services Inc. and individual contributors",
        600_000,
    ),
    _wheel(
        "pytest",
        "8.3.5",
        "c69214aa47deac29fad6c2a4f590b9c4a9fdb16a403176fe154b79c0b4d4d820",
        "MIT",
        "Holger Krekel and others",
        800_000,
    ),
    _wheel("rich", "14.0.0", "1c9491e1951aac09caffd42f448ee3d04e58923ffe14993f6e83068dc395d7e0", "MIT", "Will McGugan"),
    _wheel(
        "fastapi",
        "0.115.12",
        "e94613d6c05e27be7ffebdd6ea5f388112e5e430c8f7d6494a9d1d88d43e814d",
        "MIT",
        "Sebastián Ramírez",
    ),
    _wheel(
        "Jinja2", "3.1.6", "85ece4451f492d0c13c5dd7c13a64681a86afae63a5f347908daf103ce6d2f67", "BSD-3-Clause", "Pallets"
    ),
    _wheel(
        "click", "8.1.8", "63c132bbbed01578a06712a2d1f497bb62d9c1c0d329b7903a866228027263b2", "BSD-3-Clause", "Pallets"
    ),
    _wheel(
        "Flask", "3.1.0", "d667207822eb83f1c4b50949b1623c8fc8d51f2341d65f72e1a1815397551136", "BSD-3-Clause", "Pallets"
    ),
    _wheel(
        "httpx",
        "0.28.1",
        "d909fcccc110f8c7faf814ca82a9a4d816bc5a6dbfea25d6591d6985b8ba59ad",
        "BSD-3-Clause",
        "Encode OSS",
    ),
    _wheel(
        "requests",
        "2.32.3",
        "70761cfe03c773ceb22aa2f671b4757976145175cdfca038c02654d061d6dcc6",
        "Apache-2.0",
        "Kenneth Reitz",
    ),
    _wheel(
        "attrs", "25.3.0", "427318ce031701fea540783410126f03899a97ffc6f61596ad581ac2e40e3bc3", "MIT", "Hynek Schlawack"
    ),
    _wheel(
        "more-itertools",
        "10.6.0",
        "6eb054cb4b6db1473f6e15fcc676a08e4732548acd47c708f0e179c2c7c01e89",
        "MIT",
        "Erik Rose",
    ),
)

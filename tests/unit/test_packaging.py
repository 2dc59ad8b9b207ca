"""What pip installs: floors that the committed stubs demand, pins within the bounds, and the licences that docs/ lists."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = {"base": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
NEEDS = {extra: [Requirement(text) for text in texts] for extra, texts in EXTRAS.items()}
DEVELOPMENT = ("dev", "conformance")  # extras that are not shipped
SHIPPED = [need for extra, needs in NEEDS.items() if extra not in DEVELOPMENT for need in needs]
LICENCES = (ROOT / "docs/licences.md").read_text("utf-8")
PERMISSIVE = re.compile("MIT|BSD|Apache|Python Software Foundation|PSF|ISC")
RESTRICTIVE = re.compile("GPL|MPL|Mozilla|SSPL|RSAL|Proprietary")


def applies(need: Requirement, *extras: str) -> bool:
    """Whether this machine installs `need`, where `extras` of the package that needs it are wanted."""
    return need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras))


def licence_of(package: str) -> str:
    """Returns the licence that an installed package declares."""
    declared = metadata.metadata(package)
    classifiers = [text for text in declared.get_all("Classifier", []) if text.startswith("License ::")]
    named = " AND ".join(text.rpartition(" :: ")[2] for text in classifiers)
    return declared.get("License-Expression") or named or declared.get("License", "").partition("\n")[0]


def installed() -> set[str]:
    """Returns the packages that are installed because the project, without the extras for development, needs them."""
    found: set[str] = set()
    waiting = [need for need in SHIPPED if applies(need)]
    seen = set()
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        if (name, *sorted(need.extras)) in seen:
            continue
        seen.add((name, *sorted(need.extras)))
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [inner for inner in map(Requirement, needs) if applies(inner, *need.extras)]
    return found


def table(heading: str) -> list[list[str]]:
    """Returns the cells of the rows of the table of docs/licences.md that starts with the column names `heading`."""
    lines = LICENCES[LICENCES.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("| ").split(" | ")] for line in lines]


def test_floors_are_what_the_stubs_demand() -> None:
    """The lowest grpcio and protobuf that pip may install are the oldest that the committed stubs accept."""
    stubs = "".join(path.read_text("utf-8") for path in (ROOT / "services").rglob("*_pb2*.py"))
    grpc = set(re.findall(r"GRPC_GENERATED_VERSION = '([\d.]+)'", stubs))
    protobuf = {".".join(found) for found in re.findall(r"Domain\.PUBLIC,\s+(\d+),\s+(\d+),\s+(\d+),", stubs)}
    floors = {
        need.name: {bound.version for bound in need.specifier if bound.operator == ">="}
        for needs in NEEDS.values()
        for need in needs
    }
    assert floors["protobuf"] == protobuf
    generated = {name: floor for name, floor in floors.items() if name.startswith("grpcio")}
    assert set(generated) == {"grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-tools"}
    assert all(floor == grpc for floor in generated.values()), (generated, grpc)


def test_pins_are_within_the_bounds() -> None:
    """constraints.txt pins every direct dependency of every extra, to a version that pyproject.toml allows."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    wrong = [
        f"{need}: {pins.get(canonicalize_name(need.name))}"
        for needs in NEEDS.values()
        for need in needs
        if not need.specifier.contains(pins.get(canonicalize_name(need.name), "0"))
    ]
    assert not wrong


def test_the_list_of_licences_is_that_of_the_dependencies() -> None:
    """docs/licences.md has each dependency with its extra and bounds, and the licence that the installed one declares."""
    rows = table("| package | extra | versions |")
    listed = {(name, extra, bounds) for name, extra, bounds, *_ in rows}
    assert listed == {
        (str(need).partition(";")[0].removesuffix(str(need.specifier)), extra, str(need.specifier))
        for extra, needs in NEEDS.items()
        if extra not in DEVELOPMENT
        for need in needs
    }
    licences = {name.partition("[")[0]: licence for name, _, _, licence, _ in rows}
    found = installed()
    present = [need.name for need in SHIPPED if canonicalize_name(need.name) in found]
    assert {name: licences[name] for name in present} == {name: licence_of(name) for name in present}


def test_what_is_not_permissive_is_listed() -> None:
    """docs/licences.md names every installed package whose licence is not permissive, NVIDIA's libraries apart."""
    found = {name: licence_of(name) for name in installed() if not name.startswith(("nvidia-", "cuda-"))}
    restrictive = {
        name: licence
        for name, licence in found.items()
        if RESTRICTIVE.search(licence) or not PERMISSIVE.search(licence)
    }
    assert restrictive == {name: licence for name, licence, _ in table("| package | licence | how")}

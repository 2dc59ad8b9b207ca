"""`pip install moiety`, without extras: the client and `moiety generate` work, and other commands say what they need."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]

# Refuses to import a package of site-packages that is not in the second argument, and runs the third.
WITHOUT_EXTRAS = """
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder


class Base(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        if package in sys.argv[2].split(","):
            return None
        spec = PathFinder.find_spec(name, path)
        where = spec and (spec.origin or next(iter(spec.submodule_search_locations)))
        if where and where.startswith(sys.argv[1]):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


sys.meta_path.insert(0, Base())
exec(sys.argv[3])
"""


def base_packages() -> set[str]:
    """Returns the top-level packages that come with the project's dependencies without extras."""
    waiting = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    names: set[str] = set()
    for text in waiting:
        need = Requirement(text)
        name = canonicalize_name(need.name)
        if name not in names and (need.marker is None or need.marker.evaluate({"extra": ""})):
            names.add(name)
            waiting += metadata.requires(name) or []
    owners = metadata.packages_distributions().items()
    return {package for package, packed in owners if names & {canonicalize_name(name) for name in packed}}


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Runs `program` in an interpreter that finds the standard library, Moiety and the base dependencies only."""
    allowed = ",".join(base_packages() | {"moiety", "moiety_kernels"})
    arguments = [sysconfig.get_path("purelib"), allowed, program]
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_clients_need_no_extra(gateway: str) -> None:
    """Both clients stream the same from a gateway where only the base dependencies can be imported."""
    done = run(f"""
import asyncio
from moiety.client import Client, SyncClient

async def main():
    async with Client({gateway!r}) as client:
        return [chunk async for chunk in client.generate([3, 4, 5], max_tokens=4, ignore_eos=True)]

chunks = asyncio.run(main())
print(sum(len(chunk.token_ids) for chunk in chunks), chunks[-1].finish_reason)
with SyncClient({gateway!r}) as client:
    again = list(client.generate([3, 4, 5], max_tokens=4, ignore_eos=True))
print([chunk.token_ids for chunk in again] == [chunk.token_ids for chunk in chunks], client.address)
""")
    assert (done.stdout, done.stderr) == (f"4 length\nTrue {gateway}\n", "")


def test_generate_needs_no_extra(gateway: str) -> None:
    """`moiety generate` prints tokens, and `moiety --help` the commands, where only the base can be imported."""
    words = ["generate", "x", "--address", gateway, "--max-tokens", "4", "--ignore-eos", "--token-ids"]
    done = run(f"from moiety.cli.main import run; sys.exit(run({words!r}))")
    assert (done.returncode, len(done.stdout.split())) == (0, 4), done.stderr
    done = run("from moiety.cli.main import run; sys.exit(run(['--help']))")
    assert done.returncode == 0
    assert "simulate" in done.stdout


def test_chat_needs_no_extra(gateway: str) -> None:
    """`moiety chat` answers where only the base can be imported, and so does `moiety generate --chat`."""
    words = ["chat", "--address", gateway, "--max-tokens", "4"]
    done = run(f"""
import io
from moiety.cli.main import run
sys.stdin = io.StringIO("hello\\n")
sys.exit(run({words!r}))
""")
    assert (done.returncode, done.stdout[-1], done.stderr) == (0, "\n", "")
    words = ["generate", "hello", "--chat", "--address", gateway, "--max-tokens", "4", "--ignore-eos", "--token-ids"]
    done = run(f"from moiety.cli.main import run; sys.exit(run({words!r}))")
    assert (done.returncode, len(done.stdout.split())) == (0, 4), done.stderr


def test_the_model_of_a_script_names_what_it_needs() -> None:
    """`import moiety` works without extras; `LLM` raises for the missing package when it is asked for."""
    done = run("""
import moiety
try:
    moiety.LLM
except ModuleNotFoundError as error:
    print(moiety.__version__ != "", error)
""")
    assert done.stdout.startswith("True No module named ")


@pytest.mark.parametrize("command", ["serve", "bench load", "simulate", "generate"])
def test_every_command_has_help(command: str) -> None:
    """`--help` works without extras: of a command that needs one, it is the summary and what to install."""
    done = run(f"from moiety.cli.main import run; sys.exit(run({[*command.split(), '--help']!r}))")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: moiety {command}" in done.stdout
    assert ("pip install 'moiety[serve]'" in " ".join(done.stdout.split())) == (command != "generate")


@pytest.mark.parametrize("command", ["serve x", "models", "bench hop", "simulate"])
def test_other_commands_name_the_extra(command: str) -> None:
    """A command that needs more ends with status 1 and one line that says what to install."""
    done = run(f"from moiety.cli.main import run; sys.exit(run({command.split()!r}))")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install 'moiety[serve]'" in done.stderr


def test_a_picture_names_its_extra(moiety: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib, a command that draws ends with status 1 and names the extra that has it."""

    def draw(*_: object) -> None:
        import matplotlib.figure  # noqa: F401

    monkeypatch.setattr("moiety.simulate.report.compare", draw)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = moiety("simulate")
    assert outcome.status == 1
    assert outcome.err == "error: this command needs matplotlib, of the extra 'plot': pip install 'moiety[plot]'\n"

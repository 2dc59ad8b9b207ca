"""`moiety models`, `moiety inspect` and the options of `moiety parity --all-tiny`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from moiety.model.architectures.supported import REFUSED, served_architectures
from moiety.tools.parity.all_tiny import BEGIN, END, ParityVerdict, summary, write_table
from moiety.tools.parity.parity import ParityReport, PromptResult


def test_models_lists_served_and_refused(moiety: Callable, tmp_path: Path) -> None:
    """Every served architecture has a line with path, gating and caches; every refused one has its reason."""
    file = tmp_path / "models.json"
    outcome = moiety("models", "--json", str(file))
    assert outcome.status == 0, outcome.err
    by_name = {line.split()[0]: line for line in outcome.out.splitlines() if line}
    assert served_architectures() | REFUSED.keys() <= by_name.keys()
    assert by_name["deepseek_v3"].split(maxsplit=2)[1:] == [
        "seam",
        "sigmoid + bias, group-limited top-k    latent",
    ]
    assert by_name["grok-1"].split()[1] == "definition"
    assert by_name["jamba"].split("  ")[-1].strip() == "attention, linear"
    assert REFUSED["beam"] in by_name["beam"]
    written = json.loads(file.read_text())
    assert {one["architecture"] for one in written["supported"]} == served_architectures()


def test_inspect_reports_sizes(tiny: Callable[[str], str], moiety: Callable, tmp_path: Path) -> None:
    """`inspect` reports sizes as text and JSON, and suggests a number of groups for a memory."""
    file = tmp_path / "inspect.json"
    outcome = moiety("inspect", tiny("qwen3_moe"), "--memory", "1GiB", "--json", str(file))
    assert outcome.status == 0, outcome.err
    assert "4, of them 4 with 16 experts, top 4" in outcome.out
    assert json.loads(file.read_text())["groups"] == 1


def test_inspect_refuses_a_wrong_memory(tiny: Callable[[str], str], moiety: Callable) -> None:
    """A `--memory` that is not a number of bytes is refused with the value as given."""
    outcome = moiety("inspect", tiny("qwen3_moe"), "--memory", "much")
    assert outcome.status == 2
    assert "'much': must be a number of bytes, such as 24GiB" in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give either CHECKPOINT or --all-tiny"),
        ((".", "--all-tiny"), "give either CHECKPOINT or --all-tiny"),
        ((".", "--only", "mixtral"), "--only and --write need --all-tiny"),
        (("--all-tiny", "--only", "mixtral,bert"), "architecture 'bert': must be one of"),
    ],
)
def test_parity_options_that_do_not_fit(moiety: Callable, words: tuple[str, ...], message: str) -> None:
    """Options that contradict each other are refused before anything starts."""
    outcome = moiety("parity", *words)
    assert outcome.status == 2
    assert message in outcome.err


def verdict(name: str, *, identical: int) -> ParityVerdict:
    """Returns the verdict of eight prompts, `identical` of them identical."""
    prompts = [PromptResult(3, 24, None if number < identical else 7, False, 1e-5, 0.5, True) for number in range(8)]
    return ParityVerdict(name, "seam", ParityReport(name, "float32", 2, tuple(prompts)))


@pytest.mark.parametrize("place", [0, 1])
def test_logits_that_are_no_numbers_fail(place: int) -> None:
    """A NaN among the logits of any prompt fails the comparison, although all tokens agree, and is the largest error."""
    errors = [1e-5, 1e-5]
    errors[place] = math.nan
    report = ParityReport(
        "x", "float32", 2, tuple(PromptResult(3, 24, None, False, error, 0.5, True) for error in errors)
    )
    assert not report.ok
    assert math.isnan(report.logit_error)
    assert not ParityVerdict("x", "seam", report).ok
    assert summary([ParityVerdict("x", "seam", report)]).startswith("FAIL: 0/1")


def test_the_table_goes_between_its_markers(tmp_path: Path) -> None:
    """The table replaces the text between the markers and leaves the rest; its last line counts the architectures."""
    file = tmp_path / "README.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    failed = ParityVerdict("third", "adapter", None, "RuntimeError: no")
    write_table(file, [verdict("first", identical=8), verdict("second", identical=7), failed])
    text = file.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| architecture |")
    assert text.endswith(f"FAIL: 1/3 architectures token for token in float32: not second, third\n{END}\nafter\n")
    assert "old" not in text
    assert "| first | 8/8 | 1.0e-05 | seam |" in text
    assert "| third | failed: RuntimeError: no |  | adapter |" in text
    assert summary([verdict("first", identical=8)]).startswith("PASS: 1/1")


def test_some_rows_can_be_written_again(tmp_path: Path) -> None:
    """With `keep`, the other rows stay, in order of name, and are counted with the new ones."""
    file = tmp_path / "README.md"
    file.write_text(f"{BEGIN}\n{END}\n")
    write_table(file, [verdict("b", identical=7), verdict("d", identical=8)])
    write_table(file, [verdict("c", identical=8), verdict("b", identical=8)], keep=True)
    rows = [line.split(" | ")[:2] for line in file.read_text().splitlines() if line.startswith("| ")]
    assert rows[2:] == [["| b", "8/8"], ["| c", "8/8"], ["| d", "8/8"]]
    assert "PASS: 3/3" in file.read_text()


def test_a_file_without_markers_is_refused(tmp_path: Path) -> None:
    """A file without the marker lines is refused and stays unchanged."""
    file = tmp_path / "README.md"
    file.write_text("nothing")
    with pytest.raises(ValueError, match="has no lines"):
        write_table(file, [])
    assert file.read_text() == "nothing"

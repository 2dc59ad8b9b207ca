"""`moiety parity --all-tiny`: every tiny checkpoint through the served system, and the table of what came of it."""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moiety.model.architectures.supported import path_of
from moiety.model.architectures.transformers_model import quiet_transformers
from moiety.synthetic import tiny_model, write_tiny
from moiety.tools.parity.parity import ParityReport, run_parity

BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one tiny checkpoint."""

    name: str
    path: str  # how it is served: seam, adapter, definition
    report: ParityReport | None
    error: str = ""  # why there is no report
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Every prompt identical: in fp32 the shipped seeds have no ties."""
        return self.report is not None and self.report.identical == len(self.report.prompts)

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """One row of the table: architecture, identical tokens of all, max logit error, path."""
        if self.report is None:
            return self.name, f"failed: {self.error}", "", self.path
        counts = f"{self.report.identical}/{len(self.report.prompts)}"
        return self.name, counts, f"{self.report.logit_error:.1e}", self.path


HEAD = ("architecture", "identical / prompts", "max logit error", "path")


async def run_all(
    names: Iterable[str],
    *,
    groups: int = 2,
    new_tokens: int = 24,
    references: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[Verdict]:
    """Writes, serves and compares one tiny checkpoint after another, in fp32."""
    names = list(names)
    for number, name in enumerate(names, start=1):
        progress(f"{number}/{len(names)} {name}")
        began = time.monotonic()
        path = path_of(tiny_model(name).architecture)
        report, error = None, ""
        with tempfile.TemporaryDirectory(prefix="moiety-tiny-") as folder:
            try:
                with quiet_transformers():
                    await asyncio.to_thread(write_tiny, name, folder)
                report = await run_parity(folder, groups=groups, new_tokens=new_tokens, references=references)
            except Exception as failure:  # whatever a model's code raises is this one's failure
                error = f"{type(failure).__name__}: {failure}".replace(folder, name).partition("\n")[0]
        yield Verdict(name, path, report, error, time.monotonic() - began)


def summary(verdicts: Sequence[Verdict]) -> str:
    """The last line: how many hold, and which do not."""
    return _count([verdict.cells for verdict in verdicts])


def write_table(file: Path, verdicts: Sequence[Verdict], *, keep: bool = False) -> None:
    """Writes the table in Markdown, and its count, between the two marker lines of `file`; with `keep`, into what is there.

    Raises ValueError where a marker is missing.
    """
    text = file.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{file}: has no lines {BEGIN} and {END} to write the table between")
    lines = old.splitlines() if keep else []
    known = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")]
    rows = {cells[0]: tuple(cells) for cells in known[2:]}  # behind the head and its rule
    rows |= {verdict.name: verdict.cells for verdict in verdicts}
    ordered = [rows[name] for name in sorted(rows)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (HEAD, ("---",) * len(HEAD), *ordered))
    file.write_text(f"{before}{BEGIN}\n{table}\n\n{_count(ordered)}\n{END}{after}", encoding="utf-8")


def _count(rows: Sequence[tuple[str, ...]]) -> str:
    failed = [cells[0] for cells in rows if not re.fullmatch(r"(\d+)/\1", cells[1])]
    told = f": not {', '.join(failed)}" if failed else ""
    held = len(rows) - len(failed)
    return f"{'FAIL' if failed else 'PASS'}: {held}/{len(rows)} architectures token for token in float32{told}"

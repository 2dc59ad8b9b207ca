"""`moiety parity --all-tiny`: every tiny checkpoint through the served system, and the table of what came of it."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moiety.model.architecture import quiet_transformers
from moiety.model.supported import path_of
from moiety.model.tiny import tiny_model, write_tiny
from moiety.tools.parity import ParityReport, run_parity

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
    held = sum(verdict.ok for verdict in verdicts)
    failed = [verdict.name for verdict in verdicts if not verdict.ok]
    told = f": not {', '.join(failed)}" if failed else ""
    return f"{'FAIL' if failed else 'PASS'}: {held}/{len(verdicts)} architectures token for token in float32{told}"


def table(verdicts: Sequence[Verdict]) -> str:
    """The table in Markdown."""
    rows = [HEAD, ("---",) * len(HEAD), *(verdict.cells for verdict in verdicts)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_table(file: Path, verdicts: Sequence[Verdict]) -> None:
    """Replaces what is between the two marker lines of `file`. Raises ValueError where they are missing."""
    text = file.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{file}: has no lines {BEGIN} and {END} to write the table between")
    file.write_text(f"{before}{BEGIN}\n{table(verdicts)}\n\n{summary(verdicts)}\n{END}{after}", encoding="utf-8")

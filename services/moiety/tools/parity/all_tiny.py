"""`moiety parity --all-tiny`: serves and compares every tiny checkpoint, and writes the table of results."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moiety.config.run_folder import scratch_folder
from moiety.model.architectures.supported import served_through
from moiety.model.architectures.transformers_model import quiet_transformers
from moiety.synthetic import tiny_model, write_tiny
from moiety.tools.parity.parity import ParityReport, run_parity

BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"


@dataclass(frozen=True, slots=True)
class ParityVerdict:
    """Result of the comparison of one tiny checkpoint, or the error that prevented it."""

    name: str
    path: str  # how it is served: seam, adapter, definition
    report: ParityReport | None
    error: str = ""  # why there is no report
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether tokens and text of every prompt are identical. A tie fails: in float32 the default prompts have none."""
        return self.report is not None and self.report.identical == len(self.report.prompts)

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """This checkpoint's row in the table: architecture, identical prompts / all prompts, max logit error, path."""
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
) -> AsyncIterator[ParityVerdict]:
    """Writes, serves and compares one tiny checkpoint after another, in float32. Yields each verdict as it is ready."""
    names = list(names)
    for number, name in enumerate(names, start=1):
        progress(f"{number}/{len(names)} {name}")
        began = time.monotonic()
        path = served_through(tiny_model(name).architecture)
        report, error = None, ""
        with scratch_folder() as folder:
            try:
                with quiet_transformers():
                    await asyncio.to_thread(write_tiny, name, folder)
                report = await run_parity(str(folder), groups=groups, new_tokens=new_tokens, references=references)
            except Exception as failure:  # any error of a model's code fails this checkpoint only
                error = f"{type(failure).__name__}: {failure}".replace(str(folder), name).partition("\n")[0]
        yield ParityVerdict(name, path, report, error, time.monotonic() - began)


def summary(verdicts: Sequence[ParityVerdict]) -> str:
    """Returns the last line of the report: how many architectures pass, and which do not."""
    return _count([verdict.cells for verdict in verdicts])


def write_table(file: Path, verdicts: Sequence[ParityVerdict], *, keep: bool = False) -> None:
    """Writes the verdicts as a Markdown table, and how many pass, between the lines BEGIN and END of `file`.

    With `keep`, old rows of architectures that are not in `verdicts` stay. Raises ValueError where BEGIN or END is missing.
    """
    text = file.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{file}: has no lines {BEGIN} and {END}, between which the table goes")
    lines = old.splitlines() if keep else []
    known = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")]
    rows = {cells[0]: tuple(cells) for cells in known[2:]}  # without the header and its rule
    rows |= {verdict.name: verdict.cells for verdict in verdicts}
    ordered = [rows[name] for name in sorted(rows)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (HEAD, ("---",) * len(HEAD), *ordered))
    file.write_text(f"{before}{BEGIN}\n{table}\n\n{_count(ordered)}\n{END}{after}", encoding="utf-8")


def _count(rows: Sequence[tuple[str, ...]]) -> str:
    failed = [cells[0] for cells in rows if not re.fullmatch(r"(\d+)/\1", cells[1])]
    failures = f": not {', '.join(failed)}" if failed else ""
    passed = len(rows) - len(failed)
    return f"{'FAIL' if failed else 'PASS'}: {passed}/{len(rows)} architectures token for token in float32{failures}"

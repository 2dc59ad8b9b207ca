"""Every task and thread of a service is started by `core/supervise.py`: none can fail unnoticed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import moiety

PACKAGE = Path(moiety.__file__).parent
SUPERVISOR = "core/supervise.py"
EXEMPT = {
    "bench/": "a command, which ends with the traceback of what it awaits",
    "testing/": "fakes for tests, which await what they start",
    "tools/": "commands, as above",
    "cli/run.py": "awaits at once the one task that it makes",
    "router/sequence/guide_trial.py": "a program of its own, whose parent sees it end",
}
STARTS = {"create_task", "ensure_future", "Thread", "run_coroutine_threadsafe"}


def bare_starts(source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, call) of each start of a task or thread, and of each coroutine for another loop whose result is dropped.

    Tasks of a TaskGroup are none: the group raises what they raise.
    """
    tree = ast.parse(source)
    groups = {
        item.optional_vars.id
        for block in ast.walk(tree)
        if isinstance(block, ast.AsyncWith)
        for item in block.items
        if isinstance(item.optional_vars, ast.Name) and "TaskGroup" in ast.unparse(item.context_expr)
    }
    dropped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        owner, _, name = ast.unparse(node.func).rpartition(".")
        if name not in STARTS or (name == "create_task" and owner in groups):
            continue
        if name != "run_coroutine_threadsafe" or id(node) in dropped:
            yield node.lineno, ast.unparse(node.func)


def test_no_task_or_thread_is_started_bare() -> None:
    """Outside commands, tasks and threads are started by `supervise`, `spawn`, `supervise_thread` or `spawn_thread`."""
    bare = [
        f"{name}:{line}: {call}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not (name := path.relative_to(PACKAGE).as_posix()).startswith((SUPERVISOR, *EXEMPT))
        for line, call in bare_starts(path.read_text(encoding="utf-8"))
    ]
    assert not bare, "start these with moiety.core.supervise:\n" + "\n".join(bare)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import asyncio\nasyncio.create_task(work())", [(2, "asyncio.create_task")]),
        ("task = loop.create_task(work())", [(1, "loop.create_task")]),
        ("task = ensure_future(work())", [(1, "ensure_future")]),
        ("threading.Thread(target=run).start()", [(1, "threading.Thread")]),
        ("asyncio.run_coroutine_threadsafe(work(), loop)", [(1, "asyncio.run_coroutine_threadsafe")]),
        ("future = asyncio.run_coroutine_threadsafe(work(), loop)", []),
        ("async def f():\n async with asyncio.TaskGroup() as group:\n  group.create_task(work())", []),
        (
            "async def f():\n async with asyncio.timeout(1) as group:\n  group.create_task(work())",
            [(3, "group.create_task")],
        ),
    ],
)
def test_bare_starts_are_found(source: str, found: list[tuple[int, str]]) -> None:
    """The search finds each way to start a task or thread, and spares those whose failure somebody sees."""
    assert list(bare_starts(source)) == found

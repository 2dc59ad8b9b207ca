"""What the conformance tests share: where a whole system's APIs are, and how client programs are run."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TYPESCRIPT = Path(__file__).parent / "typescript"
PROGRAM_S = 60.0


@dataclass(frozen=True, slots=True)
class ServedApi:
    """Where the API is, and what is served there."""

    http: str  # host:port
    grpc: str  # host:port
    folder: str  # of the checkpoint
    model: str
    no_thinking: Mapping[str, int]  # a logit_bias: random weights seldom end what they have begun to think

    @property
    def url(self) -> str:
        """The base URL of OpenAI's API."""
        return f"http://{self.http}/v1"

    @property
    def options(self) -> dict[str, Any]:
        """What most clients are given: they do not retry."""
        return {"model": self.model, "base_url": self.url, "api_key": "none", "max_retries": 0}


@dataclass(frozen=True, slots=True)
class Program:
    """A client program. Its arguments are an action and an address; it prints what it saw, as a line of JSON."""

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    async def run(self, action: str, address: str) -> dict[str, Any]:
        """Returns what the program printed. Raises AssertionError if it failed."""
        process = await asyncio.create_subprocess_exec(
            *self.command,
            action,
            address,
            env={**os.environ, **self.environment},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(PROGRAM_S):
                out, errors = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise AssertionError(f"{action}: no answer for {PROGRAM_S:g} s") from None
        assert process.returncode == 0, errors.decode()[-4000:]
        seen: dict[str, Any] = json.loads(out)
        return seen


@cache
def typescript_folder() -> Path:
    """Compiles the TypeScript clients, which also checks their types; skips where npm's packages are not installed."""
    if shutil.which("node") is None or not (TYPESCRIPT / "node_modules/.package-lock.json").exists():
        pytest.skip("needs node and the npm packages of tests/conformance/typescript: make conformance")
    compiler = TYPESCRIPT / "node_modules/.bin/tsc"
    compiled = subprocess.run([compiler, "--project", TYPESCRIPT], capture_output=True, text=True, timeout=PROGRAM_S)
    assert compiled.returncode == 0, compiled.stdout
    return TYPESCRIPT / "build"


def typescript(file: str, *environment: tuple[str, str]) -> Program:
    """Returns one of the TypeScript clients, compiled."""
    return Program(["node", str(typescript_folder() / file)], dict(environment))

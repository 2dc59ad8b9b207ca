"""Compiles a guide in a process of its own first, because a compiler of grammars can hang, run out of memory or crash.

llguidance bounds most of its work, but not all: a chain of 3,000 rules overflows its stack, and the JSON schema
`{"multipleOf": 99999989}` keeps it busy for minutes. A native call cannot be interrupted, so only the end of a process ends it.
This file is also that process's program. It imports nothing of Moiety: it starts in 0.1 s and takes 20 MB.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import llguidance

CPU_S = 1.0  # a guide's compilation and first mask; a large JSON schema takes 0.1 s
WALL_S = 5.0  # the same on a busy machine
MEMORY = 512 << 20  # bytes of the process's address space, of which it needs 100 MB before it compiles
STACK = 1 << 20  # bytes. The router's threads have several times as much, so what fits here fits there.
# Fuel for building lexer and grammar: 20 ms at llguidance's own figure of 50,000 per millisecond. The cost of one mask
# on the engine's thread is bounded too: the worst that was found took 30 ms.
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_grammar_size=20_000,
    max_lexer_states=100_000,
    verbose_errors=False,
)
NO_OUTPUT = "no output can match it"
TOO_COSTLY = f"it takes more than {CPU_S:g} s, {MEMORY >> 20} MB or {STACK >> 20} MB of stack to compile"


class GuideTrial:
    """A process that compiles guides, started for the first guide and after each one that ended it. For one thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def problem(self, grammar: str) -> str:
        """Returns why llguidance cannot use `grammar`, in words for the client; "" if it can.

        Raises TimeoutError if the machine is so busy that this takes longer than WALL_S.
        """
        for _ in range(2):
            if (found := self._try(grammar)) is not None:
                return found
            if self._end() != -signal.SIGKILL:  # none of its own limits: the system was short of memory, say
                break
        return TOO_COSTLY

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._end()

    def _try(self, grammar: str) -> str | None:
        """Returns the answer of the process; None if it ended without one."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(BrokenPipeError):
            stdin.write(json.dumps(grammar).encode() + b"\n")
            stdin.flush()
            if not select.select([stdout], [], [], WALL_S)[0]:
                self.close()
                raise TimeoutError
            if line := stdout.readline():
                problem: str = json.loads(line)
                return problem
        return None

    def _end(self) -> int:
        """Waits for the end of the process and returns its status."""
        assert self._process is not None
        process, self._process = self._process, None
        process.communicate()
        return process.returncode


def first_mask_problem(matcher: llguidance.LLMatcher) -> str:
    """Returns why no output can begin under a new `matcher`; "" if one can. Releases the interpreter's lock."""
    if not matcher.is_error():
        with suppress(ValueError):  # the matcher keeps the error
            matcher.compute_bitmask()
    problem = matcher.get_error()
    empty = problem.startswith(("NoExtension", "Unsatisfiable"))
    return f"{NO_OUTPUT} ({problem})" if empty and "schema" in problem else NO_OUTPUT if empty else problem


def _try_guides() -> None:
    """The program: reads one grammar a line, as a JSON string, and writes the problem of each."""
    tokenizer = llguidance.LLTokenizer("byte")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal ends the process, also inside a native call
        matcher = llguidance.LLMatcher(tokenizer, json.loads(line), log_level=0, limits=LIMITS)
        problem = first_mask_problem(matcher)
        del matcher
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        sys.stdout.write(json.dumps(problem) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK)
    worker = threading.Thread(target=_try_guides)
    worker.start()
    worker.join()

"""Renders chat templates in a process of its own, because a template is a program that a checkpoint brings.

jinja's sandbox keeps a template from files and from Python's internals, but neither from loops that never end nor from
texts that fill the memory: `{{ "a" * 10 ** 10 }}` is one expression. Only the end of a process bounds these. This file is
also that process's program. It imports transformers' own renderer, without torch: it starts in 0.8 s and takes 60 MB.
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
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

CPU_S = 2.0  # one rendering; a conversation of 10 MB takes 0.1 s
WALL_S = 30.0  # the same on a busy machine, and the start of the process
MEMORY = 1 << 30  # bytes of address space, above what the process has once it has started
OUTPUT_CHARACTERS = 32 << 20  # of a rendered text
MESSAGE_CHARACTERS = 500  # of an error's text
TOO_COSTLY = (
    f"it takes more than {CPU_S:g} s or {MEMORY >> 20} MB to render, or gives over {OUTPUT_CHARACTERS} characters"
)


class TemplateFailed(Exception):
    """A template refused its input, or could not be compiled or rendered; the message says why."""


class ChatRenderer:
    """A process that renders chat templates, started at the first rendering and after each one that ended it.

    Any thread may call `render`; one rendering runs at a time, which takes about a millisecond.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Returns the text that `template` gives for `variables`, the arguments of transformers' render_jinja_template.

        With `messages` missing from `variables` the template is only compiled, and the text is empty. Blocks: do not call it
        on an event loop. Raises TemplateFailed; ValueError, TypeError or RecursionError if `variables` are no JSON;
        TimeoutError if the machine is so busy that this takes longer than WALL_S.
        """
        order = json.dumps({"template": template, **variables}).encode() + b"\n"
        with self._lock:
            for _ in range(2):
                if (answer := self._try(order)) is not None:
                    break
                if self._end() != -signal.SIGKILL:  # none of its own limits: the system was short of memory, say
                    raise TemplateFailed(TOO_COSTLY)
            else:
                raise TemplateFailed(TOO_COSTLY)
        if "error" in answer:
            raise TemplateFailed(answer["error"])
        return answer["text"]

    def close(self) -> None:
        """Ends the process, after a rendering that is under way. A later rendering starts another one."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._end()

    def _try(self, order: bytes) -> dict[str, str] | None:
        """Returns the answer of the process; None if it ended without one."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # it computes nothing
            )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(BrokenPipeError):
            stdin.write(order)
            stdin.flush()
            if not select.select([stdout], [], [], WALL_S)[0]:
                self._process.kill()
                self._end()
                raise TimeoutError(f"a chat template took longer than {WALL_S:g} s")
            if (line := stdout.readline()).endswith(b"\n"):
                answer: dict[str, str] = json.loads(line)
                return answer
        return None

    def _end(self) -> int:
        """Waits for the end of the process and returns its status."""
        assert self._process is not None
        process, self._process = self._process, None
        with suppress(BrokenPipeError):  # what it has not read is written once more
            process.communicate()
        return process.wait()


def _answer(order: dict[str, Any]) -> dict[str, str]:
    """Returns what one line of the input asks for: a text or an error."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = order.pop("messages", None)
    try:
        rendered, _ = render_jinja_template(
            conversations=[] if messages is None else [messages], chat_template=order.pop("template"), **order
        )
        text = rendered[0] if rendered else ""
    except MemoryError:
        return {"error": TOO_COSTLY}
    except RecursionError:
        return {"error": "it calls itself too deeply"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"[:MESSAGE_CHARACTERS]}
    except Exception as error:  # a template can raise whatever Python raises
        return {"error": str(error)[:MESSAGE_CHARACTERS] or type(error).__name__}
    return {"text": text} if len(text) <= OUTPUT_CHARACTERS else {"error": TOO_COSTLY}


def _serve() -> None:
    """The program: reads one order a line, and writes one answer each, as JSON."""
    import transformers.utils.chat_template_utils  # noqa: F401  before the limits, which it is no part of

    with open("/proc/self/statm", encoding="ascii") as sizes:
        started = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (started + MEMORY, started + MEMORY))
    for line in sys.stdin.buffer:
        order = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal ends the process, also inside a native call
        answer = json.dumps(_answer(order))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _serve()

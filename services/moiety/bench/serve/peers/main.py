"""Runs a peer as a process: `PYTHON main.py NAME` reads orders as JSON lines on stdin and answers on stdout.

- `{"load": {"checkpoint", "dtype", "threads", "slots", "context", "scratch"}}` is answered with `{"system": name}`.
- `{"run": {"prompts": [[id]], "new_tokens": n}}` is answered with `{"began": s, "arrivals": [[s]]}`, times on one clock.
- If an order fails, the answer is `{"error": text}`.

The process ends at the end of stdin. NAME is a module beside this file. Its `load(...)` returns (display name, run, close);
`run(prompts, new_tokens)` returns (began, arrivals).

Imports the standard library only, and nothing of Moiety: PYTHON belongs to the peer's environment.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback


def main(name: str) -> None:
    """Answers the orders on stdin with the peer of module `name`, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to stderr, not into the pipe of the answers
    run = close = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if "load" in order:
                system, run, close = importlib.import_module(name).load(**order["load"])
                answer = {"system": system}
            else:
                assert run is not None, "run before load"
                began, arrivals = run(**order["run"])
                answer = {"began": began, "arrivals": arrivals}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
    if close is not None:
        close()


if __name__ == "__main__":
    main(sys.argv[1])

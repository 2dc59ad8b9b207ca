"""A peer as a process: `PYTHON main.py NAME` speaks JSON lines on stdin and stdout, in whatever environment PYTHON is.

An order `{"load": {"checkpoint", "dtype", "threads", "slots", "context", "scratch"}}` is answered with `{"system": name}`;
`{"run": {"prompts": [[id]], "new_tokens": n}}` with `{"began": s, "arrivals": [[s]]}`, times of one clock; a failure of
either with `{"error": told}`. The end of stdin is the end of the process. NAME is a module beside this file that has
`load(...)`, which returns (name for people, run, close); `run(prompts, new_tokens)` returns (began, arrivals).

Standard library only, and nothing of Moiety: the environment belongs to the peer.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback


def main(name: str) -> None:
    """Takes orders until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print; the answers' pipe is not for them
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

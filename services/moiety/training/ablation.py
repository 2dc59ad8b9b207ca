"""What each piece of the training is for: short runs of a smaller model, each without one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from moiety.training.corpus import Corpus
from moiety.training.measure import measure
from moiety.training.model import Sizes
from moiety.training.pictures import read_record, use_over_time
from moiety.training.train import Plan, train

SMALL = Plan(sizes=Sizes(hidden=128, layers=4, heads=4, kv_heads=2, expert_width=64), steps=400, rows=16, length=128)
LAST = 50  # steps over which a run's end is averaged
# By name: what is said of it, and the plan.
RUNS: Mapping[str, tuple[str, Plan]] = MappingProxyType(
    {
        "all": ("all pieces", SMALL),
        "no-balance": ("no load-balancing loss", replace(SMALL, balance=0.0)),
        "no-z-loss": ("no router z-loss", replace(SMALL, z_loss=0.0)),
        "no-noise": ("no router noise", replace(SMALL, noise=0.0)),
        "capacity": ("capacity factor 1.25: choices are dropped", replace(SMALL, capacity=1.25)),
    }
)
HEAD = "| run | held-out perplexity | most used expert, in even shares | experts below a tenth of theirs | router z | dropped |"


def ablate(corpus: Corpus, folder: Path, say: Callable[[str], None]) -> str:
    """Trains every one of RUNS in a folder of its own under `folder`, draws their use of experts, and returns a table."""
    lines = [HEAD, "|---|---|---|---|---|---|"]
    for name, (title, plan) in RUNS.items():
        say(f"{name}: {title}")
        model = train(plan, corpus, folder / name, say)
        end = read_record(folder / name)[-LAST:]
        use = np.array([line["use"] for line in end]).mean(axis=0) * plan.sizes.experts
        perplexity = measure(model, corpus, plan.length).perplexity
        z, dropped = (float(np.mean([line[key] for line in end])) for key in ("z", "dropped"))
        idle = int((use < 0.1).sum())
        lines.append(
            f"| {title} | {perplexity:.1f} | {use.max():.1f} | {idle} of {use.size} | {math.sqrt(z):.1f} | {dropped:.1%} |"
        )
        use_over_time({"all pieces": folder / "all", title.partition(":")[0]: folder / name}, folder / f"{name}.png")
    return "\n".join(lines) + "\n"

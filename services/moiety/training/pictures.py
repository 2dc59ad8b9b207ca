"""Pictures of a training run: how experts are used over time, and what each is for in the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from moiety.training.corpus import DOMAINS
from moiety.training.train import RECORD

Floats = npt.NDArray[np.float64]
_BINS = 120  # steps are averaged into so many columns


def read_record(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's record, one for each step."""
    return [json.loads(line) for line in (folder / RECORD).read_text(encoding="utf-8").splitlines()]


def use_over_time(runs: Mapping[str, Path], file: Path) -> None:
    """Draws how the experts of each layer are used over the steps of each run: one row of heat maps a run.

    `runs`: a run's folder by its title. A colour's value is a share in even shares: 1 = as much as the average expert.
    """
    uses = {title: _binned(read_record(folder)) for title, folder in runs.items()}
    layers = next(iter(uses.values())).shape[1]
    figure = Figure(figsize=(1.9 * layers, 1.9 * len(uses) + 0.6), layout="constrained")
    axes = figure.subplots(len(uses), layers, squeeze=False, sharex="row", sharey="row")
    for row, (title, use) in zip(axes, uses.items(), strict=True):
        for layer, place in enumerate(row):
            last = place.imshow(use[:, layer].T, aspect="auto", cmap="magma", vmin=0, vmax=4, interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
            place.set_title(f"layer {layer}", fontsize=8)
        row[0].set_ylabel(f"{title}\nexperts", fontsize=8)
        row[0].set_xlabel("steps →", fontsize=8)
    figure.colorbar(last, ax=axes, label="use, in even shares", shrink=0.8)
    figure.savefig(file)


def specialisation(shares: Floats, file: Path) -> None:
    """Draws each expert's share of each domain's tokens, [layers, experts, domains]: one heat map a domain."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots(2, (len(DOMAINS) + 1) // 2).flatten()
    for domain, place in enumerate(axes[: len(DOMAINS)]):
        last = place.imshow(shares[:, :, domain], aspect="auto", cmap="magma", vmin=0, vmax=5)
        place.set_title(DOMAINS[domain].capitalize(), fontsize=9)
        place.set_xlabel("expert", fontsize=8)
        place.set_ylabel("layer", fontsize=8)
    figure.colorbar(last, ax=axes, label="share of the domain's tokens, in even shares", shrink=0.8)
    figure.savefig(file)


def losses(runs: Mapping[str, Path], file: Path) -> None:
    """Draws the training loss of runs over their steps, in nats a token."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    place = figure.subplots()
    for title, folder in runs.items():
        values = np.array([line["loss"] for line in read_record(folder)])
        place.plot(np.linspace(0, len(values), len(thinned := _thinned(values[:, None])[:, 0])), thinned, label=title)
    place.set_xlabel("step")
    place.set_ylabel("training loss, nats a token")
    place.legend()
    figure.savefig(file)


def _binned(record: Sequence[Mapping[str, Any]]) -> Floats:
    """Returns float64[bins, layers, experts] of use in even shares."""
    use = np.array([line["use"] for line in record])
    return _thinned(use * use.shape[2])


def _thinned(values: Floats) -> Floats:
    """Returns the means of about _BINS successive parts of `values` along its first axis."""
    return np.stack([part.mean(axis=0) for part in np.array_split(values, min(_BINS, len(values)))])

"""What a trained model is worth, and what its experts are for: held-out perplexity, and expert use by domain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import Qwen3MoeForCausalLM

from moiety.training.corpus import DOMAINS, Corpus
from moiety.training.pictures import losses, specialisation, use_over_time
from moiety.training.routing import routings
from moiety.training.train import Plan, trained

ROWS, BATCH = 128, 16  # sequences of each domain, and how many at once


@dataclass(frozen=True, slots=True)
class Measured:
    """Held-out results. `losses`: nats a token by domain; `counts` int64[layers, experts, domains], choices of experts."""

    losses: dict[str, float]
    counts: npt.NDArray[np.int64]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss, every domain counted alike."""
        return math.exp(sum(self.losses.values()) / len(self.losses))

    def shares(self) -> npt.NDArray[np.float64]:
        """Returns float64[layers, experts, domains]: each expert's share of a domain's choices, in even shares.

        1 = the expert works for the domain as much as the average expert does; at most the number of experts / top_k.
        """
        shares = self.counts / self.counts.sum(axis=1, keepdims=True)
        return np.asarray(shares * self.counts.shape[1])

    def information(self) -> npt.NDArray[np.float64]:
        """Returns float64[layers]: mutual information of expert and domain, in bits; at most log2 of the domains."""
        joint = self.counts / self.counts.sum(axis=1, keepdims=True) / self.counts.shape[2]  # domains counted alike
        expert, domain = joint.sum(axis=2, keepdims=True), joint.sum(axis=1, keepdims=True)
        independent = expert * domain
        ratio = np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0)
        return np.asarray((joint * np.log2(ratio)).sum(axis=(1, 2)))


@torch.inference_mode()
def measure(model: Qwen3MoeForCausalLM, corpus: Corpus, length: int, rows: int = ROWS) -> Measured:
    """Measures a model on `rows` sequences of `length` tokens that are held out, of each domain."""
    model.eval()
    losses: dict[str, float] = {}
    by_domain: list[npt.NDArray[np.int64]] = []
    for domain in DOMAINS:
        total = 0.0
        counts: list[npt.NDArray[np.int64]] = []
        for ids in corpus.held_out(domain, rows, length).split(BATCH):
            logits = model(input_ids=ids[:, :-1]).logits
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            counts.append(np.array([one.counts().numpy() for one in routings(model)], dtype=np.int64))
        losses[domain] = total / (rows * length)
        by_domain.append(np.sum(counts, axis=0))
    return Measured(losses, np.stack(by_domain, axis=-1))


def compare(folder: Path, plan: Plan, twin: Plan) -> str:
    """Measures the models of both plans, draws the pictures of `folder`, and returns tables in Markdown."""
    corpus = Corpus(folder / "tokens")
    found, dense = (
        measure(trained(each, folder / name), corpus, each.length) for each, name in ((plan, "main"), (twin, "twin"))
    )
    specialisation(found.shares(), folder / "specialisation.png")
    losses({"Mixture of Experts": folder / "main", "dense twin": folder / "twin"}, folder / "losses.png")
    use_over_time({"main": folder / "main"}, folder / "use.png")
    return f"{_perplexities(found, dense)}\n{_experts(found)}"


def _perplexities(found: Measured, dense: Measured) -> str:
    lines = [
        f"| {domain} | {math.exp(found.losses[domain]):.2f} | {math.exp(dense.losses[domain]):.2f} |"
        for domain in DOMAINS
    ]
    head = ["| held out | Mixture of Experts | dense twin |", "|---|---:|---:|"]
    return "\n".join([*head, *lines, f"| all | {found.perplexity:.2f} | {dense.perplexity:.2f} |"]) + "\n"


def _experts(found: Measured) -> str:
    """Returns a table of each layer's most special expert, and its mutual information with the domain."""
    lines = [
        "| layer | expert | domain | its share, in even shares | bits about the domain |",
        "|---|---:|---|---:|---:|",
    ]
    shares = found.shares()
    for layer, (share, bits) in enumerate(zip(shares, found.information(), strict=True)):
        expert, domain = np.unravel_index(share.argmax(), share.shape)
        lines.append(f"| {layer} | {expert} | {DOMAINS[domain]} | {share.max():.1f} | {bits:.2f} |")
    return "\n".join(lines) + "\n"

"""`moiety bench quantize`: how much quality a trained model loses when its experts are quantised.

Compares int8, int4 and mixed experts with bfloat16 by perplexity and greedy agreement. The kernels of the expert
replicas compute the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moiety.bench.local_experts import LocalExperts
from moiety.bench.small_model import train
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.model.experts.layout import ExpertLayout
from moiety.model.experts.read import load_experts
from moiety.model.seam import forward_context
from moiety.model.trunk.read import load_trunk
from moiety.policy.precision import Allocation, Precision
from moiety.tools.quantize.corpus import shipped_text
from moiety.tools.quantize.quantize import PLAIN, Quantised, calibration_ids, decide, usable_precisions, write_quantised
from moiety.tools.quantize.sensitivity import Pair, measure_sensitivity

HELD_OUT = 0.1  # fraction of the text that neither training nor calibration uses
STEPS = 400
BATCH = 16  # sequences per forward pass of an evaluation


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality on held-out text, for one way to store the experts."""

    name: str
    nbytes: int  # of all weights
    error: float  # predicted by the sensitivity, relative to hidden states
    perplexity: float  # per token
    agreement: float  # fraction of positions whose likeliest next token is the same as with bfloat16


def bench_quantize(
    work: Path,
    *,
    model: str | None = None,
    steps: int = STEPS,
    seed: int = 0,
    tokens: int = 8192,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Quality, ...]:
    """Trains a model (or opens the checkpoint folder `model`), quantises its experts in several ways, and evaluates each.

    Writes each checkpoint that it makes to `work`. Returns a row each for: bfloat16; all experts at 8 bits; all at 4 bits
    in groups of 32, and of 128; a mix of precisions within the memory of each 4-bit row; a mix within the memory half way
    between 4 and 8 bits. Leaves out precisions that the model's sizes do not allow.
    """
    text = shipped_text()
    cut = int(len(text) * (1 - HELD_OUT))
    folder = model or str(work / "trained")
    if model is None:
        loss = train(work / "trained", text[:cut], steps=steps, seed=seed, progress=progress)
        progress(f"trained: loss {loss:.2f}")
    checkpoint = Checkpoint.open(folder)
    layout = expert_layout(checkpoint)
    precisions = usable_precisions(checkpoint, layout)
    ids = calibration_ids(folder, text[:cut], tokens, layout.shape.max_context)
    sensitivity = measure_sensitivity(checkpoint, layout, ids, precisions, torch.bfloat16, progress)
    unlimited = decide(checkpoint, layout, sensitivity, precisions, 1 << 62)  # more memory than any model needs

    held_out = calibration_ids(folder, text[cut:], tokens, layout.shape.max_context)
    expected, perplexity = evaluate(folder, held_out)
    rows = [Quality("bfloat16", unlimited.nbytes, 0.0, perplexity, 1.0)]
    for name, allocation in _choices(
        unlimited, lambda memory: decide(checkpoint, layout, sensitivity, precisions, memory)
    ):
        progress(f"evaluating {name}")
        out = work / name.replace(" ", "-").replace(",", "")
        write_quantised(checkpoint, layout, _precisions(allocation.chosen), out)
        likeliest, perplexity = evaluate(str(out), held_out)
        agreement = float((likeliest == expected).float().mean())
        rows.append(Quality(name, unlimited.other_bytes + allocation.nbytes, allocation.error, perplexity, agreement))
    return tuple(rows)


def _choices(unlimited: Quantised, mixed: Callable[[int], Quantised]) -> Iterator[tuple[str, Allocation[Pair]]]:
    """Yields the name and allocation of each row after bfloat16. `mixed` chooses precisions that fit a number of bytes."""
    uniform = {
        precision: unlimited.uniform(precision) for precision in (Precision(8), Precision(4, 32), Precision(4, 128))
    }
    for precision, allocation in uniform.items():
        if allocation is None:
            continue
        yield f"int{precision}".replace(" bits", ""), allocation
        if precision.bits == 4:
            memory = unlimited.other_bytes + allocation.nbytes
            yield f"mixed, memory of int{precision}".replace(" bits", ""), mixed(memory).allocation
    wide, narrow = uniform[Precision(8)], uniform[Precision(4, 128)] or uniform[Precision(4, 32)]
    if wide and narrow:
        memory = unlimited.other_bytes + (wide.nbytes + narrow.nbytes) // 2
        yield "mixed, half way from int4 to int8", mixed(memory).allocation


def _precisions(chosen: Mapping[Pair, object]) -> dict[Pair, Precision]:
    return {pair: getattr(option, "precision", PLAIN) for pair, option in chosen.items()}


@torch.inference_mode()
def evaluate(folder: str, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Runs the checkpoint in `folder` over the text `ids` [sequences, tokens].

    Returns the likeliest next token after each position [sequences, tokens], and the perplexity per token.
    """
    checkpoint = Checkpoint.open(folder)
    layout: ExpertLayout = expert_layout(checkpoint)
    shape = layout.shape
    dtype = torch.bfloat16
    trunk = load_trunk(checkpoint, layout, dtype)
    pairs = [(layer, expert) for layer in range(shape.moe_layers) for expert in range(shape.experts)]
    experts = LocalExperts(shape.mlp, load_experts(checkpoint, layout, pairs, dtype))
    likeliest, total = [], 0.0
    with forward_context(experts):
        for batch in ids.split(BATCH):
            logits = trunk(input_ids=batch, use_cache=False).logits.float()  # [sequences, tokens, V]
            likeliest.append(logits.argmax(dim=-1))
            targets = batch[:, 1:].reshape(-1)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(len(targets), -1), targets, reduction="sum")
            total += float(loss)
    count = ids.shape[0] * (ids.shape[1] - 1)
    return torch.cat(likeliest), float(torch.tensor(total / count).exp())


def quality_lines(rows: tuple[Quality, ...]) -> Iterator[str]:
    """Yields the lines of the report's table: a header, then one line per way of storing the experts."""
    yield f"{'experts':<36} {'bytes':>12} {'error':>10} {'perplexity':>11} {'agreement':>10}"
    for row in rows:
        yield f"{row.name:<36} {row.nbytes:>12,} {row.error:>10.2e} {row.perplexity:>11.4f} {100 * row.agreement:>8.2f} %"

"""What quantising costs a trained model: perplexity and greedy agreement of int8, int4 and mixed experts against bfloat16,
computed by the kernels that serve them.
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
from moiety.model.seam import use_backend
from moiety.model.trunk.read import load_trunk
from moiety.policy.precision import Allocation, Precision
from moiety.tools.quantize.corpus import shipped_text
from moiety.tools.quantize.quantize import PLAIN, Quantised, calibration_ids, decide, usable, write_quantised
from moiety.tools.quantize.sensitivity import Pair, measure_sensitivity

HELD_OUT = 0.1  # of the text, which neither training nor calibration sees
STEPS = 400
BATCH = 16  # sequences of an evaluated forward


@dataclass(frozen=True, slots=True)
class Quality:
    """One way to hold the experts, on held-out text."""

    name: str
    nbytes: int  # of all weights
    error: float  # that the sensitivity predicts, relative to hidden states
    perplexity: float  # per token
    agreement: float  # fraction of positions whose likeliest next token is bfloat16's


def bench_quantize(
    work: Path,
    *,
    model: str | None = None,
    steps: int = STEPS,
    seed: int = 0,
    tokens: int = 8192,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Quality, ...]:
    """Trains (or takes the checkpoint folder `model`), quantises, evaluates; `work` receives the checkpoints.

    Rows: bfloat16; all experts at 8 bits; at 4 bits in groups of 128 and of 32; and, for the memory of each of the last two
    and for the middle between 4 and 8 bits, the mixed choice.
    """
    text = shipped_text()
    cut = int(len(text) * (1 - HELD_OUT))
    folder = model or str(work / "trained")
    if model is None:
        loss = train(work / "trained", text[:cut], steps=steps, seed=seed, progress=progress)
        progress(f"trained: loss {loss:.2f}")
    checkpoint = Checkpoint.open(folder)
    layout = expert_layout(checkpoint)
    precisions = usable(checkpoint, layout)
    ids = calibration_ids(folder, text[:cut], tokens, layout.shape.max_context)
    sensitivity = measure_sensitivity(checkpoint, layout, ids, precisions, torch.bfloat16, progress)
    ample = decide(checkpoint, layout, sensitivity, precisions, 1 << 62)

    held_out = calibration_ids(folder, text[cut:], tokens, layout.shape.max_context)
    expected, perplexity = evaluate(folder, held_out)
    rows = [Quality("bfloat16", ample.nbytes, 0.0, perplexity, 1.0)]
    for name, allocation in _choices(ample, lambda memory: decide(checkpoint, layout, sensitivity, precisions, memory)):
        progress(f"evaluating {name}")
        out = work / name.replace(" ", "-").replace(",", "")
        write_quantised(checkpoint, layout, _precisions(allocation.chosen), out)
        likeliest, perplexity = evaluate(str(out), held_out)
        agreement = float((likeliest == expected).float().mean())
        rows.append(Quality(name, ample.other_bytes + allocation.nbytes, allocation.error, perplexity, agreement))
    return tuple(rows)


def _choices(ample: Quantised, mixed: Callable[[int], Quantised]) -> Iterator[tuple[str, Allocation[Pair]]]:
    """Name and allocation of each row but the first."""
    uniform = {precision: ample.uniform(precision) for precision in (Precision(8), Precision(4, 32), Precision(4, 128))}
    for precision, allocation in uniform.items():
        if allocation is None:
            continue
        yield f"int{precision}".replace(" bits", ""), allocation
        if precision.bits == 4:
            memory = ample.other_bytes + allocation.nbytes
            yield f"mixed, memory of int{precision}".replace(" bits", ""), mixed(memory).allocation
    wide, narrow = uniform[Precision(8)], uniform[Precision(4, 128)] or uniform[Precision(4, 32)]
    if wide and narrow:
        memory = ample.other_bytes + (wide.nbytes + narrow.nbytes) // 2
        yield "mixed, half way from int4 to int8", mixed(memory).allocation


def _precisions(chosen: Mapping[Pair, object]) -> dict[Pair, Precision]:
    return {pair: getattr(option, "precision", PLAIN) for pair, option in chosen.items()}


@torch.inference_mode()
def evaluate(folder: str, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(likeliest next token at each position of `ids` [sequences, tokens], perplexity) of the checkpoint in `folder`."""
    checkpoint = Checkpoint.open(folder)
    layout: ExpertLayout = expert_layout(checkpoint)
    shape = layout.shape
    dtype = torch.bfloat16
    router = load_trunk(checkpoint, layout, dtype)
    pairs = [(layer, expert) for layer in range(shape.moe_layers) for expert in range(shape.experts)]
    experts = LocalExperts(shape.mlp, load_experts(checkpoint, layout, pairs, dtype))
    likeliest, total = [], 0.0
    with use_backend(experts):
        for batch in ids.split(BATCH):
            logits = router(input_ids=batch, use_cache=False).logits.float()  # [sequences, tokens, V]
            likeliest.append(logits.argmax(dim=-1))
            following = batch[:, 1:].reshape(-1)
            lost = torch.nn.functional.cross_entropy(
                logits[:, :-1].reshape(len(following), -1), following, reduction="sum"
            )
            total += float(lost)
    count = ids.shape[0] * (ids.shape[1] - 1)
    return torch.cat(likeliest), float(torch.tensor(total / count).exp())


def quality_lines(rows: tuple[Quality, ...]) -> Iterator[str]:
    """The table for people."""
    yield f"{'experts':<36} {'bytes':>12} {'error':>10} {'perplexity':>11} {'agreement':>10}"
    for row in rows:
        yield f"{row.name:<36} {row.nbytes:>12,} {row.error:>10.2e} {row.perplexity:>11.4f} {100 * row.agreement:>8.2f} %"

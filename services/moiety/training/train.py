"""The training loop: seeded, resumable, and with a record of how experts are used."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

from moiety.errors import FailedPrecondition
from moiety.training.corpus import DOMAINS, Corpus
from moiety.training.model import Sizes, build
from moiety.training.routing import dropped, mean, routers, routings

STATE, RECORD, PLAN = "state.safetensors", "record.jsonl", "plan.json"
SAVE_S = 300.0  # between two saved states


@dataclass(frozen=True, slots=True)
class Plan:
    """All that decides the outcome of a training run, its texts apart."""

    sizes: Sizes = field(default_factory=Sizes)
    seed: int = 16
    steps: int = 4000
    rows: int = 16
    length: int = 256
    rate: float = 2e-3  # at its highest
    warmup: float = 0.03  # share of the steps
    decay: float = 0.1  # of weights that are matrices
    clip: float = 1.0  # the gradient's norm
    balance: float = 0.01  # weight of the load-balancing loss
    z_loss: float = 0.001  # weight of the router z-loss
    noise: float = 1.0  # standard deviation of the routers' noise at the start; it falls to 0 by `noise_until`
    noise_until: float = 0.5  # share of the steps
    capacity: float | None = None  # factor of the even share; None = no choice is dropped

    def rate_at(self, step: int) -> float:
        """The learning rate: a linear warm-up, then a cosine that falls to a twentieth."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.rate * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)

    def noise_at(self, step: int) -> float:
        """The standard deviation of the routers' noise."""
        return self.noise * max(0.0, 1.0 - step / max(1.0, self.noise_until * self.steps))


def train(plan: Plan, corpus: Corpus, folder: Path, say: Callable[[str], None]) -> Qwen3MoeForCausalLM:
    """Trains a model by `plan`, or goes on from the state in `folder`; returns it. RECORD there holds one line a step.

    The outcome depends on `plan` and the texts only, however often the run was interrupted (up to the order in which
    the processor adds). Raises FailedPrecondition if `folder` holds a run of another plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_plan(plan, folder / PLAN)
    model = build(plan.sizes, plan.seed, plan.capacity)
    optimizer = _optimizer(model, plan)
    first = _load(model, optimizer, folder / STATE)
    _cut(folder / RECORD, first)
    began = saved = time.monotonic()
    with (folder / RECORD).open("a", encoding="utf-8") as record:
        for step in range(first, plan.steps):
            line = _step(model, optimizer, plan, corpus, step)
            record.write(json.dumps(line) + "\n")
            last = step + 1 == plan.steps
            if step % 20 == 0 or last:
                pace = (step + 1 - first) * plan.rows * plan.length / (time.monotonic() - began)
                say(f"step {step + 1}/{plan.steps}  loss {line['loss']:.3f}  {pace:,.0f} tokens/s")
            if last or time.monotonic() - saved > SAVE_S:
                record.flush()
                _save(model, optimizer, step + 1, folder / STATE)
                saved = time.monotonic()
    return model.eval()


def trained(plan: Plan, folder: Path) -> Qwen3MoeForCausalLM:
    """Returns the model of a run that has ended. Raises FailedPrecondition if it has not."""
    model = build(plan.sizes, plan.seed, plan.capacity)
    if (step := _load(model, None, folder / STATE)) < plan.steps:
        raise FailedPrecondition(f"{folder}: {step} of {plan.steps} steps are done: run the training first")
    return model.eval()


def _step(
    model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer, plan: Plan, corpus: Corpus, step: int
) -> dict[str, object]:
    """Does one step and returns its line of the record."""
    model.train()
    torch.manual_seed(plan.seed * 1_000_003 + step)  # the noise is the same after an interruption
    for router in routers(model):
        router.noise = plan.noise_at(step)
    for group in optimizer.param_groups:
        group["lr"] = plan.rate_at(step)
    ids, domains = corpus.batch(plan.seed, step, plan.rows, plan.length)
    logits = model(input_ids=ids[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    decided = routings(model)
    balance, z_loss = mean(one.balance_loss() for one in decided), mean(one.z_loss() for one in decided)
    (loss + plan.balance * balance + plan.z_loss * z_loss).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
    optimizer.step()
    optimizer.zero_grad()
    return {
        "step": step,
        "loss": round(loss.item(), 4),
        "balance": round(balance.item(), 4),
        "z": round(z_loss.item(), 4),
        "norm": round(norm.item(), 3),
        "dropped": round(dropped(model), 4),
        "use": [[round(share, 4) for share in one.use().tolist()] for one in decided],
        "rows": torch.bincount(domains, minlength=len(DOMAINS)).tolist(),
    }


def _optimizer(model: Qwen3MoeForCausalLM, plan: Plan) -> torch.optim.Optimizer:
    matrices = [value for value in model.parameters() if value.ndim >= 2]
    vectors = [value for value in model.parameters() if value.ndim < 2]
    groups = [{"params": matrices, "weight_decay": plan.decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.95), fused=True)


def _tensors(model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a run's state by name: parameters, and the optimizer's two moments of each."""
    for name, value in model.named_parameters():
        yield f"model.{name}", value.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in (state := optimizer.state[value]):
                yield f"{moment}.{name}", state[moment]


def _save(model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer, step: int, file: Path) -> None:
    """Replaces the state file in one move, so that an interruption leaves the old one or the new one."""
    new = file.with_suffix(".new")
    save_file(dict(_tensors(model, optimizer)), new, metadata={"step": str(step)})
    new.replace(file)


def _load(model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer | None, file: Path) -> int:
    """Loads a state, where there is one; returns the step that comes next. Without `optimizer`: the parameters only."""
    if not file.is_file():
        return 0
    with safe_open(file, framework="pt") as stored:
        step = int(stored.metadata()["step"])
        for name, value in model.named_parameters():
            value.data.copy_(stored.get_tensor(f"model.{name}"))
            if optimizer is not None:
                optimizer.state[value] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": stored.get_tensor(f"exp_avg.{name}"),
                    "exp_avg_sq": stored.get_tensor(f"exp_avg_sq.{name}"),
                }
    return step


def _check_plan(plan: Plan, file: Path) -> None:
    text = json.dumps(asdict(plan), indent=2) + "\n"
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise FailedPrecondition(f"{file.parent} holds a run of another plan: move it away, or use another folder")
    file.write_text(text, encoding="utf-8")


def _cut(record: Path, steps: int) -> None:
    """Cuts what was recorded after the saved state."""
    if record.is_file():
        lines = record.read_text(encoding="utf-8").splitlines(keepends=True)[:steps]
        record.write_text("".join(lines), encoding="utf-8")

"""A router's result for a token does not depend, to the bit, on the other tokens of its step: op by op, on CPU.

There are two exceptions. In matrix products, torch's order of summation depends on the shape (in float32 nearly always, in
bfloat16 by oneDNN's choice). Exponentials and similar functions differ in rows whose width is no multiple of the vector
width. With `deterministic` both use operations that do not depend on the shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, apply_rotary_pos_emb

from moiety.core.expert_backend import PendingRows
from moiety.model.seam import MOE_LAYER, forward_context, remote_experts
from moiety.model.trunk.cpu_layers import use_cpu_kernels
from moiety.model.trunk.fixed_elementwise import FixedElementwise
from moiety.router.attention.latent import Latent

TOKENS, HEADS, WIDTH, EXPERTS, TOP_K = 37, 4, 64, 24, 4
SIZES = (1, 2, 5, 16)  # tokens of a step: decode, and beyond the widths at which vector loops end
Op = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Returns normal noise of this shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Rows:
    """A backend whose experts return multiples of their rows."""

    def __init__(self, rows: torch.Tensor | None = None):
        self._rows = rows

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> PendingRows:
        return Rows(hidden[:, None] * (top_k_index[..., None] / 7 - 1).to(hidden))

    def result(self) -> torch.Tensor:
        assert self._rows is not None
        return self._rows


def combined(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Runs the seam: returns the weighted sum of the experts' rows."""
    module = nn.Module()
    MOE_LAYER.set(module, 0)
    with forward_context(Rows()):
        return remote_experts(module, hidden, ids, weights)


def gate(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes softmax and top-k as gates do; many scores are equal."""
    weights, ids = torch.topk((scores.float() * 2).round().softmax(-1), TOP_K, dim=-1)
    return ids, weights / weights.sum(-1, keepdim=True)


def grouped(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes sigmoid, groups and top-k as DeepSeek-V3 does; many scores are equal."""
    of_group = (scores.float() * 2).round().sigmoid().view(len(scores), 4, -1)
    best = torch.topk(of_group.topk(2, dim=-1).values.sum(-1), 2, dim=-1, sorted=False).indices
    mask = torch.zeros(len(scores), 4).scatter_(1, best, 1)[..., None].expand_as(of_group).bool()
    kept = of_group.masked_fill(~mask, 0.0).flatten(1)
    ids = torch.topk(kept, TOP_K, dim=-1, sorted=False).indices
    return ids, kept.gather(1, ids)


def rotated(turn: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Op:
    """Returns an op that rotates queries and keys [T, H, D] by angles [T, D]."""

    def op(query: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = query.transpose(0, 1)[None]
        doubled = torch.cat((angles, angles), dim=-1)[None].to(query.dtype)
        if turn is apply_rotary_emb:
            turned = turn(rows, rows[:, :1], torch.polar(torch.ones_like(angles.float()), angles.float())[None])
        else:
            turned = turn(rows, rows[:, :1], doubled.cos(), doubled.sin())
        return turned[0][0].transpose(0, 1), turned[1][0].transpose(0, 1)

    return op


ROWS, QUERY, ANGLES = (TOKENS, WIDTH * HEADS), (TOKENS, HEADS, WIDTH), (TOKENS, WIDTH // 2)
OPS: dict[str, tuple[Op, list[tuple[int, ...]]]] = {
    "RMS norm": (Qwen3MoeRMSNorm(WIDTH * HEADS), [ROWS]),
    "SiLU gate": (lambda x, y: nn.functional.silu(x) * y, [ROWS, ROWS]),
    "sigmoid gate": (lambda x, y: x.sigmoid() * y, [ROWS, ROWS]),
    "GELU": (lambda x: nn.functional.gelu(x, approximate="tanh"), [ROWS]),
    "rotation by halves": (rotated(apply_rotary_pos_emb), [QUERY, ANGLES]),
    "rotation of pairs": (rotated(apply_rotary_pos_emb_interleave), [QUERY, ANGLES]),
    "complex rotation": (rotated(apply_rotary_emb), [QUERY, ANGLES]),
    "gate": (gate, [(TOKENS, EXPERTS)]),
    "grouped gate": (grouped, [(TOKENS, EXPERTS)]),
    "log softmax": (lambda x: x.float().log_softmax(-1), [(TOKENS, 1003)]),
}


def assert_invariant(op: Op, *inputs: torch.Tensor) -> None:
    """Asserts that adjacent tokens computed alone get the same bits as among all tokens."""

    def outputs(*rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = op(*rows)
        return found if isinstance(found, tuple) else (found,)

    together = outputs(*inputs)
    for size in SIZES:
        for start in range(0, TOKENS - size + 1, 3):
            some = slice(start, start + size)
            for alone, among in zip(outputs(*(rows[some].clone() for rows in inputs)), together, strict=True):
                assert torch.equal(alone, among[some])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_what_is_computed_row_by_row_is_invariant(name: str, dtype: torch.dtype):
    """Norms, activations, rotations, gates (with ties) and log probabilities need no deterministic path."""
    op, shapes = OPS[name]
    with torch.no_grad():
        assert_invariant(op, *(random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)))


EXPONENTIALS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": lambda rows: nn.functional.gelu(rows, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "sigmoid of float32": lambda rows: rows.float().sigmoid(),
    "cos": torch.cos,
    "sin": lambda rows: rows.sin(),
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXPONENTIALS)
def test_fixed_elementwise_functions_are_invariant(name: str, dtype: torch.dtype):
    """They are invariant at widths that are no multiple of the vector width, including 1, and compute the same functions."""
    op = EXPONENTIALS[name]
    for width in (1, 40, 1100):
        rows = random(TOKENS, width, dtype=dtype)
        expected = op(rows)
        with FixedElementwise():
            assert_invariant(op, rows)
            torch.testing.assert_close(op(rows), expected)


def test_torch_computes_the_end_of_a_tensor_differently():
    """SiLU of 3 x 40 numbers differs alone and as the beginning of more numbers: why the functions above need fixing."""
    rows = random(TOKENS, 40) * 3
    together = nn.functional.silu(rows)
    assert not all(torch.equal(nn.functional.silu(rows[:n].clone()), together[:n]) for n in range(1, TOKENS))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_the_sum_over_experts_is_invariant(top_k: int, weights: torch.dtype):
    """Rows are weighted and summed in slot order, independent of other rows in the step."""
    ids = torch.randint(0, EXPERTS, (TOKENS, top_k), generator=torch.Generator().manual_seed(1))
    shares = random(TOKENS, top_k, seed=2).softmax(-1).to(weights)
    assert_invariant(combined, random(*ROWS, dtype=torch.bfloat16), ids, shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_linear_layers_are_invariant(dtype: torch.dtype):
    """Deterministic linear layers are invariant, also where a gate computes bfloat16 weights in float32."""
    layer: Any = nn.Linear(WIDTH * HEADS, 96, bias=False).to(dtype).requires_grad_(False)
    layer.weight.copy_(random(96, WIDTH * HEADS))
    use_cpu_kernels(layer, deterministic=True)
    assert_invariant(layer, random(*ROWS, dtype=dtype))
    assert_invariant(lambda rows: nn.functional.linear(rows.float(), layer.weight.float()), random(*ROWS, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_absorption_is_invariant(dtype: torch.dtype):
    """MLA's products with the halves of kv_b_proj are invariant, and equal the fast ones up to rounding."""
    weight, nope, rank = random(HEADS, 48 + 40, 72, dtype=dtype), 48, 72
    exact = Latent(weight[:, :nope], weight[:, nope:], deterministic=True)
    query, output = random(TOKENS, HEADS, nope + 16, dtype=dtype), random(TOKENS, HEADS, rank, dtype=dtype, seed=1)
    fast = Latent(weight[:, :nope], weight[:, nope:])

    def absorbed(rows: torch.Tensor, latent: Latent = exact) -> torch.Tensor:
        return latent.absorb(rows.transpose(0, 1)[None])[0].transpose(0, 1)

    def expanded(rows: torch.Tensor, latent: Latent = exact) -> torch.Tensor:
        return latent.expand(rows[None])[0]

    for op, rows in ((absorbed, query), (expanded, output)):
        assert_invariant(op, rows)
        torch.testing.assert_close(op(rows), op(rows, fast))

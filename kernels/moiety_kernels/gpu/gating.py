"""Computes each token's experts and weights from the gate's logits, in one kernel.

Shape legend: T tokens, E experts, K experts per token, G groups of E / G experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moiety_kernels.gpu.numbers import narrowed
from moiety_kernels.reference.gating import Gate


@triton.jit
def _pick(choice, free, lanes, PAD: tl.constexpr):
    """Returns the index of each row's greatest `choice` where `free` is true; of equal values, the lowest index."""
    best = tl.max(tl.where(free, choice, float("-inf")), 1)
    return tl.min(tl.where(free & (choice == best[:, None]), lanes[None, :], PAD), 1)


@triton.jit
def gating_kernel(
    LOGITS,
    BIAS,
    INDEX,
    WEIGHTS,
    T,
    stride,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    SIGMOID: tl.constexpr,
    AFTER: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SCALING: tl.constexpr,
    GROUPS: tl.constexpr,
    G_PAD: tl.constexpr,
    KEPT: tl.constexpr,
    TOP_TWO: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Chooses and weighs the experts of TOKENS tokens; each program compares all experts of its tokens."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, E_PAD)
    real = (token < T)[:, None] & (expert < E)[None, :]
    at = LOGITS + token.to(tl.int64)[:, None] * stride + expert[None, :]
    logits = tl.load(at, mask=real, other=0.0).to(tl.float32)
    logits = tl.where((expert < E)[None, :], logits, float("-inf"))
    if SIGMOID:
        scores = tl.sigmoid(logits)
    elif AFTER:
        scores = logits
    else:
        power = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = power / tl.sum(power, 1)[:, None]
    choice = scores
    if BIAS is not None:
        choice += tl.load(BIAS + expert, mask=expert < E, other=0.0).to(tl.float32)[None, :]
    choice = tl.where(choice != choice, float("inf"), choice)  # NaN counts as the greatest, as in torch
    free = (expert < E)[None, :] & (token[:, None] >= 0)

    if GROUPS > 1:
        group = expert // (E // GROUPS)
        lanes = tl.arange(0, G_PAD)
        group_score = tl.zeros((TOKENS, G_PAD), tl.float32)
        for g in tl.static_range(GROUPS):
            mine = free & (group == g)[None, :]
            score = tl.max(tl.where(mine, choice, float("-inf")), 1)
            if TOP_TWO:
                first = _pick(choice, mine, expert, E_PAD)
                rest = mine & (expert[None, :] != first[:, None])
                score += tl.max(tl.where(rest, choice, float("-inf")), 1)
            group_score = tl.where(lanes[None, :] == g, score[:, None], group_score)
        kept = (group[None, :] < 0) & free
        free_groups = (lanes < GROUPS)[None, :] & (token[:, None] >= 0)
        for _ in tl.static_range(KEPT):
            best = _pick(group_score, free_groups, lanes, G_PAD)
            kept = kept | (group[None, :] == best[:, None])
            free_groups = free_groups & (lanes[None, :] != best[:, None])
        choice = tl.where(kept, choice, float("-inf"))

    slot = tl.arange(0, K_PAD)
    index = tl.zeros((TOKENS, K_PAD), tl.int32)
    weight = tl.full((TOKENS, K_PAD), float("-inf") if AFTER else 0.0, tl.float32)
    for k in tl.static_range(TOP_K):
        best = _pick(choice, free, expert, E_PAD)
        hit = expert[None, :] == best[:, None]
        free = free & (expert[None, :] != best[:, None])
        value = tl.sum(tl.where(hit, scores, 0.0), 1)
        index = tl.where(slot[None, :] == k, best[:, None], index)
        weight = tl.where(slot[None, :] == k, value[:, None], weight)
    if AFTER:
        weight = tl.exp(weight - tl.max(weight, 1)[:, None])
        weight /= tl.sum(weight, 1)[:, None]
    if RENORMALISE:
        weight /= tl.sum(weight, 1)[:, None] + 1e-20
    weight *= SCALING
    inside = (token < T)[:, None] & (slot < TOP_K)[None, :]
    out = token[:, None] * TOP_K + slot[None, :]
    tl.store(INDEX + out, index, mask=inside)
    tl.store(WEIGHTS + out, narrowed(weight, WEIGHTS.dtype.element_ty), mask=inside)


def gating(
    logits: torch.Tensor, gate: Gate, *, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes `gating_reference` in float32: indices int32 [T, K] and weights [T, K] in `dtype`, by default float32.

    Ties go to the lower index (torch's top-k gives no guarantee). Raises ValueError where `gate` does not fit E experts.
    """
    tokens, experts = logits.shape
    gate.check(experts)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    index = torch.empty(tokens, gate.top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, gate.top_k, dtype=dtype or torch.float32, device=logits.device)
    padded = triton.next_power_of_2(experts)
    program_tokens = max(1, min(16, 1024 // padded))  # 8 values per thread, untuned
    if tokens:
        gating_kernel[(triton.cdiv(tokens, program_tokens),)](
            logits,
            bias,
            index,
            weights,
            tokens,
            logits.stride(0),
            E=experts,
            E_PAD=padded,
            TOP_K=gate.top_k,
            K_PAD=triton.next_power_of_2(gate.top_k),
            SIGMOID=gate.scores == "sigmoid",
            AFTER=gate.scores == "softmax_after",
            RENORMALISE=gate.renormalise,
            SCALING=gate.scaling,
            GROUPS=gate.groups,
            G_PAD=triton.next_power_of_2(gate.groups),
            KEPT=gate.kept_groups,
            TOP_TWO=gate.group_score == "top_two",
            TOKENS=program_tokens,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return index, weights

"""The served system against plain transformers, per architecture family, in the publishers' layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from moiety.synthetic import tiny_names
from moiety.tools.parity import parity
from moiety.tools.parity.parity import reference_model, run_parity

LITTLE = {"kv_memory": 256 << 10}  # holds about half of the prompts, so that some are preempted and recomputed


@pytest.mark.parametrize(
    ("architecture", "router"),
    [
        # Grouped-query attention, softmax of the top k, per-expert w1/w2/w3; rows travel through gRPC.
        ("mixtral", {"transport": "grpc", "speculative_tokens": 3}),
        # MLA cached as its latent; sigmoid gating with bias, shared experts overlapped with the hop, a dense layer.
        ("deepseek_v3", {"lanes": 2, "speculative_tokens": 3}),
        # Sliding window and sinks, fused and transposed experts with biases, clamped activation.
        ("gpt_oss", {"deterministic": True}),
        # Mamba layers with their states in slots, one attention layer, prompts in chunks; every step in two lanes.
        ("jamba", {"lanes": 2, "kv_memory": 340 << 10}),
        # Query and key norms, top k of the softmax; `e2e/test_sampling.py` compares it with transformers in every run.
        pytest.param("qwen3_moe", {"lanes": 2}, marks=pytest.mark.slow),
        # The same latent attention, in the whole served system; unit tests compare every MLA class with transformers.
        pytest.param("deepseek_v2", {}, marks=pytest.mark.slow),  # complex rotation, softmax gating
        pytest.param("glm4_moe_lite", {}, marks=pytest.mark.slow),
        # An encoder, one expert a token with a capacity per prompt, relative positions; unit tests run it in process.
        pytest.param("switch_transformers", {"lanes": 2, "speculative_tokens": 3}, marks=pytest.mark.slow),
        # An encoder, two experts a token with a capacity per prompt, sinusoidal positions.
        pytest.param("nllb-moe", {"deterministic": True}, marks=pytest.mark.slow),
    ],
)
async def test_served_tokens_are_the_reference_tokens(
    architecture: str, router: dict[str, Any], tiny: Callable[[str], str]
) -> None:
    """Eight prompts of different lengths at once give transformers' tokens for one at a time, without a single tie.

    The parameters cover preemption, lanes, drafts and a forced gRPC transport.
    """
    report = await run_parity(tiny(architecture), router={**LITTLE, **router})
    print("\n".join(report.lines()))
    assert report.ok
    assert not any(prompt.tie for prompt in report.prompts)
    assert report.logit_error < 1e-4


SERVED = {"mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "jamba", "deepseek_v2", "glm4_moe_lite"}  # above
# Logits are about 5. In float32, transformers itself differs from its float64 logits by up to 1e-4 (Gemma 4).
LOGIT_BOUND = 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in tiny_names() if name not in SERVED])
async def test_every_architecture_is_served_token_for_token(architecture: str, tiny: Callable[[str], str]) -> None:
    """Every other architecture of `moiety parity --all-tiny` gives the reference's tokens.

    Slow: each test starts its own cluster, about 10 s on an idle machine.
    """
    references = Path(__file__).parent / "references.py"
    report = await run_parity(tiny(architecture), references=references)
    print("\n".join(report.lines()))
    assert report.identical == len(report.prompts)
    assert report.logit_error < LOGIT_BOUND


def write_with_a_wrong_expert(source: Path, target: Path) -> None:
    """Copies a checkpoint, with another down projection of each layer's expert 1."""
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        changed = {name: t * 1.5 if ".experts.1.w2" in name else t for name, t in tensors.items()}
        save_file(changed, target / file.name, metadata={"format": "pt"})


async def test_a_wrong_expert_is_noticed(
    tiny: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison can fail: with one expert of the reference changed, it reports differing tokens, not ties."""
    source = tiny("mixtral")
    write_with_a_wrong_expert(Path(source), tmp_path)
    monkeypatch.setattr(parity, "reference_model", lambda _, *options: reference_model(str(tmp_path), *options))
    report = await run_parity(source, groups=1)
    assert not report.ok
    assert sum(not prompt.ok for prompt in report.prompts) >= 4
    assert report.logit_error > 0.1

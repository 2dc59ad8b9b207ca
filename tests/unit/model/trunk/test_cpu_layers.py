"""A trunk's layers through our kernels: the same results and, if deterministic, bits that do not depend on the batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from moiety.model.seam import forward_context
from moiety.model.trunk.cpu_layers import LinearWeight, use_cpu_kernels
from moiety.model.trunk.read import load_trunk
from moiety_kernels.cpu.library import SWITCH, find, load
from support.architectures import CORE


@pytest.fixture(params=["C++", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test with the C++ kernels, if this machine has them, and with torch."""
    monkeypatch.setenv(SWITCH, "on" if request.param == "C++" else "off")
    if request.param == "C++" and find()[0] is None:
        pytest.skip(find()[1])
    load.cache_clear()
    yield request.param
    load.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", CORE)
def test_logits_stay_those_of_the_model(kernels: str, open_tiny, make_experts, architecture: str, dtype: torch.dtype):
    """Kernels keep every architecture's logits: in float32 within 1e-5, in bfloat16 up to another rounding order."""
    checkpoint, layout = open_tiny(architecture)
    ids = torch.randint(3, 320, (1, 17), generator=torch.Generator().manual_seed(0))
    logits = []
    for prepare in (lambda model: model, use_cpu_kernels):
        model = prepare(load_trunk(checkpoint, layout, dtype, attention="eager"))
        with forward_context(make_experts(checkpoint, layout, dtype)), torch.inference_mode():
            logits.append(model(ids).logits.float())
    expected, found = logits
    if dtype is torch.float32:
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    else:  # rounding may decide a gate's near-tie differently for single tokens
        assert (found - expected).norm() <= 0.1 * expected.norm()


def test_linear_layers_gates_and_norms_are_recognised(open_tiny, monkeypatch: pytest.MonkeyPatch):
    """Every matrix of the model except its embedding uses the linear kernel, and every RMS norm the fused one."""
    monkeypatch.setenv(SWITCH, "on")
    if find()[0] is None:
        pytest.skip(find()[1])
    load.cache_clear()
    model = use_cpu_kernels(load_trunk(*open_tiny("qwen3_moe"), torch.bfloat16))
    load.cache_clear()
    for path, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            assert isinstance(weight, LinearWeight), path
        if type(module).__name__.endswith("RMSNorm"):
            assert "forward" in vars(module), path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_layers_do_not_see_the_batch(kernels: str, open_tiny, dtype: torch.dtype):
    """A token's projection, gate and norm have the same bits alone and among other tokens."""
    model = use_cpu_kernels(load_trunk(*open_tiny("qwen3_moe"), dtype), deterministic=True)
    layer = model.model.layers[0]
    hidden = torch.randn(1, 23, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        for module in (layer.self_attn.q_proj, layer.input_layernorm, lambda x: layer.mlp.gate(x)[0].view(1, -1, 16)):
            together = module(hidden)
            for token in (0, 11, 22):
                assert torch.equal(module(hidden[:, token : token + 1]), together[:, token : token + 1])

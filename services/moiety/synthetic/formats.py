"""Tiny checkpoints in the quantised formats that publishers ship: the tensors, dtypes and config fields of each."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from moiety.model.checkpoint.reading import AWQ_COLUMNS
from moiety_kernels.weights.fp8 import Fp8Matrix
from moiety_kernels.weights.mxfp4 import E2M1
from moiety_kernels.weights.nibbles import pack_nibbles

GROUP = 32
LINEAR = ("proj", "w1", "w2", "w3", "_mqa", "a_proj", "b_proj")  # how the names of linear layers end
_INT4 = {"bits": 4, "group_size": GROUP}
Stored = Iterator[tuple[str, torch.Tensor]]
# name -> architecture, config values, and the published quantization_config
FORMATS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    # No matrix is a whole number of 128 x 128 blocks, like kv_a_proj_with_mqa of DeepSeek-V3.
    "deepseek_v3-fp8": (
        "deepseek_v3",
        {"hidden_size": 160, "moe_intermediate_size": 136},
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "mixtral-fp8": (
        "mixtral",
        {"hidden_size": 128},  # narrower, a scale for every row would take more than 5 % of the codes' bytes
        {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["lm_head", "*gate"],
            "producer": {"name": "modelopt"},
        },
    ),
    "gpt_oss-mxfp4": (
        "gpt_oss",
        {},
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    ),
    "mixtral-gptq": (
        "mixtral",
        {},
        {
            "quant_method": "gptq",
            **_INT4,
            "desc_act": False,
            "sym": False,
            "true_sequential": True,
            "damp_percent": 0.1,
        },
    ),
    "mixtral-awq": (
        "mixtral",
        {},
        {
            "quant_method": "awq",
            **_INT4,
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": ["gate"],
        },
    ),
    "deepseek_v3-int4": (  # like Kimi-K2-Thinking: only routed experts, compressed-tensors
        "deepseek_v3",
        {"moe_intermediate_size": 64},
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": [
                "lm_head",
                "re:.*self_attn.*",
                "re:.*shared_experts.*",
                "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
            ],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "input_activations": None,
                    "output_activations": None,
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "group",
                        "group_size": GROUP,
                        "dynamic": False,
                        "actorder": None,
                    },
                }
            },
        },
    ),
}


def stored(method: str, name: str, tensor: torch.Tensor) -> Stored:
    """Yields the (name, tensor) pairs that `method` stores for `tensor`: the tensor itself, or its codes and scales."""
    module = name.removesuffix(".weight")
    linear = tensor.dim() == 2 and module.endswith(LINEAR)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/codes".encode()))
    if method == "fp8" and linear:
        matrix = Fp8Matrix.of(tensor)
        yield name, matrix.codes
        yield f"{name}_scale_inv", matrix.scale
    elif method == "modelopt" and linear:
        scale = tensor.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        yield name, (tensor / scale).to(torch.float8_e4m3fn)
        yield f"{name}_scale", scale
        yield f"{module}.input_scale", torch.tensor(1.0)
        if module.endswith(("k_proj", "v_proj")):
            yield f"{module}.{module[-6]}_scale", torch.tensor(0.05)
    elif method == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")) and tensor.dim() == 3:
        yield from _mxfp4(name, tensor)
    elif method in ("gptq", "awq") and linear:
        yield from (_gptq if method == "gptq" else _awq)(module, tensor, generator)
    elif method == "compressed-tensors" and linear and ".experts." in name:
        codes, scale, _ = _int4(tensor, None)
        yield f"{module}.weight_packed", pack_nibbles(codes).view(torch.int32)
        yield f"{module}.weight_scale", scale
        yield f"{module}.weight_shape", torch.tensor(tensor.shape)
    else:
        yield name, tensor


def _mxfp4(name: str, tensor: torch.Tensor) -> Stored:
    values = tensor.transpose(1, 2)  # [E, O, D]
    blocks = values.reshape(*values.shape[:2], -1, 32)
    largest = blocks.abs().amax(dim=3).clamp(min=1e-20)
    exponent = torch.floor(torch.log2(largest)) - 2  # e2m1's largest value is 6 = 1.5 * 2^2
    scaled = torch.ldexp(blocks, -exponent[..., None].int())
    codes = (scaled[..., None] - torch.tensor(E2M1)).abs().argmin(dim=-1).to(torch.uint8)
    yield f"{name}_blocks", (codes[..., ::2] | (codes[..., 1::2] << 4)).contiguous()
    yield f"{name}_scales", (exponent + 127).to(torch.uint8)


def _int4(tensor: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantises [O, D] to codes [O, D], scales [O, G], zero points [O, G] (random if there is a generator, otherwise 8)."""
    groups = tensor.view(tensor.shape[0], -1, GROUP)
    zero = torch.full(groups.shape[:2], 8, dtype=torch.uint8)
    if generator is not None:
        zero = torch.randint(4, 12, zero.shape, generator=generator).to(torch.uint8)
    scale = (groups.abs().amax(dim=2) / 7).half()
    codes = (groups / scale[:, :, None].float()).round() + zero[:, :, None]
    return codes.clamp(0, 15).to(torch.uint8).view(tensor.shape), scale, zero


def _gptq(module: str, tensor: torch.Tensor, generator: torch.Generator) -> Stored:
    codes, scale, zero = _int4(tensor, generator)
    yield f"{module}.qweight", _words(codes).T.contiguous()
    yield f"{module}.qzeros", _words((zero.T - 1) & 15)
    yield f"{module}.scales", scale.T.contiguous()
    yield f"{module}.g_idx", torch.arange(tensor.shape[1], dtype=torch.int32) // GROUP


def _awq(module: str, tensor: torch.Tensor, generator: torch.Generator) -> Stored:
    codes, scale, zero = _int4(tensor, generator)

    def interleaved(matrix: torch.Tensor) -> torch.Tensor:
        words = matrix.reshape(matrix.shape[0], -1, 8)[:, :, list(AWQ_COLUMNS)]
        return _words(words.reshape(matrix.shape))

    yield f"{module}.qweight", interleaved(codes.T)
    yield f"{module}.qzeros", interleaved(zero.T)
    yield f"{module}.scales", scale.T.contiguous()


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Packs uint8 [R, 8 C] into int32 [R, C], the first code in the lowest four bits."""
    return pack_nibbles(codes.contiguous()).contiguous().view(torch.int32)


def in_out(name: str, tensor: torch.Tensor) -> Stored:
    """Yields the (name, tensor) pair as Qwen3-VL-MoE is published: with experts [in, out]; transformers holds [out, in]."""
    experts = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    yield name, tensor.mT.contiguous() if experts else tensor

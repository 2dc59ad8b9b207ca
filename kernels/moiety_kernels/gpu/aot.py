"""Compiles every kernel for sm_90 without a GPU, for the shapes of real models, and prints registers, spills and shared memory.

    python -m moiety_kernels.gpu.aot [--json]

The launch functions run unchanged on tensors of the meta device; each kernel launch is replaced by a compilation. Exits
with 1 where a kernel spills or needs more shared memory than an SM has.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from moiety_kernels.gpu.expert_mlp import moe, sorted_expert_mlp
from moiety_kernels.gpu.gating import gating
from moiety_kernels.gpu.grouped_gemm import grouped_gemm
from moiety_kernels.gpu.models import MODELS, experts_of
from moiety_kernels.gpu.permute import permute, sort_by_expert, unpermute
from moiety_kernels.gpu.row_fp8 import dequantise_rows, quantise_rows
from moiety_kernels.gpu.tiles import SHARED, TABLE

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """The result of compiling one kernel in one configuration."""

    kernel: str
    case: str
    registers: int  # per thread
    spilled: int  # bytes of local memory per thread
    shared: int  # bytes of shared memory per program
    warps: int
    wgmma: int  # number of wgmma instructions in the PTX
    copies: int  # number of asynchronous copies in the PTX, of 16 bytes per thread or of whole tiles

    @property
    def fits(self) -> bool:
        """Whether nothing is spilled and shared memory suffices."""
        return self.spilled == 0 and self.shared <= SHARED


def compile_kernel(kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any], case: str) -> Compiled:
    """Compiles `kernel` as Triton would if it were launched with `args` and `options`.

    Arguments that are None or 1 become constants; pointers and multiples of 16 are marked as divisible by 16.
    """
    bound = dict(zip(kernel.arg_names, args, strict=False)) | {
        k: v for k, v in options.items() if k in kernel.arg_names
    }
    options = {name: value for name, value in options.items() if name not in kernel.arg_names}
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for number, name in enumerate(kernel.arg_names):
        value = bound[name]
        if name in constant or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(number,)] = "constexpr", value
            continue
        signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=TARGET, options=options)
    registers, spilled = _resources(built.asm["cubin"])
    ptx = built.asm["ptx"]
    return Compiled(
        kernel.__name__,
        case,
        registers,
        spilled,
        built.metadata.shared,
        built.metadata.num_warps,
        ptx.count("wgmma.mma_async"),
        ptx.count("cp.async.c") + ptx.count("cp.async.bulk.tensor"),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Returns how many registers and bytes of stack and local memory a thread needs, as stated in the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{tool} -res-usage printed no registers and local memory: {usage}")
    return int(found[1]), int(found[2]) + int(found[3])


@contextmanager
def compiling(case: Callable[[], str], into: list[Compiled]) -> Iterator[None]:
    """Makes kernel launches inside the context compile instead, once per configuration, and append the result to `into`."""
    seen: set[str] = set()

    def launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        tensors = tuple((a.dtype if isinstance(a, torch.Tensor) else a) for a in args)
        key = f"{self.__name__} {tensors} {sorted(options.items())}"
        if key not in seen:
            seen.add(key)
            into.append(compile_kernel(self, args, options, case()))

    original = JITFunction.run
    JITFunction.run = launch
    try:
        yield
    finally:
        JITFunction.run = original


def compile_all(quick: bool = False) -> list[Compiled]:
    """Compiles every kernel and returns the results; `quick` compiles fewer configurations.

    The configurations are: each model in bfloat16 from 1 to 4096 tokens, each quantised format at each line of the tile
    table, other dtypes, tiles fetched by descriptors, permutation, gating and fp8 rows.
    """
    built: list[Compiled] = []
    case = ""
    with compiling(lambda: case, built):
        for model in MODELS[2:] if quick else MODELS:
            for tokens in (1, 16, 256, 4096) if not quick else (1, 8192):
                case = f"{model.name}, {tokens} tokens"
                x = torch.empty(tokens, model.hidden, dtype=torch.bfloat16, device="meta")
                index = torch.empty(tokens, model.gate.top_k, dtype=torch.int32, device="meta")
                moe(x, index, index.float(), experts_of(model, torch.bfloat16, "plain", "meta"))
                case = f"{model.name}, gating"
                logits = torch.empty(tokens, model.choices, dtype=torch.float32, device="meta")
                gating(logits, model.gate, bias=logits[0] if model.gate.scores == "sigmoid" else None)
        for kind, model in (("fp8", MODELS[2]), ("int8", MODELS[1]), ("int4", MODELS[1]), ("mxfp4", MODELS[3])):
            for rows in (8, 8192) if quick else (8, 24 * model.experts, 64 * model.experts, 256 * model.experts):
                case = f"{model.name}, {kind} weights, {rows} rows"
                x = torch.empty(rows, model.hidden, dtype=torch.bfloat16, device="meta")
                offsets = torch.empty(model.experts + 1, dtype=torch.int32, device="meta")
                sorted_expert_mlp(x, offsets, experts_of(model, torch.bfloat16, kind, "meta"))
                if kind == "fp8":
                    case += ", fp8 rows"
                    codes, scale = quantise_rows(x)
                    experts = experts_of(model, torch.bfloat16, kind, "meta")
                    sorted_expert_mlp(codes, offsets, experts, x_scale=scale, dtype=torch.bfloat16)
        model = MODELS[1]
        for dtype, fixed in ((torch.float32, False), (torch.float16, False), (torch.bfloat16, True)):
            case = f"{model.name}, {dtype}{', deterministic' if fixed else ''}"
            x = torch.empty(512, model.hidden, dtype=dtype, device="meta")
            offsets = torch.empty(model.experts + 1, dtype=torch.int32, device="meta")
            sorted_expert_mlp(x, offsets, experts_of(model, dtype, "plain", "meta"), deterministic=fixed)
        for model in MODELS[1:] if quick else MODELS:
            case = f"{model.name}, tiles by descriptors"
            experts = experts_of(model, torch.bfloat16, "plain", "meta")
            rows = 256 * model.experts
            x = torch.empty(rows, model.hidden, dtype=torch.bfloat16, device="meta")
            offsets = torch.empty(model.experts + 1, dtype=torch.int32, device="meta")
            inner = torch.empty(rows, model.intermediate, dtype=torch.bfloat16, device="meta")
            first, second = (replace(tile, descriptors=True, persistent=True) for tile in TABLE[-1][1:])
            grouped_gemm(x, offsets, experts.gate_up, inner, rows=rows, tile=first, activation=experts.activation)
            grouped_gemm(inner, offsets, experts.down, x, rows=rows, tile=second)
        case = "permutation of 8192 tokens"
        x = torch.empty(8192, model.hidden, dtype=torch.bfloat16, device="meta")
        permutation = sort_by_expert(torch.empty(8192, 8, dtype=torch.int64, device="meta"), 128)
        unpermute(permute(x, permutation, 8), permutation)
        case = "fp8 rows"
        codes, scale = quantise_rows(x, 128)
        dequantise_rows(codes, scale, torch.bfloat16, 128)
    return built


def main() -> None:
    """Compiles every kernel and prints a line for each; exits with 1 where one spills or needs too much shared memory."""
    parser = argparse.ArgumentParser(prog="python -m moiety_kernels.gpu.aot", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object per kernel")
    parser.add_argument("--quick", action="store_true", help="compile only a few configurations of each kernel")
    options = parser.parse_args()
    built = compile_all(options.quick)
    for compiled in built:
        if options.json:
            print(json.dumps(asdict(compiled)))
        else:
            mark = "" if compiled.fits else "  <-- does not fit"
            print(
                f"{compiled.kernel:20} {compiled.case:44} {compiled.registers:4} registers {compiled.spilled:4} B spilled"
                f" {compiled.shared / 1024:6.1f} KiB shared {compiled.wgmma:4} wgmma {compiled.copies:3} cp.async{mark}"
            )
    sys.exit(0 if all(compiled.fits for compiled in built) else 1)


if __name__ == "__main__":
    main()

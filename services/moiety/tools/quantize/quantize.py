"""`moiety quantize`: chooses each expert's bits by its measured sensitivity, and writes the quantised checkpoint.

The format is `pack-quantized` of compressed-tensors: codes packed into int32, scales beside them, and for each precision
a config group that names its experts. All other tensors are copied unchanged.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moiety.errors import CheckpointError, ConfigError
from moiety.model.checkpoint.checkpoint import EXPERT, Checkpoint
from moiety.model.checkpoint.headers import TensorEntry
from moiety.model.checkpoint.reading import Reader
from moiety.model.checkpoint.shards import write_shards
from moiety.model.checkpoint.side_files import INDEX_FILE
from moiety.model.checkpoint.tokenizer import open_tokenizer
from moiety.model.experts.cached import expert_layout
from moiety.model.experts.layout import ExpertLayout
from moiety.policy.precision import Allocation, Option, Precision, allocate
from moiety.tools.quantize.sensitivity import Pair, Sensitivity, measure_sensitivity
from moiety.wire.codec import torch_dtype
from moiety_kernels import Int4Matrix, Int8Matrix

PLAIN = Precision(16)
SMALLER = (Precision(8), Precision(4, 32), Precision(4, 128))
REPORT = "quantization_report.json"
PICTURE = "quantization_report.svg"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SEQUENCE = 256  # tokens per sequence of calibration text


@dataclass(frozen=True, slots=True)
class Quantised:
    """The precisions chosen for a checkpoint, and the measurements they were chosen from."""

    allocation: Allocation[Pair]
    sensitivity: Sensitivity
    options: Mapping[Pair, tuple[Option, ...]]
    other_bytes: int  # of all tensors but the routed experts' matrices

    @property
    def nbytes(self) -> int:
        """Bytes of all weights of the quantised checkpoint."""
        return self.other_bytes + self.allocation.nbytes

    def uniform(self, precision: Precision) -> Allocation[Pair] | None:
        """Returns the allocation with every expert at `precision`; None if `precision` was not measured for every expert."""
        chosen = {
            pair: option
            for pair, options in self.options.items()
            for option in options
            if option.precision == precision
        }
        return Allocation(chosen) if len(chosen) == len(self.options) else None


def quantise(
    folder: str,
    out: Path,
    memory: int,
    calibration: str,
    *,
    tokens: int = 4096,
    dtype: str = "auto",
    progress: Callable[[str], None] = lambda _: None,
) -> Quantised:
    """Writes `folder`'s model to `out` so that its weights take at most `memory` bytes.

    Raises CheckpointError where the model cannot be quantised, ConfigError where an argument is out of bounds.
    """
    checkpoint = Checkpoint.open(folder)
    layout = expert_layout(checkpoint)
    check_writable(out)
    precisions = usable_precisions(checkpoint, layout)
    check_memory(checkpoint, layout, precisions, memory)
    progress(f"measuring {layout.shape.moe_layers} layers of {layout.shape.experts} experts")
    ids = calibration_ids(folder, calibration, min(tokens, layout.shape.max_context * 64), layout.shape.max_context)
    model_dtype = torch_dtype(dtype, layout.shape.dtype)
    sensitivity = measure_sensitivity(checkpoint, layout, ids, precisions, model_dtype, progress)
    quantised = decide(checkpoint, layout, sensitivity, precisions, memory)
    progress(f"writing {out}")
    chosen = {pair: option.precision for pair, option in quantised.allocation.chosen.items()}
    write_quantised(checkpoint, layout, chosen, out, progress)
    return quantised


def check_memory(checkpoint: Checkpoint, layout: ExpertLayout, precisions: Sequence[Precision], memory: int) -> None:
    """Raises ConfigError if the weights need over `memory` bytes with every expert at its fewest bits. Reads no weights."""
    shape, unmeasured = layout.shape, dict.fromkeys(precisions, 0.0)
    pairs = [(layer, expert) for layer in range(shape.moe_layers) for expert in range(shape.experts)]
    _options(checkpoint, layout, dict.fromkeys(pairs, unmeasured), precisions, memory)


def decide(
    checkpoint: Checkpoint,
    layout: ExpertLayout,
    sensitivity: Sensitivity,
    precisions: Sequence[Precision],
    memory: int,
) -> Quantised:
    """Chooses each expert's precision so that all weights take at most `memory` bytes.

    Raises ConfigError where the weights need more even with every expert at its smallest precision.
    """
    other, options = _options(checkpoint, layout, sensitivity.errors, precisions, memory)
    return Quantised(allocate(options, memory - other), sensitivity, options, other)


def _options(
    checkpoint: Checkpoint,
    layout: ExpertLayout,
    errors: Mapping[Pair, Mapping[Precision, float]],
    precisions: Sequence[Precision],
    memory: int,
) -> tuple[int, dict[Pair, tuple[Option, ...]]]:
    """Returns the bytes of all tensors but the experts' matrices, and what can be chosen for each expert.

    Raises ConfigError where the smallest choices need over `memory` bytes.
    """
    experts = {name for pair in errors for name in expert_tensor_names(layout, pair)}
    other = sum(entry.nbytes for name, entry in checkpoint.tensors.items() if name not in experts)
    options = {}
    for pair, measured in errors.items():
        matrices = [checkpoint.tensor(name) for name in expert_tensor_names(layout, pair)]
        shapes = [(entry.shape[0], entry.shape[1]) for entry in matrices]
        plain = Option(PLAIN, sum(entry.nbytes for entry in matrices), 0.0)
        itemsize = plain.nbytes // sum(rows * columns for rows, columns in shapes)
        smaller = (
            Option(precision, sum(precision.bytes_of(shape, itemsize) for shape in shapes), measured[precision])
            for precision in precisions
        )
        options[pair] = (plain, *smaller)
    least = other + sum(min(option.nbytes for option in choices) for choices in options.values())
    if least > memory:
        bound = f"must be at least {least} bytes: {other} for attention, router and the like, the rest for experts"
        raise ConfigError("memory", memory, bound)
    return other, options


def usable_precisions(checkpoint: Checkpoint, layout: ExpertLayout) -> tuple[Precision, ...]:
    """Returns the precisions of SMALLER whose group sizes divide the experts' hidden and intermediate sizes.

    Raises CheckpointError where the experts are quantised already or are not stored one by one.
    """
    for names in (names for layer in layout.layers for field, names in layer.sources.items() if "bias" not in field):
        for name in names:
            entry = checkpoint.tensor(name.replace(EXPERT, "0"))
            if not isinstance(entry, TensorEntry):
                raise CheckpointError(
                    f"checkpoint {checkpoint.path}: its experts are quantised already ({entry.dtype})"
                )
            if EXPERT not in name or not name.endswith(".weight"):
                raise CheckpointError(
                    f"checkpoint {checkpoint.path}: {name} holds all experts of a layer in one tensor, so that experts "
                    "cannot have different bits"
                )
    mlp = layout.shape.mlp
    return tuple(
        precision
        for precision in SMALLER
        if not precision.group or (mlp.hidden % precision.group == 0 and mlp.intermediate % precision.group == 0)
    )


def expert_tensor_names(layout: ExpertLayout, pair: Pair) -> Iterator[str]:
    """Yields the tensor names of one expert's matrices, without biases."""
    layer, expert = pair
    for field, names in layout.layers[layer].sources.items():
        if "bias" not in field:
            yield from (name.replace(EXPERT, str(expert)) for name in names)


def calibration_ids(folder: str, text: str, tokens: int, longest: int) -> torch.Tensor:
    """Returns `text` as token ids [sequences, tokens per sequence]. Raises ConfigError where sequences have under 16 tokens.

    All sequences together have at most `tokens` tokens, and one sequence at most `longest`. The rest of `text` is not used.
    """
    tokenizer, _ = open_tokenizer(folder)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    length = min(SEQUENCE, longest, len(ids))
    if length < 16:
        raise ConfigError("calibration", len(ids), "tokens: must be at least 16, better a few thousand")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def check_writable(out: Path) -> None:
    """Raises ConfigError unless `out` is a new or empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("out", str(out), "must be a new or an empty folder")


def write_quantised(
    checkpoint: Checkpoint,
    layout: ExpertLayout,
    chosen: Mapping[Pair, Precision],
    out: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Writes to `out` the checkpoint with each expert at its precision in `chosen`, and a config that names the precisions.

    Copies the files that hold no weights. Memory holds one shard at a time.
    """
    out.mkdir(parents=True, exist_ok=True)
    precision_of = {name: precision for pair, precision in chosen.items() for name in expert_tensor_names(layout, pair)}
    with ExitStack() as stack:
        reader = stack.enter_context(Reader())

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            every = max(1, len(checkpoint.tensors) // 20)
            for number, (name, entry) in enumerate(checkpoint.tensors.items()):
                if number % every == every - 1:
                    progress(f"written {100 * number // len(checkpoint.tensors)} %")
                if not isinstance(entry, TensorEntry):
                    raise CheckpointError(f"checkpoint {checkpoint.path}: {name} is quantised already ({entry.dtype})")
                yield from packed(name, reader.tensor(entry), precision_of.get(name, PLAIN))

        write_shards(out, tensors())
    config = dict(checkpoint.config)
    if groups := _config_groups(layout, chosen):
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "ignore": [],
            "config_groups": groups,
        }
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for file in checkpoint.path.iterdir():
        weights = file.suffix in WEIGHT_FILES or file.name == INDEX_FILE
        if file.is_file() and not weights and not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)


def packed(name: str, tensor: torch.Tensor, precision: Precision) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) to store for matrix `name`: at 16 bits the matrix, else its packed codes, scales and shape."""
    if precision == PLAIN:
        yield name, tensor
        return
    module = name.removesuffix(".weight")
    scales = torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float16
    if precision.bits == 8:
        wide = Int8Matrix.of(tensor)
        codes, scale = wide.codes, wide.scale[:, None]
    else:
        narrow = Int4Matrix.of(tensor, precision.group, scales)
        codes, scale = narrow.codes, narrow.scale
    yield f"{module}.weight_packed", codes.view(torch.int32)
    yield f"{module}.weight_scale", scale
    yield f"{module}.weight_shape", torch.tensor(tensor.shape)


def _config_groups(layout: ExpertLayout, chosen: Mapping[Pair, Precision]) -> dict[str, Any]:
    """Returns one compressed-tensors config group per precision below 16 bits.

    The group's `targets` select its experts: one regular expression per layer and tensor name.
    """
    groups: dict[str, Any] = {}
    for precision in sorted({*chosen.values()} - {PLAIN}):
        targets = []
        for ordinal, layer in enumerate(layout.layers):
            experts = [
                str(expert)
                for (at, expert), chosen_precision in sorted(chosen.items())
                if at == ordinal and chosen_precision == precision
            ]
            if not experts:
                continue
            for field, names in layer.sources.items():
                for name in names if "bias" not in field else ():
                    before, after = name.removesuffix(".weight").split(EXPERT)
                    targets.append(f"re:{re.escape(before)}({'|'.join(experts)}){re.escape(after)}$")
        groups[f"group_{len(groups)}"] = {
            "targets": targets,
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": precision.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group" if precision.group else "channel",
                "group_size": precision.group or None,
                "dynamic": False,
            },
        }
    return groups

"""All tiny checkpoints by name: `moiety parity --all-tiny` serves them, and tests iterate over them.

A tiny checkpoint is an entry of TINY, or an architecture that transformers routes through its experts interface. Such
an architecture is found automatically, and gets its sizes by the names of its config's fields (`sizes.py`). It needs an
entry only if these sizes do not suit it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moiety.model.architectures.supported import REFUSED, seam_architectures, served_architectures
from moiety.synthetic.encoder_decoders import NARROW, NLLB, SWITCH
from moiety.synthetic.families import FAMILIES
from moiety.synthetic.formats import FORMATS, in_out, stored
from moiety.synthetic.lightning import with_decays
from moiety.synthetic.tokenizer import (
    write_nllb_tokenizer,
    write_sentencepiece_tokenizer,
    write_t5_tokenizer,
    write_tokenizer,
    write_wordpiece_tokenizer,
)

if TYPE_CHECKING:
    import torch

Store = Callable[[str, "torch.Tensor"], Iterable[tuple[str, "torch.Tensor"]]]


@dataclass(frozen=True, slots=True)
class TinyModel:
    """One tiny checkpoint: its architecture, and how its published form differs from `save_pretrained`."""

    architecture: str  # model_type
    settings: Mapping[str, Any] = field(default_factory=dict)  # config values that override sizes.py
    store: Store | None = None  # a tensor by its published name -> the tensors it is stored as, such as codes and scale
    # added to config.json last, such as quantization_config
    config_fields: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[Path], None] = write_tokenizer
    noise_factors: Mapping[str, float] = field(default_factory=dict)  # part of a tensor's name -> factor on its noise


TINY: Mapping[str, TinyModel] = {
    **{architecture: TinyModel(architecture, settings) for architecture, settings in FAMILIES.items()},
    **{
        name: TinyModel(
            architecture,
            {**FAMILIES.get(architecture, {}), **settings},
            partial(stored, quantization["quant_method"]),
            {"quantization_config": quantization},
        )
        for name, (architecture, settings, quantization) in FORMATS.items()
    },
    "mixtral": TinyModel("mixtral", FAMILIES["mixtral"], tokenizer=write_sentencepiece_tokenizer),
    # No published MoE model has a WordPiece tokenizer: one tiny checkpoint does, so that its text is compared too.
    "olmoe": TinyModel("olmoe", FAMILIES["olmoe"], tokenizer=write_wordpiece_tokenizer),
    "switch_transformers": TinyModel("switch_transformers", SWITCH, tokenizer=write_t5_tokenizer, noise_factors=NARROW),
    "nllb-moe": TinyModel("nllb-moe", NLLB, tokenizer=write_nllb_tokenizer, noise_factors=NARROW),
    "minimax": TinyModel(
        "minimax",
        {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 8, "sliding_window": None},
        store=with_decays,
    ),
    "qwen3_vl_moe": TinyModel("qwen3_vl_moe", store=in_out),
}


def tiny_names() -> tuple[str, ...]:
    """Returns the names of the tiny checkpoints that can be served, sorted: entries of TINY, and served architectures."""
    kept = {name for name, tiny in TINY.items() if tiny.architecture not in REFUSED}
    return tuple(sorted({*kept, *served_architectures()}))


def tiny_model(name: str) -> TinyModel:
    """Returns the tiny checkpoint called `name`, even of a refused architecture; raises ValueError for an unknown name."""
    if name in TINY:
        return TINY[name]
    if name in seam_architectures():
        return TinyModel(name)
    raise ValueError(f"architecture {name!r}: must be one of {', '.join(tiny_names())}")

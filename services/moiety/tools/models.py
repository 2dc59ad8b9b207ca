"""`moiety models`: the architectures that can be served, with gating and kinds of cache, and those refused, with reasons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moiety.model.architectures.gating_description import gating_of
from moiety.model.architectures.supported import REFUSED, served_architectures, served_through
from moiety.model.architectures.transformers_model import quiet_transformers
from moiety.synthetic import tiny_model
from moiety.synthetic.write import tiny_config

KINDS = {"full_attention": "attention", "attention": "attention", "sparse": "attention", "hybrid_sliding": "sliding"}
PARTS = ("layer_types", "layers_block_type")  # config fields that hold one word per layer


@dataclass(frozen=True, slots=True)
class Supported:
    """An architecture that can be served."""

    architecture: str
    path: str  # seam, adapter, definition
    gating: str  # how it chooses experts
    caches: tuple[str, ...]  # kinds of cache that its layers need


def supported() -> Iterator[Supported]:
    """Yields all architectures that can be served, in order of name."""
    with quiet_transformers():
        configs = {name: tiny_config(name, tiny_model(name).settings) for name in sorted(served_architectures())}
    for name, config in configs.items():
        yield Supported(name, served_through(name), gating_of(name), caches_of(config))


def caches_of(config: Any) -> tuple[str, ...]:
    """Returns the kinds of cache that a config's layers need, sorted."""
    text = config.get_text_config()
    words = next((words for part in PARTS if (words := getattr(text, part, None))), ())
    kinds = {KINDS.get(word, word.removesuffix("_attention")) for word in words}
    value = vars(text)  # reading an attribute fails for a field that differs by layer
    kinds -= {"moe", "mlp"}
    if not kinds:
        windowed = value.get("sliding_window") and value.get("use_sliding_window", True)
        kinds = {"sliding" if windowed else "attention"}
    if value.get("kv_lora_rank"):
        kinds = (kinds - {"attention"}) | {"latent"}
    if config.is_encoder_decoder:
        kinds.add("cross-attention")
    return tuple(sorted(kinds))


def lines(found: list[Supported]) -> Iterator[str]:
    """Yields the table of supported architectures, then the refused ones with their reasons."""
    row = "{:<24} {:<11} {:<38} {}"
    yield row.format("architecture", "path", "gating", "caches")
    for one in found:
        yield row.format(one.architecture, one.path, one.gating, ", ".join(one.caches))
    yield ""
    yield f"{len(found)} supported; these are known and refused:"
    for name, reason in sorted(REFUSED.items()):
        yield f"{name:<24} {reason}"

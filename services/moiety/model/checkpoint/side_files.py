"""The JSON files beside a checkpoint's weights: what of them is read, and what each field must hold. Checks all of them.

A value with which nothing can be served right raises CheckpointError, naming file, field, value and bound. A value that
changes nothing, such as an end-of-sequence id that no output can have, is passed over with a warning. Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moiety.core.experts import MAX_EXPERTS, MAX_LAYERS
from moiety.core.sampling_options import MAX_REPETITION_PENALTY, MAX_TEMPERATURE
from moiety.model.checkpoint.bounds import MAX_COUNT, Bound, between, check_fields, each, integer, whole
from moiety.model.checkpoint.files import present, read_json
from moiety.model.checkpoint.rope_fields import SHARED, check_rope

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"
MODELOPT_FILE = "hf_quant_config.json"
AUTOGPTQ_FILE = "quantize_config.json"
AUTOAWQ_FILE = "quant_config.json"
PROCESSOR_TEMPLATE_FILE = "chat_template.json"
MODEL_FILES = (CONFIG_FILE, GENERATION_FILE, MODELOPT_FILE, AUTOGPTQ_FILE, AUTOAWQ_FILE)
TOKENIZER_CONFIG_FILE, TOKEN_MAP_FILE, ADDED_FILE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKENIZER_FILES = (TOKENIZER_CONFIG_FILE, TOKEN_MAP_FILE, ADDED_FILE)
CONTEXT_NAMES = ("max_position_embeddings", "model_max_length", "max_seq_len", "n_positions")  # of the longest text

_log = logging.getLogger(__name__)


def _is_end(value: Any) -> bool:
    return value is None or (type(value) is int and abs(value) <= MAX_COUNT)


def _named_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


_OBJECT = Bound(lambda value: isinstance(value, dict), "a JSON object")
_TEXT = Bound(lambda value: isinstance(value, str), "a string")
_FLAG = Bound(lambda value: isinstance(value, bool), "true or false")
_ID = integer(-1)  # -1: none
_ENDS = Bound(
    lambda value: all(map(_is_end, value)) if isinstance(value, list) else _is_end(value),
    "a token id (an integer) or a list of token ids",
)
_TOKEN = Bound(_named_token, 'a string, or an object with the string "content"')
_TEMPLATE = Bound(lambda value: isinstance(value, str | list | dict), "a string, or several by name")
_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
_DTYPE = Bound(
    lambda value: isinstance(value, dict) or (isinstance(value, str) and value.removeprefix("torch.") in _DTYPES),
    f"one of {', '.join(_DTYPES)}",
)
_ROPES = ("rope_scaling", "rope_parameters")
_PART: Mapping[str, Bound] = {"model_type": _TEXT, **dict.fromkeys(_ROPES, _OBJECT)}  # of any part of a model
_MODEL: Mapping[str, Bound] = {
    **_PART,
    "architectures": Bound(
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value), "a list of strings"
    ),
    **dict.fromkeys(("torch_dtype", "dtype"), _DTYPE),
    "tie_word_embeddings": _FLAG,
    "vocab_size": integer(1),
    "num_hidden_layers": integer(1, MAX_LAYERS),
    **dict.fromkeys(("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"), each(integer(1))),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon"), between(0, 1)),
    **{name: each(bound) for name, bound in SHARED.items()},
    **dict.fromkeys(CONTEXT_NAMES, integer(1)),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), each(integer(0, MAX_EXPERTS))
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), each(integer(0, MAX_EXPERTS))),
    **dict.fromkeys(("quantization_config", "compression_config"), _OBJECT),
    "text_config": _OBJECT,
    "eos_token_id": _ENDS,
    **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"), _ID),
}

# The one table: by file, the fields that are read of it. What is not listed is not read here.
SIDE_FILES: Mapping[str, Mapping[str, Bound]] = MappingProxyType(
    {
        CONFIG_FILE: _MODEL,
        GENERATION_FILE: {
            "temperature": between(0, MAX_TEMPERATURE),
            "top_p": between(0, 1, low_too=False),
            "min_p": between(0, 1),
            "repetition_penalty": between(0, MAX_REPETITION_PENALTY, low_too=False),
            "top_k": whole(-1),
            "max_new_tokens": whole(1),
            "eos_token_id": _ENDS,
            **dict.fromkeys(("bos_token_id", "decoder_start_token_id", "forced_bos_token_id"), _ID),
        },
        INDEX_FILE: {"weight_map": _OBJECT},
        MODELOPT_FILE: {"quantization": _OBJECT},
        AUTOGPTQ_FILE: {"bits": integer(1, 16)},
        AUTOAWQ_FILE: {},
        TOKENIZER_CONFIG_FILE: {
            **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _TOKEN),
            "added_tokens_decoder": _OBJECT,
            "auto_map": Bound(lambda value: isinstance(value, dict | list), "a JSON object or a list"),
            "tokenizer_class": _TEXT,
            "chat_template": _TEMPLATE,
            "model_max_length": Bound(
                lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number"
            ),
        },
        TOKEN_MAP_FILE: dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _TOKEN),
        ADDED_FILE: {},
        PROCESSOR_TEMPLATE_FILE: {"chat_template": _TEMPLATE},
    }
)


def check_side_files(folder: Path, names: Iterable[str]) -> None:
    """Raises CheckpointError for a file of `names` that is there and is damaged, or has a field out of its bound."""
    for name in names:
        read_side_file(folder, name)


def read_side_file(folder: Path, name: str) -> dict[str, Any]:
    """Returns the object in a file of SIDE_FILES, checked; an empty one where the file is missing.

    Raises CheckpointError if the file is damaged or a field is out of its bound.
    """
    file = folder / name
    if not present(file):
        return {}
    stated = read_json(file, needed=name in (CONFIG_FILE, INDEX_FILE), once=name == INDEX_FILE)
    check_fields(file, stated, SIDE_FILES[name])
    if name == CONFIG_FILE:
        _check_parts(file, stated)
    return stated


def _check_parts(file: Path, config: Mapping[str, Any]) -> None:
    """Checks what a config nests: the configs of a multimodal model's parts, and rotary positions."""
    nested = {name: part for name, part in config.items() if name.endswith("_config") and isinstance(part, dict)}
    for name, part in nested.items():
        check_fields(file, part, _MODEL if name == "text_config" else _PART, f"{name}.")
    for prefix, stated in {"": config, **{f"{name}.": part for name, part in nested.items()}}.items():
        for name in _ROPES:
            check_rope(file, stated.get(name) or {}, f"{prefix}{name}.")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the part of a config that describes the language model: all of it, unless the model is multimodal."""
    return config.get("text_config") or config


def end_ids(folder: str | Path, of_tokenizer: int | None = None) -> tuple[int, ...]:
    """Returns the ids that end an output, sorted: those of generation_config.json, or else of config.json, and the tokenizer's.

    So it is in transformers: the first file that states any decides. `of_tokenizer`: the tokenizer's own id, if it has
    one. Ids that no output can have, below 0 or beyond the vocabulary, are left out with a warning. Raises CheckpointError
    for a value that is no id.
    """
    folder = Path(folder)
    config = read_side_file(folder, CONFIG_FILE)
    generation = read_side_file(folder, GENERATION_FILE).get("eos_token_id")
    general = text_config(config).get("eos_token_id", config.get("eos_token_id"))
    file, stated = (GENERATION_FILE, generation) if generation is not None else (CONFIG_FILE, general)
    vocabulary = text_config(config).get("vocab_size", config.get("vocab_size"))
    if stated is None and of_tokenizer is None:
        warn(
            f"{folder}: no file states an end-of-sequence id: outputs end at their longest length, or at a stop string"
        )
    ids = _possible(folder / file, stated, vocabulary)
    ids |= _possible(folder / TOKENIZER_CONFIG_FILE, of_tokenizer, vocabulary)
    if generation is not None and (others := _possible(folder / CONFIG_FILE, general, vocabulary) - ids):
        stated_twice = f"{CONFIG_FILE} states eos_token_id {general}, {GENERATION_FILE} {generation}"
        warn(f"{folder}: {stated_twice}, which counts: {sorted(others)} end nothing")
    return tuple(sorted(ids))


def _possible(file: Path, stated: Any, vocabulary: int | None) -> set[int]:
    """Returns the stated ids that an output can have, and warns of the others."""
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    possible = {value for value in ids if value is not None and 0 <= value < (vocabulary or MAX_COUNT)}
    if len(possible) < len(set(ids)):
        bound = f"ids from 0 to {vocabulary - 1}" if vocabulary else "ids of at least 0"
        warn(f"{file}: eos_token_id = {stated!r}: only {bound} can end an output; the others are passed over")
    return possible


@lru_cache(maxsize=1024)
def warn(message: str) -> None:
    """Logs a warning about a checkpoint, once in a process: a checkpoint is opened by several parts of it."""
    _log.warning("%s", message)

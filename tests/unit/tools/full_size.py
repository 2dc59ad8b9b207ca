"""Writes checkpoints of full size that take no disk space: real configs and headers, and sparse shards."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from moiety.model.architectures.transformers_model import meta_model
from moiety.model.checkpoint.side_files import INDEX_FILE
from moiety.synthetic.write import published_class


def write_hollow(folder: Path, config: Any, *, shards: int, dtype: str = "BF16") -> Path:
    """Writes a checkpoint of `config` to `folder` and returns the folder.

    Tensors have their published names and the dtype `dtype`, in `shards` sparse files.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = meta_model(published_class(config), config)
    tensors = [
        (name, list(tensor.shape)) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()
    ]
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        header: dict[str, Any] = {}
        offset = 0
        for name, shape in tensors[number::shards]:
            size = prod(shape) * (4 if dtype == "F32" else 2)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            weight_map[name] = file
            offset += size
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    return folder

"""Every JSON file beside the weights gets wrong fields: the checkpoint is described, or refused with CheckpointError."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fuzz_support import FAST, SLOW, damaged

from moiety.errors import CheckpointError
from moiety.model.architectures.transformers_model import quiet_transformers
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.generation_defaults import GenerationDefaults
from moiety.model.checkpoint.side_files import INDEX_FILE, SIDE_FILES
from moiety.model.checkpoint.tokenizer import open_tokenizer
from moiety.model.experts.derive import derive_layout
from moiety.model.trunk.encoder_decoder import DecoderStart
from moiety.synthetic import write_tiny

VALUES = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        319,
        320,
        10**6,
        1 << 31,
        10**30,
        0.5,
        -0.0,
        1e300,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "x",
        "32000",
        "</s>",
        "bfloat16",
        "int7",
        "../x",
        [],
        [None],
        [1, None],
        [-1, 5],
        ["</s>"],
        [[1]],
        {},
        {"x": 1},
    ),
    *({"content": 3}, {"rope_type": "yarn", "factor": 0}, {"rope_type": "dynamic"}, {"type": "longrope", "factor": 2}),
)
ARCHITECTURES = ("mixtral", "qwen3_vl_moe", "deepseek_v3-int4", "nllb-moe")
TIMES = [pytest.param(FAST, id="fast"), pytest.param(SLOW, id="slow", marks=pytest.mark.slow)]


def served(folder: Path) -> None:
    """Reads all that a system reads of a checkpoint before it loads weights."""
    checkpoint = Checkpoint.open(folder)
    shape = derive_layout(checkpoint).shape
    DecoderStart.of(checkpoint)
    defaults = GenerationDefaults.open(folder)
    _, ends = open_tokenizer(str(folder))
    assert 1 <= shape.top_k <= shape.experts
    assert shape.max_context >= 1
    assert all(0 <= end < shape.vocabulary for end in ends)
    assert defaults.top_k is None or defaults.top_k >= 0


def changed(random: Random, content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the object with one or two fields, at any depth, that hold other values or are gone."""
    out: dict[str, Any] = json.loads(json.dumps(content))
    for _ in range(random.randint(1, 2)):
        part = out
        while (
            inner := [value for value in part.values() if isinstance(value, dict) and value]
        ) and random.random() < 0.4:
            part = random.choice(inner)
        name = random.choice(sorted(part) or ["eos_token_id"])
        if random.random() < 0.1:
            part.pop(name, None)
        else:
            part[name] = random.choice(VALUES)
    return out


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wrong_side_files(architecture: str, times: int, tmp_path: Path) -> None:
    """A wrong field or damaged bytes in any side file give a description of the system or CheckpointError, nothing else."""
    folder = write_tiny(architecture, tmp_path / "tiny")
    generation = {"eos_token_id": [1], "bos_token_id": 0, "temperature": 0.7, "top_k": 20, "max_new_tokens": 9}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    known = {name: dict.fromkeys(fields) for name, fields in SIDE_FILES.items()}
    random, refused = Random(7), 0
    for number in range(15 * times):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        name = random.choice(sorted(known))
        file = copy / name
        content = json.loads(file.read_text()) if file.exists() else {}
        if random.random() < 0.15:
            file.write_bytes(damaged(random, json.dumps(content).encode()))
        else:
            named = content if name == INDEX_FILE else {**known[name], **content}
            file.write_text(json.dumps(changed(random, named)))
        try:
            with quiet_transformers():
                served(copy)
        except CheckpointError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"input {number}: {name}: {file.read_text(errors='replace')[:2000]}") from error
        shutil.rmtree(copy)
    print(f"{15 * times} inputs to {architecture}, {refused} refused")
    assert 0 < refused < 15 * times

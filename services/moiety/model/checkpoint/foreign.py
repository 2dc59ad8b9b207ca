"""Says what a file or folder is that is no checkpoint as Moiety serves it, and what to do instead. Imports no torch.

Names of files decide, and of a few small ones the content. `headers.py` and `side_files.py` report files that are damaged.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from moiety.model.checkpoint.side_files import CONFIG_FILE, INDEX_FILE

ADAPTER_FILE = "adapter_config.json"
SHARDS = "*.safetensors"
MOST_NAMES = 3  # of files, in one sentence
_CONVERT = (
    'convert them once: python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{place}', dtype='auto').save_pretrained('NEW_FOLDER')\", and copy the tokenizer's files"
)
# Pattern of a file's name -> what the file is, and what to do instead. The first that matches decides.
_FORMATS = (
    (
        "*.gguf",
        "GGUF, the format of llama.cpp",
        "serve the safetensors that it was made from, which its model card names as base model",
    ),
    ("*.onnx", "an ONNX export", "serve the safetensors of the model that it was exported from"),
    ("*.engine", "a TensorRT-LLM engine, built for one kind of GPU", "serve the checkpoint that it was built from"),
    (
        "consolidated*.pth",
        "its maker's own layout (consolidated*.pth)",
        "serve the copy of the model in transformers' layout: config.json and model*.safetensors",
    ),
    (
        "consolidated*.safetensors",
        "its maker's own layout (consolidated*.safetensors)",
        "serve the copy of the model in transformers' layout: config.json and model*.safetensors",
    ),
    ("model_index.json", "a pipeline of diffusers, which generates no text", "serve a language model"),
    *(
        (pattern, f"weights as pickles ({pattern}), which run code when they are read", _CONVERT)
        for pattern in ("*.bin", "*.pth", "*.pt", "*.ckpt")
    ),
    ("*.h5", "weights for TensorFlow", "serve the model's safetensors"),
    ("*.msgpack", "weights for JAX", "serve the model's safetensors"),
    ("*.npz", "weights for MLX or numpy", "serve the model's safetensors"),
)


def format_of(names: Collection[str], place: str = "FOLDER") -> str | None:
    """Returns what files of these names are and what to do instead, for "it holds …"; None if they say nothing.

    `names` are those of a folder without safetensors in transformers' layout; `place` is what its owner calls the folder.
    """
    for pattern, what, instead in _FORMATS:
        if any(fnmatch(name.rpartition("/")[2], pattern) for name in names):
            return f"{what}: {instead.format(place=place)}"
    return None


def file_instead_of_folder(file: Path) -> str:
    """Returns what a file is that was named in place of a folder, and what to do."""
    if fnmatch(file.name, SHARDS) or file.name == CONFIG_FILE:
        return f"is one file of a checkpoint: name its folder, {file.absolute().parent}"
    found = format_of([file.name], str(file.parent))
    return f"is {found}" if found else "is a file: name the folder of a checkpoint, with config.json and safetensors"


def folder_problem(folder: Path) -> str | None:
    """Returns why a folder is no checkpoint in safetensors, and what to do; None if it seems to be one."""
    names = sorted(path.name for path in folder.iterdir())
    complete = CONFIG_FILE in names and any(fnmatch(name, SHARDS) or name == INDEX_FILE for name in names)
    if ADAPTER_FILE in names:
        return _adapter(folder, complete=complete)
    if complete:
        return None
    if not names:
        return "is empty: name a folder with config.json and safetensors, or a Hugging Face id"
    if partial := partial_files(folder):
        return f"is a download that is not complete ({listed(partial)}): start it again; complete files are kept"
    if CONFIG_FILE not in names and (inner := next(_checkpoints_within(folder), None)) is not None:
        return f"is not a checkpoint itself, but {inner} in it is: name that folder"
    if found := format_of(names, str(folder)):
        return f"holds {found}"
    if CONFIG_FILE not in names and "params.json" in names:
        return "holds its maker's own layout (params.json): serve the copy of the model in transformers' layout"
    return None


def partial_files(folder: Path) -> list[str]:
    """Returns the names of files that a download has begun and not completed, in a folder or in Hugging Face's cache."""
    places = [folder, folder / ".cache/huggingface/download"]
    if folder.parent.name == "snapshots":
        places.append(folder.parent.parent / "blobs")
    return sorted(path.name for place in places if place.is_dir() for path in place.glob("*.incomplete"))


def listed(names: Collection[str]) -> str:
    """Returns names for a sentence: the first few, and how many there are besides."""
    first, more = list(names)[:MOST_NAMES], len(names) - MOST_NAMES
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def adapter_of_base(base: str | None = None) -> str:
    """Returns what a LoRA adapter is, of the model `base` if its files say so, and what to do instead."""
    of_base = f" for {base}" if base else ""
    return (
        f"a LoRA adapter{of_base}, not a model: merge it into its base with PEFT (merge_and_unload, then save_pretrained) "
        "and serve the result"
    )


def _adapter(folder: Path, *, complete: bool) -> str:
    """Returns what to do with a folder that holds a LoRA adapter, beside whole weights if `complete`."""
    base = None
    with suppress(OSError, ValueError, AttributeError):
        base = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if complete:
        return f"holds whole weights and a LoRA adapter: if the adapter is merged into them, remove {ADAPTER_FILE}"
    return f"is {adapter_of_base(base)}"


def _checkpoints_within(folder: Path) -> Iterator[Path]:
    """Yields folders with a config.json below `folder`: in it, or where Hugging Face's cache has a model's files."""
    with suppress(OSError):
        commit = (folder / "refs/main").read_text(encoding="utf-8").strip()
        if commit and (folder / "snapshots" / commit / CONFIG_FILE).exists():
            yield folder / "snapshots" / commit
    for pattern in ("*", "snapshots/*"):
        yield from (file.parent for file in sorted(folder.glob(f"{pattern}/{CONFIG_FILE}")))

"""Opens a checkpoint's tokenizer and says what its ids are: ends of sequence, text, bytes. Gateways and routers use this.

transformers takes seconds to import, so only what needs it does: `check_tokenizer` is for before a start.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer, models

from moiety.errors import CheckpointError
from moiety.model.checkpoint.files import AGAIN, present, read_json, unreadable
from moiety.model.checkpoint.sentencepiece_model import converted, named_tokens, no_panics, read_sentencepiece
from moiety.model.checkpoint.side_files import (
    ADDED_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILES,
    check_side_files,
    end_ids,
    read_side_file,
)

WHOLE_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
TEKKEN_FILE = "tekken.json"
TIKTOKEN_FILES = (MODEL_FILE, "tiktoken.model")
# What transformers converts, and the package that it needs for that.
CONVERTED = {
    "vocab.json": "",
    "vocab.txt": "",
    "spiece.model": "sentencepiece",
    "sentencepiece.bpe.model": "sentencepiece",
    TEKKEN_FILE: "mistral_common",
}
TEKKEN = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}  # what no tekken.json states
WITHOUT = "serve token ids only, with --set gateway.skip_tokenizer=true or LLM(skip_tokenizer=True)"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")


def check_tokenizer(folder: str | Path) -> None:
    """Raises CheckpointError that says what to do if `folder` has no tokenizer that can be opened.

    Takes up to a second for the largest. What only transformers finds wrong, `open_tokenizer` refuses.
    """
    folder = Path(folder)
    if _file(folder) == WHOLE_FILE:
        try:
            with no_panics():
                Tokenizer.from_file(str(folder / WHOLE_FILE))
        except Exception as error:  # tokenizers raises nothing more specific
            raise _damaged(folder / WHOLE_FILE) from error


def _damaged(file: Path) -> CheckpointError:
    """Returns the error for a tokenizer.json that could not be opened."""
    try:
        stated = read_json(file)
    except CheckpointError as error:
        return CheckpointError(f"{error}; {WITHOUT}")
    if not isinstance(stated.get("model"), dict):
        return CheckpointError(f"{file}: model is missing, the tokens: {AGAIN}; {WITHOUT}")
    reader = f"tokenizers {version('tokenizers')}"
    return CheckpointError(
        f"{file}: not readable as a tokenizer by {reader}: it is damaged, or newer: {AGAIN}, or {WITHOUT}"
    )


def open_tokenizer(folder: str) -> tuple[Any, tuple[int, ...]]:
    """Returns the tokenizer in `folder` and its end-of-sequence ids. Raises CheckpointError if there is no usable one.

    Code that a checkpoint brings is not run.
    """
    path = Path(folder)
    file = _file(path)
    try:
        with no_panics():
            if file == WHOLE_FILE and _own_class(path):  # the file says what that class would
                tokenizer = _whole(path)
            elif file == MODEL_FILE and not _is_tiktoken(path / file):
                tokenizer = _sentencepiece(path)
            else:
                tokenizer = _as_transformers(path, **(_unstated(path, TEKKEN) if file == TEKKEN_FILE else {}))
        if file != WHOLE_FILE:
            _check_added(path, tokenizer)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever its parsers raise
        if file == WHOLE_FILE:
            check_tokenizer(folder)
        raise CheckpointError(f"{folder}: no usable tokenizer: {error}; {WITHOUT}") from error
    return tokenizer, end_ids(path, tokenizer.eos_token_id)


def no_tokenizer(folder: str) -> tuple[Any, tuple[int, ...]]:
    """Returns a tokenizer without tokens, and the end-of-sequence ids that the checkpoint in `folder` states elsewhere."""
    from transformers import PreTrainedTokenizerFast

    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({}, "")))
    return empty, end_ids(Path(folder))


class TokenKinds:
    """Which ids of a tokenizer decoding turns into text, and which of these are single bytes."""

    def __init__(self, tokenizer: Any):
        self._token = tokenizer.convert_ids_to_tokens
        self._special = frozenset(tokenizer.all_special_ids)
        # Those of tokens such as "<0xE2>", for decoders that join these to characters.
        self.byte_ids: frozenset[int] = frozenset()
        if tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer
            added = backend.get_added_tokens_decoder().items()
            self._special = frozenset(token_id for token_id, token in added if token.special)
            if backend.decoder is not None and backend.decoder.decode(["<0x41>"]) == "A":
                found = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
                self.byte_ids = frozenset(token_id for token_id in found if token_id is not None)

    def has_text(self, token_id: int) -> bool:
        """Returns whether decoding keeps a token: it skips special tokens, and ids that the tokenizer does not have."""
        return token_id not in self._special and self._token(token_id) is not None


def _file(folder: Path) -> str:
    """Returns the name of the file that the tokenizer is read from.

    Raises CheckpointError if there is none, or if it needs the checkpoint's own code or a package that is not installed.
    """
    check_side_files(folder, TOKENIZER_FILES)
    if present(folder / WHOLE_FILE):
        return WHOLE_FILE
    if own := _own_class(folder):
        raise CheckpointError(
            f"{folder}: its tokenizer needs the checkpoint's own code, {own}, which Moiety does not run: "
            f"convert it to {WHOLE_FILE}, or {WITHOUT}"
        )
    for name in TIKTOKEN_FILES:
        if present(folder / name) and _is_tiktoken(folder / name):
            return _if_installed("tiktoken", folder, name)
    if present(folder / MODEL_FILE):
        read_sentencepiece(folder / MODEL_FILE)
        return MODEL_FILE
    for name, package in CONVERTED.items():
        if present(folder / name):
            return _if_installed(package, folder, name)
    known = ", ".join((WHOLE_FILE, *TIKTOKEN_FILES, *CONVERTED))
    raise CheckpointError(
        f"{folder}: no tokenizer: there is none of {known}: copy it from the model's publisher, or {WITHOUT}"
    )


def _if_installed(package: str, folder: Path, name: str) -> str:
    """Returns `name`. Raises CheckpointError if the package that reads this file is not installed. "": it needs none."""
    if package and find_spec(package) is None:
        distribution = package.replace("_", "-")
        raise CheckpointError(
            f"{folder / name}: reading this tokenizer needs a package: pip install {distribution}, or {WITHOUT}"
        )
    return name


def _own_class(folder: Path) -> str:
    """Returns the class, in the checkpoint's own code, that tokenizer_config.json names; "" if it names none."""
    stated = read_side_file(folder, TOKENIZER_CONFIG_FILE).get("auto_map")
    named = stated.get("AutoTokenizer") if isinstance(stated, dict) else stated
    names = [name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]
    return names[0] if names else ""


def _is_tiktoken(file: Path) -> bool:
    """Returns whether a file is in tiktoken's format: a line is a token in base64, and its rank."""
    try:
        with file.open("rb") as opened:
            return _TIKTOKEN_LINE.match(opened.read(1 << 12)) is not None
    except OSError as error:
        raise CheckpointError(f"{file}: {unreadable(error)}") from None


def _unstated(folder: Path, named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of `named`, arguments of a tokenizer, that no side file states."""
    stated = {name for file in TOKENIZER_FILES for name in read_side_file(folder, file)}
    return {name: value for name, value in named.items() if name not in stated}


def _added(folder: Path) -> dict[str, int]:
    """Returns the ids of the tokens that the side files of a tokenizer add or rename, by their texts."""
    listed = read_side_file(folder, TOKENIZER_CONFIG_FILE).get("added_tokens_decoder") or {}
    texts = {token_id: token["content"] if isinstance(token, dict) else token for token_id, token in listed.items()}
    return {**read_side_file(folder, ADDED_FILE), **{text: int(token_id) for token_id, text in texts.items()}}


def _check_added(folder: Path, tokenizer: Any) -> None:
    """Raises CheckpointError if a conversion has lost the id of an added token: conversions append them one after another."""
    vocabulary = tokenizer.get_vocab()
    for text, token_id in _added(folder).items():
        if (found := vocabulary.get(text)) != token_id:
            raise CheckpointError(
                f"{folder}: {text!r} is token {token_id} of the published tokenizer, and {found} of the one made of its files: "
                f"{WITHOUT}"
            )


def _as_transformers(folder: Path, **named: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(folder),
        local_files_only=True,
        trust_remote_code=False,
        mistral_format=False,  # else a tekken.json and mistral-common give a class without what is needed of a tokenizer
        **named,
    )


def _whole(folder: Path, **named: Any) -> Any:
    """Opens tokenizer.json as it is. `named`: special tokens, where no other file names them."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, **named)


def _sentencepiece(folder: Path) -> Any:
    """Converts tokenizer.model. Side files count as beside a tokenizer.json, which is what this makes of it for a moment."""
    config, model = read_side_file(folder, TOKENIZER_CONFIG_FILE), read_sentencepiece(folder / MODEL_FILE)
    for text, token_id in _added(folder).items():
        if token_id < len(model.pieces):  # a token that was kept free for this
            model.pieces[token_id].piece = text
    # Both are LlamaTokenizer's. `legacy`: whether text after a special token gets the space that begins a text.
    backend = converted(model, space=config.get("add_prefix_space") is not False, once=config.get("legacy") is False)
    named = _unstated(folder, {"add_bos_token": True, **named_tokens(model)})
    with TemporaryDirectory() as made:
        for name in (*TOKENIZER_FILES, "chat_template.jinja"):
            if (folder / name).is_file():
                shutil.copy(folder / name, made)
        if (templates := folder / "additional_chat_templates").is_dir():
            shutil.copytree(templates, Path(made, templates.name))
        backend.save(str(Path(made, WHOLE_FILE)))
        return _whole(Path(made), **named)

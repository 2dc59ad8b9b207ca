"""Opening tokenizers in the forms in which checkpoints are published, and saying why one cannot be opened."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.convert_slow_tokenizer import import_protobuf

from moiety.errors import CheckpointError
from moiety.model.checkpoint.tokenizer import TokenKinds, check_tokenizer, no_tokenizer, open_tokenizer
from moiety.synthetic.tokenizer import write_tokenizer

SPECIAL = {"<unk>": 2, "<s>": 3, "</s>": 3, "[INST]": 4}  # and their types
PIECES = ["▁a", "ab", "▁ab", "▁▁", "▁▁▁▁", "▁", "a", "b"]  # the earlier, the sooner merged
TEXTS = ["ab a", "  a", "a    ab", "aab\n", "né", "ab " * 20]
SENTENCE = "the router runs attention, gating: and (each) group of experts grows while it's hot; naïve = def f(x):"


def write_model(folder: Path, **config: Any) -> None:
    """Writes tokenizer.model, SentencePiece BPE with tokens for bytes as Mixtral has it, and the config of a tokenizer."""
    model = import_protobuf().ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.normalizer_spec.remove_extra_whitespaces = False
    for piece, kind in SPECIAL.items():
        model.pieces.add(piece=piece, type=kind)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", type=6)
    for rank, piece in enumerate(PIECES):
        model.pieces.add(piece=piece, score=-float(rank))
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_kimi(folder: Path) -> None:
    """Writes files as Kimi's: ranks of tokens, and a class in the checkpoint's own code."""
    ranks = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (folder / "tiktoken.model").write_text("".join(ranks))
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('it was run')\n")
    config = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}, "eos_token": "[EOS]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_damaged(folder: Path) -> None:
    """Writes half a tokenizer.json."""
    write_tokenizer(folder)
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[: len(whole) // 2])


def write_tables(*tables: bytes) -> Callable[[Path], None]:
    """Returns what writes a tokenizer.model with a damaged table of characters; with a second one, a tokenizer.json, too."""

    def write(folder: Path) -> None:
        write_model(folder)
        model = import_protobuf().ModelProto()
        model.ParseFromString((folder / "tokenizer.model").read_bytes())
        model.normalizer_spec.precompiled_charsmap = tables[0]
        (folder / "tokenizer.model").write_bytes(model.SerializeToString())
        for table in tables[1:]:
            write_tokenizer(folder)
            whole = json.loads((folder / "tokenizer.json").read_text())
            whole["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
            (folder / "tokenizer.json").write_text(json.dumps(whole))

    return write


def write_config(text: str) -> Callable[[Path], None]:
    """Returns what writes a tokenizer whose tokenizer_config.json is `text`."""

    def write(folder: Path) -> None:
        write_tokenizer(folder)
        (folder / "tokenizer_config.json").write_text(text)

    return write


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (lambda folder: None, r"no tokenizer: there is none of tokenizer\.json, .*gateway\.skip_tokenizer"),
        (write_damaged, r"tokenizer\.json: not readable as"),
        (write_kimi, r"the checkpoint's own code, tokenization_kimi\.TikTokenTokenizer, .*gateway\.skip_tokenizer"),
        (write_config("[]"), r"tokenizer_config\.json"),
        (write_config("{"), r"tokenizer_config\.json"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"no model"), r"tokenizer\.model: not"),
        (write_tables(b"\1"), r"tokenizer\.model: not readable .*precompiled_charsmap\) is damaged: copy"),
        (
            write_tables(b"\4\0\0\0\1\0\0\0a\0b\0"),
            r"tokenizer\.model: not readable .*precompiled_charsmap\) is damaged: copy",
        ),
        (write_tables(b"", b"\1"), r"tokenizer\.json: not readable as a tokenizer .*: copy"),
    ],
    ids=[
        *("none", "damaged", "own code", "a list as config", "a damaged config", "a damaged model"),
        *("no table", "a table that ends too early", "no table in tokenizer.json"),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path: Path, write: Callable[[Path], object], why: str):
    """The check before a start and opening say the same reason, name the file or class, and run no code."""
    write(tmp_path)
    with pytest.raises(CheckpointError, match=why):
        check_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer"):
        open_tokenizer(str(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("tiktoken") is not None, reason="the package tiktoken is installed")
def test_a_missing_package_is_named(tmp_path: Path):
    """A file that only another package reads is refused with the command that installs it."""
    write_kimi(tmp_path)
    (tmp_path / "tokenization_kimi.py").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tiktoken\.model: .*pip install tiktoken"):
        check_tokenizer(tmp_path)


def test_own_code_beside_a_whole_tokenizer_is_not_needed(tmp_path: Path):
    """A tokenizer.json says all, so a class of the checkpoint's own code is passed over."""
    write_kimi(tmp_path)
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "TikTokenTokenizer"}))
    check_tokenizer(tmp_path)
    tokenizer, _ = open_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("each expert")) == "each expert"


def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path: Path):
    """Ids, merges in the order of scores, bytes, the space before a text, special tokens, begin and end: as published."""
    write_model(tmp_path)
    check_tokenizer(tmp_path)
    tokenizer, ends = open_tokenizer(str(tmp_path))
    pieces = [tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS[:5]]
    assert pieces == [
        ["▁ab", "▁a"],
        ["▁▁", "▁a"],
        ["▁a", "▁▁", "▁", "▁ab"],
        ["▁a", "ab", "<0x0A>"],
        ["▁", "<0x6E>", "<0xC3>", "<0xA9>"],
    ]
    assert tokenizer.encode("a") == [1, tokenizer.convert_tokens_to_ids("▁a")]
    assert ends == (2,)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    known = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    assert tokenizer.convert_ids_to_tokens(list(range(len(known)))) == known
    kinds = TokenKinds(tokenizer)
    assert [kinds.has_text(token) for token in range(4)] == [
        False,
        False,
        False,
        True,
    ]  # [INST] is one of its own words


def test_side_files_count_beside_a_sentencepiece_model(tmp_path: Path):
    """Added tokens keep their ids, named ones their roles; the config decides on the begin of sequence; the template counts."""
    end = len(SPECIAL) + 256 + len(PIECES)
    write_model(
        tmp_path,
        tokenizer_class="LlamaTokenizer",
        legacy=False,
        add_bos_token=False,
        eos_token="<|im_end|>",
        added_tokens_decoder={str(end): {"content": "<|im_end|>", "special": True}},
        chat_template="{{ messages }}",
    )
    tokenizer, ends = open_tokenizer(str(tmp_path))
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("ab<|im_end|>ab"))
    assert pieces == ["▁ab", "<|im_end|>", "ab"]  # the space of a beginning comes once
    assert ends == (end,)
    assert tokenizer.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("token", "kept"), [(3, True), (len(SPECIAL) + 256 + len(PIECES) + 1, False)], ids=["renamed", "gap"]
)
def test_added_tokens_have_their_published_ids(tmp_path: Path, token: int, kept: bool):
    """A token that takes the place of a spare one keeps its id; where a conversion would give it another, it is refused."""
    write_model(tmp_path, added_tokens_decoder={str(token): {"content": "<|turn|>", "special": True}})
    if kept:
        tokenizer, _ = open_tokenizer(str(tmp_path))
        assert tokenizer.encode("<|turn|>", add_special_tokens=False) == [token]
        assert not TokenKinds(tokenizer).has_text(token)
    else:
        with pytest.raises(CheckpointError, match=rf"'<\|turn\|>' is token {token} of the published tokenizer"):
            open_tokenizer(str(tmp_path))


def _published() -> list[Any]:
    spec = importlib.util.find_spec("mistral_common")
    found = sorted(Path(spec.origin or "").parent.glob("data/*.model.v[13]")) if spec else []
    return [
        *(pytest.param(file, id=file.name) for file in found),
        "bpe",
        "unigram",
        "bpe with NFKC",
        "unigram with NFKC",
    ]


@pytest.mark.parametrize("which", _published())
def test_ids_are_those_of_the_sentencepiece_library(tmp_path: Path, which: Path | str):
    """Published models and trained ones give the library's ids and text for any text; with NFKC, without combining marks."""
    library = pytest.importorskip("sentencepiece", reason="the package sentencepiece is not installed")
    drawn = random.Random(5)
    file = tmp_path / "tokenizer.model"
    if isinstance(which, Path):
        shutil.copy(which, file)
    else:
        exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
        made = io.BytesIO()
        library.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(drawn.choices(SENTENCE.split(), k=12)) for _ in range(300)]),
            model_writer=made,
            vocab_size=400,
            hard_vocab_limit=False,
            model_type=which.split()[0],
            minloglevel=2,
            **({} if "NFKC" in which else exact),
        )
        file.write_bytes(made.getvalue())
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    reference, (tokenizer, _) = library.SentencePieceProcessor(model_file=str(file)), open_tokenizer(str(tmp_path))
    odd = "  \n\tab=é漢字🙂\u3000ﬁ½" + ("" if str(which).endswith("NFKC") else "e\u0301\u200d")
    for _ in range(300):
        text = " ".join(drawn.choices(SENTENCE.split(), k=drawn.randrange(8))) + "".join(
            drawn.choices(odd, k=drawn.randrange(12))
        )
        ids = reference.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        if reference.unk_id() not in ids:  # which the library shows as " ⁇ "
            assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer.convert_ids_to_tokens(list(range(len(reference)))) == [
        reference.id_to_piece(token) for token in range(len(reference))
    ]


def test_without_a_tokenizer_the_ends_are_those_of_the_other_files(tmp_path: Path):
    """generation_config.json comes before config.json, and no token has text."""
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    tokenizer, ends = no_tokenizer(str(tmp_path))
    assert ends == (7, 9)
    assert not any(map(TokenKinds(tokenizer).has_text, range(100)))

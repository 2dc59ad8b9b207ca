"""Turns what a user calls a model, a folder or a Hugging Face id, into a folder: downloads what of the model is needed.

huggingface_hub does the transfer and keeps the files in its cache, which other tools share: HF_HOME says where it is,
HF_ENDPOINT from where it is filled, HF_TOKEN or `hf auth login` who asks, and HF_HUB_OFFLINE=1 that nobody may.
"""

from __future__ import annotations

import glob
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moiety import __version__
from moiety.errors import CheckpointError
from moiety.model.checkpoint.files import present
from moiety.model.checkpoint.foreign import ADAPTER_FILE, adapter_of_base, file_instead_of_folder, format_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

Say = Callable[[str], None]

MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
SINGLE_SHARD = "model.safetensors"
# Beside the weights, what config, tokenizer, chat template and quantisation are read from. No code, no pickles.
NEEDED = (
    "config.json",
    "configuration.json",
    "generation_config.json",
    "*quant*_config.json",
    "quantize_config.json",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab.*",
    "merges.txt",
    "tekken.json",
    "tokenizer.model*",
    "*.tiktoken",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.*.model",
)
SAY_EVERY_S = 5.0
STOP_S = 5.0
GB = 1e9


class _Interrupted(Exception):
    """Ends the transfer of a file after its current chunk."""


def is_model_id(model: str) -> bool:
    """Returns whether `model` has the form of a Hugging Face id, owner/name."""
    return MODEL_ID.fullmatch(model) is not None and ".." not in model and "--" not in model


def local_folder(model: str, revision: str | None = None, *, say: Say) -> Path:
    """Returns the folder of `model`: itself if it is a folder; else it is a Hugging Face id, which is downloaded.

    `revision`: a branch, tag or commit of the model at Hugging Face. Only the safetensors, config, tokenizer and chat
    template are downloaded. Files that are complete are kept: the next call downloads the others, and needs no network
    if there are none. A broken connection is taken up where it broke. `say` gets a line every few seconds; on a
    terminal huggingface_hub shows its bars instead.

    Raises CheckpointError: there is neither; access is denied; no network; the disk is too small; it has no safetensors.
    """
    if model and Path(model).is_dir():
        if revision is not None:
            raise CheckpointError(f"{model}: is a folder, so it has no revision {revision} to choose")
        return Path(model)
    if model and present(Path(model)):
        raise CheckpointError(f"{model}: {file_instead_of_folder(Path(model))}")
    if not is_model_id(model):
        raise CheckpointError(f"{model}: neither a folder here nor a Hugging Face id, such as Qwen/Qwen3-30B-A3B")
    from huggingface_hub import HfApi, constants

    with _explained(model, revision):
        api = HfApi(library_name="moiety", library_version=__version__)
        try:
            info = api.model_info(model, revision=revision, files_metadata=True)
        except Exception as error:
            if _unreachable(error) and (found := _cached(model, revision)) is not None:
                say(f"{model}: {constants.ENDPOINT} cannot be reached; using the copy in {found}")
                return found
            raise
        return _downloaded(model, revision, info, say)


def needed_files(names: Iterable[str]) -> list[str]:
    """Returns those files of a repository that serving reads, sorted. `names` are paths in it.

    Of the weights, the single file where there is one, as transformers does. `consolidated*.safetensors` are a second copy of
    the weights in their maker's own layout.
    """
    known = set(names)
    shards = {name for name in known if fnmatch(name, "*.safetensors") and "/" not in name}
    if SINGLE_SHARD in shards:
        shards = {SINGLE_SHARD}
    shards = {name for name in shards if not name.startswith(("consolidated", "adapter_"))}
    others = {
        name for name in known for pattern in NEEDED if fnmatch(name, pattern) and name.count("/") == pattern.count("/")
    }
    return sorted(shards | others)


def _downloaded(model: str, revision: str | None, info: ModelInfo, say: Say) -> Path:
    """Returns the folder of `model`, after the transfer of the files that its cache lacks."""
    from huggingface_hub import constants

    files = {file.rfilename: file for file in info.siblings or ()}
    needed = needed_files(files)
    for what, pattern in (("config.json", "config.json"), ("safetensors", "*.safetensors")):
        if not any(fnmatch(name, pattern) for name in needed):
            found = adapter_of_base() if ADAPTER_FILE in files else format_of(files, model)
            instead = f"; it holds {found}" if found else ", which Moiety needs"
            raise CheckpointError(f"{model}: has no {what} at {constants.ENDPOINT}{instead}")
    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / f"models--{model.replace('/', '--')}" / "blobs"
    lacking = [files[name] for name in needed if not (blobs / _etag(files[name])).exists()]
    size = sum(file.size or 0 for file in lacking)
    room = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    if size > (free := shutil.disk_usage(room).free):
        raise CheckpointError(
            f"{model}: needs {size / GB:.1f} GB more, but the disk of {cache} has {free / GB:.1f} GB free; "
            "HF_HOME chooses another one"
        )
    if lacking:
        say(f"{model}: downloading {len(lacking)} files, {size / GB:.1f} GB, to {cache}")
    return _transferred(model, revision, needed, size, say)


def _transferred(model: str, revision: str | None, files: list[str], size: int, say: Say) -> Path:
    """Downloads `files`, `size` bytes of them still to come, and returns the folder.

    An exception in this thread, such as that of Ctrl-C, ends the transfer. It gets STOP_S to remove unfinished files.
    """
    from huggingface_hub import snapshot_download

    stop = threading.Event()
    beside = ThreadPoolExecutor(1, thread_name_prefix="download")  # so that a signal finds this thread waiting
    transfer = beside.submit(
        snapshot_download,
        model,
        revision=revision,
        allow_patterns=[glob.escape(name) for name in files],
        library_name="moiety",
        library_version=__version__,
        tqdm_class=_bars(stop, _reports(model, size, say)),
    )
    try:
        return Path(transfer.result())
    except BaseException:
        stop.set()
        wait((transfer,), STOP_S)
        raise
    finally:
        beside.shutdown(wait=False)


def _cached(model: str, revision: str | None) -> Path | None:
    """Returns the folder of `model` in the cache if all that is needed is there, without a look at the network."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    patterns: list[str] | None = None
    try:
        names = [file.path for file in get_cached_repo_tree(model, revision=revision)]
        patterns = [glob.escape(name) for name in needed_files(names)]
    except CachedRepoTreeNotFoundError:  # another tool downloaded it; `Checkpoint.open` then finds what is missing
        pass
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        return None


@contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    """Turns the errors of huggingface_hub into CheckpointError that says what to do."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    try:
        yield
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model}: its owner restricts access; accept the conditions at {hub}/{model}, "
            "then run `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model}: neither a folder here nor a model at {hub}; if it is private, run `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{model}: has no revision {revision} at {hub}") from error
    except errors.OfflineModeIsEnabled as error:
        raise CheckpointError(
            f"{model}: not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: unset it, or name a folder"
        ) from error
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"{model}: {hub} answered {error.response.status_code}; run the command again") from error
    except OSError as error:
        raise CheckpointError(
            f"{model}: the download failed: {error.strerror or error}; run the command again, complete files are kept"
        ) from error
    except Exception as error:
        if not _unreachable(error):
            raise
        chosen = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"{model}: no folder here, {constants.HF_HUB_CACHE} has no complete copy, and {hub} cannot be reached: check the "
            "network and run the command again (complete files are kept), name a mirror with HF_ENDPOINT, or run "
            f"`hf download {model}{chosen} --local-dir FOLDER` on another machine, copy FOLDER here and name it instead"
        ) from error


def _unreachable(error: Exception) -> bool:
    """Returns whether `error` says that the hub cannot be asked now: no network, offline mode, or its own failure."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return bool(error.response.status_code >= 500)
    client = type(error).__module__.partition(".")[0]  # httpx2 today; huggingface_hub has changed it before
    return isinstance(error, OfflineModeIsEnabled) or client in ("httpx", "httpx2")


def _etag(file: RepoSibling) -> str:
    """Returns the name of a file's content in the cache."""
    return file.lfs.sha256 if file.lfs is not None else file.blob_id or ""


def _reports(model: str, size: int, say: Say) -> Callable[[int], None]:
    """Returns a function that takes the bytes that have come so far, and says so every few seconds."""
    last = time.monotonic()

    def report(received: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= SAY_EVERY_S and not sys.stderr.isatty():
            last = now
            say(f"{model}: {received / GB:.1f} of {size / GB:.1f} GB")

    return report


def _bars(stop: threading.Event, report: Callable[[int], None]) -> type[Any]:
    """Returns huggingface_hub's progress bar, shown on a terminal only, with `report` and `stop` added."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.received, self.counts_bytes = 0, options.get("unit") == "B"
            if not sys.stderr.isatty():
                options["disable"] = True
            super().__init__(*args, **options)

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise _Interrupted
            if self.counts_bytes:
                self.received += int(n or 0)
                report(self.received)
            return super().update(n)

    return Bar

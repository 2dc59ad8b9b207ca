"""`moiety parity`: compares the served system with plain transformers, token for token, and the text of the tokens.

The reference runs one unpadded prompt at a time. The served side runs all prompts at once, as a ragged batch with chunked
prefill, through a LocalCluster. Then the same trunk, loaded here as a router loads it, runs each whole text in one step over
the same served experts, to compare logits.

A prompt whose tokens differ is a failure, unless its first difference is a tie: the reference itself picks the served token
when its embeddings get noise of about 16 units in the last place. (Two logits, or two experts of a token in the gate,
may be so close that rounding decides.) Ties are counted and printed. Tokens after the first difference are not compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import torch

from moiety.client import Client
from moiety.compose.router import hops_of, reach_experts
from moiety.compose.router_model import load_model
from moiety.config.services import RouterSettings
from moiety.config.validate import validated
from moiety.core.expert_backend import CallClass
from moiety.core.sampling import Sampling
from moiety.local.cluster import LocalCluster
from moiety.model.architectures.supported import served_through
from moiety.model.architectures.transformers_model import causal_lm_class, load_config, quiet_transformers
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.quantised import QuantisedEntry
from moiety.model.checkpoint.reading import Reader
from moiety.model.checkpoint.tokenizer import open_tokenizer
from moiety.model.experts.cached import expert_layout
from moiety.router.sequence.sequence import Sequence as RouterSequence
from moiety.router.sequence.step_plan import Scheduled, StepPlan
from moiety.router.step_context import StepContext
from moiety.router.step_runner import StepRunner
from moiety.telemetry.tracing import NO_SPAN, NO_TRACER
from moiety.tools.parity import encoder_decoder
from moiety.tools.parity.plain_reference import PlainReference
from moiety.tools.parity.reference_text import reference_text
from moiety.wire.codec import torch_dtype

PROMPT_LENGTHS = (3, 9, 17, 40, 25, 60, 33, 8)
DEFAULT_SEED = 1  # of the prompts; with it the tiny checkpoints have no ties
NUDGE_ULPS = 16.0  # relative size of the noise on the reference's embeddings, in units in the last place
NUDGES = 8  # noise samples to try


@dataclass(frozen=True, slots=True)
class PromptResult:
    """The comparison of one prompt."""

    prompt_tokens: int
    new_tokens: int
    first_difference: int | None  # index of the first generated token that differs; None = identical
    tie: bool  # whether the reference itself is undecided at that token
    logit_error: float  # largest absolute difference over the whole text and vocabulary; NaN if any logit is NaN
    margin: float  # smallest distance between the reference's two best logits
    same_text: bool  # whether the streamed text is what transformers decodes the served tokens to

    @property
    def ok(self) -> bool:
        return self.same_text and not isnan(self.logit_error) and (self.first_difference is None or self.tie)


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The comparison of all prompts of one checkpoint."""

    architecture: str
    dtype: str
    groups: int
    prompts: tuple[PromptResult, ...]

    @property
    def ok(self) -> bool:
        return all(prompt.ok for prompt in self.prompts)

    @property
    def identical(self) -> int:
        """Number of prompts whose every token and text agree, and whose logits are numbers."""
        return sum(prompt.ok and prompt.first_difference is None for prompt in self.prompts)

    @property
    def logit_error(self) -> float:
        """The largest of all prompts; NaN if that of any prompt is NaN."""
        return max((prompt.logit_error for prompt in self.prompts), key=lambda error: (isnan(error), error))

    def lines(self) -> Iterator[str]:
        """Yields the lines of the report: a table with one line per prompt, then the verdict."""
        yield f"{'prompt':>8} {'new':>5}  tokens        max logit error   smallest margin"
        for prompt in self.prompts:
            tokens = "identical" if prompt.first_difference is None else f"differ at {prompt.first_difference}"
            tokens += " (tie)" if prompt.tie else ""
            tokens += "" if prompt.same_text else ", text differs"
            yield (
                f"{prompt.prompt_tokens:>8} {prompt.new_tokens:>5}  {tokens:<12}  {prompt.logit_error:>15.3g}"
                f"   {prompt.margin:>15.3g}"
            )
        ties = sum(prompt.tie for prompt in self.prompts)
        yield (
            f"{'PASS' if self.ok else 'FAIL'}: {self.architecture} {self.dtype}, {self.groups} expert groups: "
            f"{self.identical}/{len(self.prompts)} prompts identical, {ties} ties, max logit error {self.logit_error:.3g}"
        )


async def run_parity(
    checkpoint: str,
    *,
    groups: int = 2,
    dtype: str = "float32",
    new_tokens: int = 24,
    seed: int = DEFAULT_SEED,
    router: Mapping[str, Any] | None = None,
    references: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Compares a served checkpoint with its reference. Raises CheckpointError or ConfigError where it cannot be served.

    `references` is a Python file with a plain forward pass for each architecture that transformers lacks, as
    `plain_reference.py` describes.

    `router` are router settings that must not change any token: lanes, a transport, or a `kv_memory` too small for all
    prompts at once, so that some of them are preempted.
    """
    shape = (await asyncio.to_thread(expert_layout, Checkpoint.open(checkpoint))).shape
    prompts = _prompts(shape.vocabulary, shape.max_context - new_tokens, seed)
    progress(f"reference: {len(prompts)} prompts through plain transformers, one at a time")
    reference_dtype = torch_dtype(dtype, shape.dtype)
    reference = await asyncio.to_thread(reference_model, checkpoint, reference_dtype, references)
    texts, logits = await asyncio.to_thread(_reference, reference, prompts, new_tokens)
    progress(f"served: the same prompts at once through a LocalCluster of {groups} expert groups")
    chunked = {"slots": len(prompts), "token_budget": 3 * len(prompts), **(router or {})}
    async with LocalCluster(checkpoint, groups=groups, dtype=dtype, router=chunked) as cluster:
        async with Client(cluster.address) as client:
            served = await asyncio.gather(*(_generate(client, prompt, new_tokens) for prompt in prompts))
        progress("logits: each whole text once more over the served experts")
        settings = validated(RouterSettings, {"model": checkpoint, "dtype": dtype, **chunked})
        async with _router_here(cluster, settings) as forward:
            errors = [
                float((await asyncio.to_thread(forward, prompt, text) - expected).abs().max())
                for prompt, text, expected in zip(prompts, texts, logits, strict=True)
            ]
    tokenizer, _ = await asyncio.to_thread(open_tokenizer, checkpoint)
    results = []
    for prompt, text, (tokens, streamed), expected, error in zip(prompts, texts, served, logits, errors, strict=True):
        before = len(text) - new_tokens  # tokens of the prompt, or an encoder-decoder's decoder start
        best = expected[before - 1 : -1].topk(2).values  # [new tokens, 2]
        margins = best[:, 0] - best[:, 1]
        differ = next((i for i, (a, b) in enumerate(zip(tokens, text[before:], strict=True)) if a != b), None)
        tie = differ is not None and (
            await asyncio.to_thread(_undecided, reference, prompt, text[: before + differ], tokens[differ])
        )
        same_text = streamed == reference_text(tokenizer, text[:before], tokens)
        results.append(PromptResult(len(prompt), len(tokens), differ, tie, error, float(margins.min()), same_text))
    return ParityReport(shape.architecture, dtype, groups, tuple(results))


def _prompts(vocabulary: int, longest: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [min(length, longest) for length in PROMPT_LENGTHS]
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def _reference(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Returns two lists, both with one entry per prompt: token ids, and the reference's logits [tokens, V] after each.

    The token ids are the prompt (for an encoder-decoder, the decoder's start token) and `new_tokens` greedy tokens.
    """
    model.generation_config.eos_token_id = None  # so that every prompt gets the same number of tokens
    if encoder_decoder.is_encoder_decoder(model):
        return encoder_decoder.generate(model, prompts, new_tokens)
    texts, logits = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
        texts.append(text.tolist())
        logits.append(model(text[None]).logits[0].float())
    return texts, logits


@torch.inference_mode()
def _undecided(model: Any, prompt: Sequence[int], text: Sequence[int], token: int) -> bool:
    """Returns whether the reference continues `text` with `token` when its embeddings get noise of rounding size.

    Tries NUDGES samples of noise, of about NUDGE_ULPS units in the last place. The noise is on the embeddings of `text`; for
    an encoder-decoder, on those of `prompt`.
    """
    has_encoder = encoder_decoder.is_encoder_decoder(model)
    embeddings = model.get_input_embeddings()(torch.tensor([prompt if has_encoder else text]))
    dtype = embeddings.dtype
    for seed in range(NUDGES):
        noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        noise = 1 + NUDGE_ULPS * torch.finfo(dtype).eps * noise
        if has_encoder:
            logits = encoder_decoder.decode(model, prompt, text, noise[0])
        else:
            logits = model(inputs_embeds=embeddings * noise).logits[0]
        if int(logits[-1].argmax()) == token:
            return True
    return False


def reference_model(checkpoint: str, dtype: torch.dtype, references: Path | None) -> Any:
    """Loads the model of plain transformers or, where transformers lacks it, the plain forward pass in `references`."""
    if served_through(Checkpoint.open(checkpoint).architecture) == "definition":
        return PlainReference.load(Path(checkpoint), dtype, references)
    return _transformers_model(checkpoint, dtype)


def _transformers_model(checkpoint: str, dtype: torch.dtype) -> Any:
    """Loads the transformers model with all its experts. Its config is corrected as for the router (DBRX's, for example).

    Quantised weights are dequantised by Moiety's reader: transformers' own ways to dequantise differ.
    """
    opened = Checkpoint.open(checkpoint)
    config = load_config(opened)
    model_class: Any = causal_lm_class(opened, config)
    with quiet_transformers():
        if any(isinstance(entry, QuantisedEntry) for entry in opened.tensors.values()):
            with Reader() as reader:
                state = reader.state(opened.tensors, dtype)
            return model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()
        model = model_class.from_pretrained(checkpoint, config=config, dtype=dtype, local_files_only=True).eval()
    return encoder_decoder.correct_experts(model)


async def _generate(client: Client, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], str]:
    """Returns the generated tokens and their streamed text."""
    chunks = [chunk async for chunk in client.generate(prompt, max_tokens=new_tokens, ignore_eos=True)]
    return [token for chunk in chunks for token in chunk.token_ids], "".join(chunk.text for chunk in chunks)


@asynccontextmanager
async def _router_here(
    cluster: LocalCluster, settings: RouterSettings
) -> AsyncIterator[Callable[[Sequence[int], Sequence[int]], torch.Tensor]]:
    """Yields a function (prompt, text) that returns logits [tokens, V].

    A router with the served one's settings is built here, without an engine; the experts are those of `cluster`.
    """
    opened = Checkpoint.open(settings.model)
    layout = expert_layout(opened)
    shape, dtype = layout.shape, torch_dtype(settings.dtype, layout.shape.dtype)
    model, cache = await asyncio.to_thread(load_model, settings, opened, layout, dtype, cluster.system.revision)

    async with AsyncExitStack() as closers:
        hop, _ = await reach_experts(settings, shape, cluster.system, dtype, cluster.registry, NO_TRACER, closers)
        runner = StepRunner(model, cache, hops_of(settings, hop)[:1])

        def forward(prompt: Sequence[int], text: Sequence[int]) -> torch.Tensor:
            sequence = RouterSequence(
                request_id="logits",
                tokens=list(text),
                prompt_tokens=len(text),
                sampling=Sampling(max_tokens=1, prompt_logprobs=True),  # needs the logits of every token
                stop_ids=frozenset(),
                emit=lambda _: None,
                encoder_ids=tuple(prompt) if cache.spec.cross_attention else (),
            )
            cache.grow(sequence.table, len(sequence.tokens))
            cache.grow(sequence.cross_table, len(sequence.encoder_ids))
            step = StepContext(CallClass.PREFILL, NO_SPAN, lambda: None, lambda *_: None)
            logits = runner.run(StepPlan((Scheduled.of(sequence, len(text)),)), step)
            cache.release(sequence.table)
            cache.release(sequence.cross_table)
            return logits.float()

        yield forward

"""Runs: seeded, resumable, and what is published of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from moiety.errors import FailedPrecondition
from moiety.training import train as training
from moiety.training.ablation import RUNS
from moiety.training.corpus import DOMAINS, Corpus, documents, held_out, pieces
from moiety.training.measure import compare
from moiety.training.publish import publish
from moiety.training.train import RECORD, Plan, train, trained
from support.small_training import SMALL

PLAN = Plan(sizes=SMALL, steps=8, rows=4, length=32, noise=1.0, capacity=1.5)


def quiet(_: str) -> None:
    """Says nothing."""


class Interrupted(Exception):
    """The run ends here."""


def test_an_interrupted_run_ends_as_one_that_was_not(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is ended twice and goes on has the weights and the record of one that ran through."""
    corpus = Corpus(work / "tokens")
    whole = train(PLAN, corpus, tmp_path / "whole", quiet)
    monkeypatch.setattr(training, "SAVE_S", 0.0)  # after each step
    for last in (2, 5):

        def batch(*arguments: int, last: int = last) -> tuple[torch.Tensor, torch.Tensor]:
            if arguments[1] > last:
                raise Interrupted
            return corpus.batch(*arguments)

        stopping = Corpus(work / "tokens")
        monkeypatch.setattr(stopping, "batch", batch)
        with pytest.raises(Interrupted):
            train(PLAN, stopping, tmp_path / "parts", quiet)
    parts = train(PLAN, corpus, tmp_path / "parts", quiet)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, msg=name)
    lines = (tmp_path / "parts" / RECORD).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(PLAN.steps))


def test_a_folder_holds_one_plan(work: Path, tmp_path: Path) -> None:
    """A run of another plan in the same folder is refused, and a run that has not ended is not published."""
    corpus = Corpus(work / "tokens")
    train(replace(PLAN, steps=1), corpus, tmp_path, quiet)
    with pytest.raises(FailedPrecondition, match="run of another plan"):
        train(PLAN, corpus, tmp_path, quiet)
    with pytest.raises(FailedPrecondition, match="1 of 8 steps are done"):
        trained(PLAN, tmp_path)


def test_the_published_model_is_the_trained_one(work: Path, tmp_path: Path) -> None:
    """Plain transformers reads the folder, and computes the trained model's logits within the error of bfloat16."""
    model = train(PLAN, Corpus(work / "tokens"), tmp_path / "main", quiet)
    publish(model, PLAN.sizes, work / "tokenizer", tmp_path / "checkpoint")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=0.05, atol=0.02)


def test_the_report_has_every_domain_and_layer(work: Path, tmp_path: Path) -> None:
    """Perplexities of model and twin by domain, and each layer's most special expert, with pictures."""
    (tmp_path / "tokens").symlink_to(work / "tokens")
    twin = replace(PLAN, sizes=replace(SMALL, experts=0), capacity=None)
    for plan, name in ((PLAN, "main"), (twin, "twin")):
        train(plan, Corpus(work / "tokens"), tmp_path / name, quiet)
    report = compare(tmp_path, PLAN, twin)
    assert all(f"| {domain} |" in report for domain in (*DOMAINS, "all"))
    assert report.count("\n| 0 |") == report.count("\n| 1 |") == 1
    assert {file.name for file in tmp_path.glob("*.png")} == {"losses.png", "specialisation.png", "use.png"}


def test_what_is_held_out_is_not_learned(work: Path) -> None:
    """A piece is in one of the two parts, and each document ends with the end token."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    corpus = Corpus(work / "tokens")
    learned = [
        piece for document in documents(work / "texts", "german") for piece in pieces(document) if not held_out(piece)
    ]
    assert corpus.sizes()["german"] == sum(len(tokenizer.encode(piece).ids) for piece in learned) + sum(
        not held_out(list(pieces(document))[-1]) for document in documents(work / "texts", "german")
    )


def test_batches_depend_on_seed_and_step_only(work: Path) -> None:
    """The same step gives the same batch, another one another; a row is of the domain that is named for it."""
    first, second = Corpus(work / "tokens"), Corpus(work / "tokens")
    ids, domains = first.batch(1, 5, 12, 16)
    again, _ = second.batch(1, 5, 12, 16)
    assert torch.equal(ids, again)
    assert not torch.equal(ids, second.batch(1, 6, 12, 16)[0])
    assert ids.shape == (12, 17)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    for row, domain in zip(ids.tolist(), domains.tolist(), strict=True):
        assert DOMAINS[domain][:4] in tokenizer.decode(row)


def test_each_ablation_trains_another_model() -> None:
    """No two runs have the same plan: each leaves out, or adds, a piece that the others have."""
    assert len({plan for _, plan in RUNS.values()}) == len(RUNS)

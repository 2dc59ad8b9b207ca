"""The commands that make the example model, from its texts to its checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from moiety.training.ablation import ablate
from moiety.training.attribution import text_sizes, write_sources
from moiety.training.corpus import Corpus, encode
from moiety.training.fetch import fetch
from moiety.training.measure import compare
from moiety.training.publish import publish
from moiety.training.tokenizer import train_tokenizer
from moiety.training.train import Plan, train, trained

MAIN = Plan()
TWIN = replace(MAIN, sizes=replace(MAIN.sizes, experts=0))
folder_argument = click.argument("folder", type=click.Path(file_okay=False, path_type=Path))


@click.group()
def main() -> None:
    """Make the example model. Each command takes the FOLDER that the others worked in, and goes on where it ended.

    \b
    Example, about five hours on two cores:
      python -m moiety.training fetch work
      python -m moiety.training prepare work
      python -m moiety.training train work
      python -m moiety.training train work --twin
      python -m moiety.training measure work
      python -m moiety.training ablate work
      python -m moiety.training publish work
    """


@main.command("fetch")
@folder_argument
def fetch_texts(folder: Path) -> None:
    """Fetch the packages that hold the texts, clean these, and write whose they are to SOURCES.md."""
    fetch(folder, click.echo)
    write_sources(folder, text_sizes(folder / "texts"))


@main.command()
@folder_argument
def prepare(folder: Path) -> None:
    """Train the tokenizer on the texts, and write them as tokens."""
    tokenizer = train_tokenizer(folder / "texts", folder / "tokenizer")
    for domain, sizes in encode(folder / "texts", tokenizer, folder / "tokens").items():
        click.echo(f"{domain:8} {sizes['train']:>12,} tokens to learn, {sizes['heldout']:>9,} held out")


@main.command("train")
@folder_argument
@click.option("--twin", is_flag=True, help="The dense model with as many active parameters, on the same batches.")
def train_model(folder: Path, twin: bool) -> None:
    """Train the model. An interrupted run goes on from its latest state, at most five minutes old."""
    train(TWIN if twin else MAIN, Corpus(folder / "tokens"), folder / ("twin" if twin else "main"), click.echo)


@main.command("measure")
@folder_argument
def measure_model(folder: Path) -> None:
    """Measure the model and its twin on what is held out: tables, and pictures of what the experts are for."""
    click.echo(compare(folder, MAIN, TWIN))


@main.command("ablate")
@folder_argument
def ablate_model(folder: Path) -> None:
    """Show what each piece of the training is for, by short runs of a smaller model without it."""
    click.echo(ablate(Corpus(folder / "tokens"), folder / "ablations", click.echo))


@main.command("publish")
@folder_argument
def publish_model(folder: Path) -> None:
    """Write the model to FOLDER/checkpoint, in the published layout of Qwen3-MoE."""
    model = trained(MAIN, folder / "main")
    publish(model, MAIN.sizes, folder / "tokenizer", folder / "checkpoint")
    click.echo(f"{folder / 'checkpoint'}: `moiety serve {folder / 'checkpoint'}` serves it")


if __name__ == "__main__":
    main()

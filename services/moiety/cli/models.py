"""`moiety models`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.options import json_option, write_json


@click.command()
@json_option
def models(json_file: Path | None) -> None:
    """List the architectures that can be served, and what each uses.

    PATH says how its experts are reached: through transformers' experts interface (seam), through an adapter of Moiety's
    around transformers' model, or in a definition of Moiety's own. Below them stand the refused, with the reason.

    \b
    Example:
      moiety models
    """
    from moiety.model.architectures.supported import REFUSED
    from moiety.tools.models import lines, supported

    found = list(supported())
    for line in lines(found):
        click.echo(line)
    write_json(json_file, {"supported": [asdict(one) for one in found], "refused": dict(REFUSED)})

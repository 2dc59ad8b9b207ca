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

    Shows each architecture's gating and kinds of cache. The column "path" says how Moiety reaches the experts: through
    transformers' experts interface (seam), through its own adapter around the transformers model (adapter), or in its own
    definition of the model (definition). Refused architectures follow, each with the reason.

    \b
    Example:
      moiety models
    """
    from moiety.model.architectures.supported import REFUSED
    from moiety.tools.models import lines, supported

    architectures = list(supported())
    for line in lines(architectures):
        click.echo(line)
    write_json(json_file, {"supported": [asdict(one) for one in architectures], "refused": dict(REFUSED)})

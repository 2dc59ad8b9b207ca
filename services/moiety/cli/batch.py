"""`moiety batch`."""

from __future__ import annotations

from pathlib import Path

import click

from moiety.cli.options import api_key_option
from moiety.cli.run import Interrupted, progress, run_async
from moiety.config.options import DEFAULT_HTTP_PORT

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("input_file", metavar="INPUT", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("output_file", metavar="OUTPUT", type=_FILE)
@click.option(
    "--errors",
    "errors_file",
    type=_FILE,
    help="File for requests that failed.  [default: OUTPUT with .errors.jsonl instead of its ending]",
)
@click.option(
    "--url",
    envvar="MOIETY_URL",
    show_envvar=True,
    default=f"http://127.0.0.1:{DEFAULT_HTTP_PORT}",
    help="Address of a running server that speaks OpenAI's API, with or without /v1.",
)
@api_key_option
@click.option("--concurrency", type=click.IntRange(1, 65536), default=32, help="Requests at once.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    help="Seconds for one request.",
)
@click.option(
    "--patience",
    "patience_s",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=600.0,
    help="How long a request is sent again to a server that is busy (429, 502, 503) or away.",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=2,
    help="How often it is sent again after the server failed (408, 500, 504) or broke the connection.",
)
@click.option("--retry-failed", is_flag=True, help="Send what an earlier run has in the file of errors again.")
@click.pass_context
def batch(
    context: click.Context,
    /,
    input_file: Path,
    output_file: Path,
    errors_file: Path | None,
    url: str,
    api_key: str | None,
    concurrency: int,
    timeout_s: float,
    patience_s: float,
    retries: int,
    retry_failed: bool,
) -> None:
    """Send a file of requests to a running server and write the answers, in OpenAI's batch format.

    INPUT has one request a line: custom_id, method, url and body. All lines are checked before anything is sent. OUTPUT
    gets a line for each answer when it arrives, in the order of arrival; the file of errors gets one for each request that
    failed.

    The same command goes on where an earlier run stopped, whatever ended it: requests with a result are skipped. A busy
    server is asked again after the delay that it names. If the server is away for longer than --patience, the run ends, and
    the rest stays unsent. Exit status 1 if a request failed.

    \b
    Lines of INPUT and OUTPUT:
      {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Each expert", "max_tokens": 8}}
      {"id": "batch_req_…", "custom_id": "a", "response": {"status_code": 200, "request_id": "…", "body": {…}}, "error": null}

    \b
    Examples:
      moiety batch requests.jsonl answers.jsonl
      moiety batch requests.jsonl answers.jsonl --url http://10.0.0.7:8000/v1 --concurrency 256
      moiety batch requests.jsonl answers.jsonl --retry-failed
    """
    from moiety.tools.batch.answer import Patience
    from moiety.tools.batch.batch import BatchRun, BatchWork

    work = BatchWork(
        input_file,
        output_file,
        errors_file or output_file.with_name(f"{output_file.stem}.errors.jsonl"),
        url,
        concurrency=concurrency,
        timeout_s=timeout_s,
        patience=Patience(patience_s, retries),
        retry_failed=retry_failed,
    )
    run = BatchRun(work, api_key, progress=progress())
    try:
        run_async(run.run())
    except Interrupted:
        if run.counts.total:
            click.echo(f"{run.state()}; the same command goes on from here", err=True)
        raise
    counts = run.counts
    click.echo(f"{counts.done} done: {work.output}")
    if counts.failed:
        click.echo(f"{counts.failed} failed: {work.errors}; --retry-failed sends them again")
    context.exit(1 if counts.failed else 0)

"""`moiety batch`."""

from __future__ import annotations

from pathlib import Path

import click

from moiety.cli.arguments import FiniteRange, OutputFile
from moiety.cli.local_system import http_url
from moiety.cli.options import (
    ModelName,
    api_key_option,
    check_first,
    dtype_option,
    groups_option,
    local_model,
    request_timeout_option,
    revision_option,
)
from moiety.cli.run import Interrupted, progress, run_async
from moiety.config.options import DEFAULT_HTTP_PORT

DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_HTTP_PORT}"


@click.command()
@click.argument("input_file", metavar="INPUT", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("output_file", metavar="OUTPUT", type=OutputFile())
@click.option(
    "--errors",
    "errors_file",
    type=OutputFile(),
    help="File for requests that failed.  [default: OUTPUT with .errors.jsonl instead of its ending]",
)
@click.option(
    "--url",
    envvar="MOIETY_URL",
    show_envvar=True,
    help="Address of a running server that speaks OpenAI's API, with or without /v1.  "
    f"[default: that of the system on this machine, else {DEFAULT_URL}]",
)
@click.option("--app", help="Application, or pid, of the system, where several run on this machine.")
@click.option(
    "--model", type=ModelName(), help="Instead of --url: folder or Hugging Face id to serve here while the batch runs."
)
@revision_option
@groups_option
@dtype_option("auto")
@click.option(
    "--skip-tokenizer",
    is_flag=True,
    help="With --model: prompts and outputs are token ids only, and the checkpoint needs no tokenizer.",
)
@api_key_option
@click.option("--concurrency", type=click.IntRange(1, 65536), default=32, help="Requests at once.")
@request_timeout_option
@click.option(
    "--patience",
    "patience_s",
    metavar="SECONDS",
    type=FiniteRange(min=0),
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
    url: str | None,
    app: str | None,
    model: str | None,
    hub_revision: str | None,
    groups: int,
    dtype: str,
    skip_tokenizer: bool,
    api_key: str | None,
    concurrency: int,
    timeout_s: float,
    patience_s: float,
    retries: int,
    retry_failed: bool,
) -> None:
    """Send a file of requests to a server and write the answers, in OpenAI's batch format.

    INPUT has one request a line: custom_id, method, url and body. All lines are checked before anything is sent. OUTPUT
    gets a line for each answer when it arrives, in the order of arrival; the file of errors gets one for each request that
    failed.

    The same command goes on where an earlier run stopped, whatever ended it: requests with a result are skipped. A busy
    server is asked again after the delay that it names. If the server is away for longer than --patience, the run ends, and
    the rest stays unsent. Exit status 1 if a request failed.

    With --model, the command serves the checkpoint itself, by processes of this machine that end with it; --groups,
    --dtype and --skip-tokenizer are about these. The model's name in a body, where there is one, is then the id, or the
    folder's name.

    \b
    Lines of INPUT and OUTPUT:
      {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Each expert", "max_tokens": 8}}
      {"id": "batch_req_…", "custom_id": "a", "response": {"status_code": 200, "request_id": "…", "body": {…}}, "error": null}

    \b
    Examples:
      moiety batch requests.jsonl answers.jsonl
      moiety batch requests.jsonl answers.jsonl --url http://10.0.0.7:8000/v1 --concurrency 256
      moiety batch requests.jsonl answers.jsonl --retry-failed
      moiety batch requests.jsonl answers.jsonl --model Qwen/Qwen3-30B-A3B --groups 4
    """
    if model is not None:
        if context.get_parameter_source("url") is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError("--url and --model exclude each other")
        folder = local_model(model, hub_revision)
        check_first(folder, groups=groups)
    elif hub_revision is not None or skip_tokenizer:
        raise click.UsageError(f"{'--skip-tokenizer' if skip_tokenizer else '--revision'} needs --model")
    from moiety.tools.batch.answer import Patience
    from moiety.tools.batch.batch import BatchRun, BatchWork
    from moiety.tools.batch.server import local_server, running_server

    show = progress()
    if model is None:
        server = running_server(http_url(url, app, DEFAULT_URL))
    else:
        name = "" if Path(model).is_dir() else model  # the folder of an id is named after a commit
        gateway = {"served_name": name, "skip_tokenizer": skip_tokenizer}
        server = local_server(folder, gateway, say=show, groups=groups, dtype=dtype)
    work = BatchWork(
        input_file,
        output_file,
        errors_file or output_file.with_name(f"{output_file.stem}.errors.jsonl"),
        server,
        concurrency=concurrency,
        timeout_s=timeout_s,
        patience=Patience(patience_s, retries),
        retry_failed=retry_failed,
    )
    run = BatchRun(work, api_key, progress=show)
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

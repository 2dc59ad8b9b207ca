"""lm-eval's `local-completions`, run as a program on a task of our own, without network."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conformance_support import ServedApi

from moiety.client import Client
from moiety.gateway.text.tokenizer import Tokenizer
from support.serving import Served

TASKS = Path(__file__).parent / "lm_eval_tasks"
PROGRAM_S = 400.0  # ten times what a quiet machine takes

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the package lm-eval: make conformance"
)


@pytest.fixture(scope="module")
def samples(api: ServedApi, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval logged for each of its tasks: prompts, answers and scores."""
    out = tmp_path_factory.mktemp("lm_eval")
    model = f"model={api.model},base_url={api.url}/completions,tokenizer={api.folder},max_length=512,num_concurrent=2"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model]
    command += ["--tasks", "moiety_sums_choice,moiety_sums_text", "--include_path", str(TASKS), "--batch_size", "2"]
    command += ["--output_path", str(out), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "cache")}
    ran = subprocess.run(
        command, cwd=TASKS, env={**os.environ, **offline}, capture_output=True, text=True, timeout=PROGRAM_S
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = {}
    for task in ("moiety_sums_choice", "moiety_sums_text"):
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        found[task] = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return found


@pytest.mark.slow
@pytest.mark.timeout(PROGRAM_S + 60)
def test_log_likelihoods_are_the_engines_own(
    chat_served: Served, api: ServedApi, samples: dict[str, list[dict[str, Any]]]
):
    """The log-likelihood of each choice is the sum of the prompt's log probabilities that gRPC gives for its tokens.

    Over 20 s on two cores: lm-eval starts torch.
    """
    tokenizer = Tokenizer(api.folder)

    async def scenario(client: Client) -> None:
        seen = 0
        for sample in samples["moiety_sums_choice"]:
            for place, (response,) in enumerate(sample["resps"]):
                arguments = sample["arguments"][f"gen_args_{place}"]
                before, choice = arguments["arg_0"], arguments["arg_1"]
                ids, context = tokenizer.encode(before + choice), tokenizer.encode(before)
                options = {"max_tokens": 1, "logprobs": True, "prompt_logprobs": True, "temperature": 0.0}
                chunks = [chunk async for chunk in client.generate(ids, **options)]
                logprobs = [value for chunk in chunks for value in chunk.prompt_logprobs]
                assert float(response[0]) == pytest.approx(sum(logprobs[len(context) - 1 :]), abs=1e-3)
                seen += 1
        assert seen == 9

    chat_served.run(scenario)


@pytest.mark.slow
@pytest.mark.timeout(PROGRAM_S + 60)
def test_generated_text_is_that_of_grpc(chat_served: Served, samples: dict[str, list[dict[str, Any]]]):
    """`generate_until` gets the greedy text up to the stop string.

    Over 20 s on two cores: lm-eval starts torch.
    """

    async def scenario(client: Client) -> None:
        assert len(samples["moiety_sums_text"]) == 4
        for sample in samples["moiety_sums_text"]:
            stream = client.generate(sample["arguments"]["gen_args_0"]["arg_0"], max_tokens=24, stop=["e"])
            assert sample["resps"] == [["".join([chunk.text async for chunk in stream])]]

    chat_served.run(scenario)

"""The parts of `moiety bench load` without a server: arrivals, lengths, files, goodput, and reports from given records."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from statistics import mean, stdev

import pytest

from moiety.bench.load.arrivals import ARRIVALS, arrival_times
from moiety.bench.load.files import read_dataset, read_trace
from moiety.bench.load.goodput import Target, meets, targets
from moiety.bench.load.own_delay import OwnDelay
from moiety.bench.load.prompts import Plan, trace_prompt
from moiety.bench.load.record import CUT_OFF, ERROR_EVENT, Record
from moiety.bench.load.report import load_lines, report_of
from moiety.bench.load.work import Length, LoadWork
from moiety.client.http.server import BROKEN, RequestFailed, TimedEvent
from moiety.client.http.sse import SseEvent
from moiety.errors import InvalidRequest

NO_DELAY = OwnDelay(0.0, 0.0, 0.0, 0.1)


def event(at: float, chunk: object) -> TimedEvent:
    """Returns an event that was read at `at`, with `chunk` as JSON unless it is text."""
    return TimedEvent(at, SseEvent(chunk if isinstance(chunk, str) else json.dumps(chunk)))


def text(at: float, finish: str | None = None) -> TimedEvent:
    """Returns an event with a token's text."""
    return event(at, {"choices": [{"text": "x", "finish_reason": finish}]})


def served(sent: float, *outputs: float, tokens: int | None = None) -> Record:
    """Returns the record of a request that was due and sent at `sent` and got a chunk at each of `outputs`."""
    record = Record(sent, sent)
    for at in outputs:
        record.read(text(at))
    if tokens is not None:
        record.read(event(outputs[-1], {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}}))
    record.read(event(outputs[-1], "[DONE]"))
    record.end(outputs[-1])
    return record


@pytest.mark.parametrize(
    ("arrivals", "burstiness", "variation"),
    [("poisson", 1.0, 1.0), ("constant", 1.0, 0.0), ("gamma", 0.25, 2.0), ("gamma", 4.0, 0.5), ("gamma", 1.0, 1.0)],
)
def test_arrivals(arrivals: str, burstiness: float, variation: float) -> None:
    """Arrivals come at the wanted rate, in order, and their intervals vary as that kind does: gamma's by 1/√shape."""
    times = list(islice(arrival_times(arrivals, 50.0, burstiness, Random(1)), 20_000))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert min(gaps) >= 0
    assert mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert stdev(gaps) * 50 == pytest.approx(variation, rel=0.05, abs=1e-6)


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_a_seed_repeats_arrivals(arrivals: str) -> None:
    """The same seed gives the same arrivals; another one gives others, unless they are constant."""
    first, again, other = (list(islice(arrival_times(arrivals, 5.0, 1.0, Random(seed)), 50)) for seed in (1, 1, 2))
    assert first == again
    assert (first == other) == (arrivals == "constant")


def test_lengths() -> None:
    """A length is fixed or drawn from its bounds, both included, and reads and shows alike."""
    for written in ("7", "3:5"):
        assert str(Length.parse(written)) == written
    assert {Length.parse("3:5").draw(Random(seed)) for seed in range(50)} == {3, 4, 5}
    for wrong in ("0", "5:3", "x", "1:2:3", "-1", "3:", "9999999999"):
        with pytest.raises(InvalidRequest, match="NUMBER or LO:HI"):
            Length.parse(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of --rate, --concurrency and --trace"),
        ({"rate": 1.0, "concurrency": 2}, "'--rate and --concurrency'"),
        ({"concurrency": 1, "arrivals": "constant"}, "left out with --concurrency"),
        ({"rate": 1.0, "burstiness": 2.0}, "given with --arrivals gamma"),
        ({"rate": 1.0, "speed": 2.0}, "given with --trace"),
        ({"trace": Path("t"), "dataset": Path("d")}, "left out with --trace"),
    ],
)
def test_options_that_contradict_each_other(options: dict, message: str) -> None:
    """Options that do not go together are refused by name."""
    with pytest.raises(InvalidRequest, match=message):
        LoadWork("http://h", **options)


def test_synthetic_requests() -> None:
    """Requests have drawn lengths, prompts of so many words that all differ, and are the same again with the same seed."""
    work = LoadWork(
        "http://h", rate=10.0, requests=20, input_tokens=Length(5, 9), output_tokens=Length(2, 4), ignore_eos=True
    )
    plan = Plan(work, "m")
    planned = list(plan.requests())
    assert planned == list(Plan(work, "m").requests())
    assert len({request.body["prompt"] for request in planned}) == len(planned) == 20
    assert {len(request.body["prompt"].split()) for request in planned} == {5, 6, 7, 8, 9}
    assert {request.body["max_tokens"] for request in planned} == {2, 3, 4}
    assert all(request.body["ignore_eos"] and request.body["stream_options"]["include_usage"] for request in planned)
    assert not {request.body["prompt"] for request in plan.warmup()} & {request.body["prompt"] for request in planned}


def test_seconds_bound_arrivals() -> None:
    """With `seconds`, requests arrive until then, at their rate."""
    planned = list(Plan(LoadWork("http://h", rate=10.0, seconds=3.0, arrivals="constant"), "m").requests())
    assert [round(request.at_s, 6) for request in planned] == [number / 10 for number in range(30)]


def test_trace(tmp_path: Path) -> None:
    """A trace gives times from its first request, by its speed, and lengths; equal hash ids are equal beginnings."""
    file = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 5000, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]},
        {"timestamp": 7000, "input_length": 700, "output_length": 4, "hash_ids": [1, 3]},
        {"timestamp": 7000, "input_length": 4, "output_length": 5},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    entries = read_trace(file, speed=2.0)
    assert [entry.at_s for entry in entries] == [0.0, 1.0, 1.0]
    prompts = [trace_prompt(entry, 0, number).split() for number, entry in enumerate(entries)]
    assert [len(prompt) for prompt in prompts] == [600, 700, 4]
    assert prompts[0][:512] == prompts[1][:512]
    assert prompts[0][512:] != prompts[1][512:600]
    planned = list(Plan(LoadWork("http://h", trace=file, speed=2.0, endpoint="chat"), "m").requests())
    assert [request.body["max_tokens"] for request in planned] == [3, 4, 5]
    assert planned[2].body["messages"] == [{"role": "user", "content": " ".join(prompts[2])}]
    assert len(list(Plan(LoadWork("http://h", trace=file, seconds=1.0), "m").requests())) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", r"line 2 = '\[1\]': must be a JSON object"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}', "line 2: timestamp = 1: .* line before"),
        ('{"timestamp": 9, "input_length": 0, "output_length": 1}', "line 2: input_length = 0"),
        ('{"timestamp": 9, "input_length": 1}', "line 2: output_length = null"),
        ('{"timestamp": 9, "input_length": 1, "output_length": 1, "hash_ids": ["x"]}', "line 2: hash_ids"),
    ],
)
def test_wrong_lines_of_a_trace(tmp_path: Path, line: str, message: str) -> None:
    """A wrong line of a trace is named by number and field."""
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 5, "input_length": 1, "output_length": 1}\n' + line)
    with pytest.raises(InvalidRequest, match=message):
        read_trace(file)


def test_dataset(tmp_path: Path) -> None:
    """A dataset has texts, token ids or messages; a text is a message of chat, and messages need chat."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": [1, 2]}\n')
    assert read_dataset(file, "completions") == ["a", [1, 2]]
    with pytest.raises(InvalidRequest, match=r"line 2: prompt = \[1, 2\]"):
        read_dataset(file, "chat")
    repeated = list(Plan(LoadWork("http://h", concurrency=1, requests=3, dataset=file), "m").requests())
    assert [request.body["prompt"] for request in repeated] == ["a", [1, 2], "a"]
    file.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    assert [messages[-1]["content"] for messages in read_dataset(file, "chat")] == ["a", "b"]
    with pytest.raises(InvalidRequest, match=r"line 2: messages = .* need --endpoint chat"):
        read_dataset(file, "completions")


def test_goodput_targets() -> None:
    """Targets are read with their units, and a wrong one is named with the measures that there are."""
    assert targets("ttft:500ms,itl:0.05s") == (Target("ttft", 500.0), Target("itl", 50.0))
    assert ",".join(map(str, targets("ttft:1.5s,e2e:2ms"))) == "ttft:1500ms,e2e:2ms"
    for wrong in ("ttft", "ttft:5", "speed:5ms", "ttft:5ms,ttft:6ms", ""):
        with pytest.raises(InvalidRequest, match="measures: ttft, itl, tpot, e2e"):
            targets(wrong)


def test_what_meets_targets() -> None:
    """A request meets its targets if every measure is within; a measure that it lacks is met."""
    wanted = targets("ttft:100ms,itl:20ms")
    assert meets({"ttft": 100.0, "itl": 20.0, "tpot": 99.0, "e2e": 999.0}, wanted)
    assert meets({"ttft": 100.0, "itl": None, "tpot": None, "e2e": 100.0}, wanted)
    assert not meets({"ttft": 100.1, "itl": 20.0, "tpot": 1.0, "e2e": 1.0}, wanted)
    assert not meets({"ttft": 1.0, "itl": 20.1, "tpot": 1.0, "e2e": 1.0}, wanted)


def test_measures_of_a_request() -> None:
    """Times count from sending; the gap is between chunks, and the time per token goes by the server's count of tokens."""
    record = served(10.0, 10.5, 10.6, 10.9, tokens=5)
    measured = record.measures()
    assert measured == pytest.approx({"ttft": 500.0, "itl": 300.0, "tpot": 100.0, "e2e": 900.0})
    assert (record.prompt_tokens, record.output_tokens, record.chunks) == (5, 5, 3)
    alone = served(10.0, 10.5)
    assert alone.measures() == pytest.approx({"ttft": 500.0, "itl": None, "tpot": None, "e2e": 500.0})
    assert (alone.output_tokens, alone.counted) == (1, False)


@pytest.mark.parametrize("name", ["content", "reasoning_content", "reasoning", "tool_calls"])
def test_the_first_output_of_a_chat(name: str) -> None:
    """A chat's first output is the first text, reasoning or tool call; the chunk with the role is none."""
    record = Record(0.0)
    record.read(event(1.0, {"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
    record.read(event(2.0, {"choices": [{"delta": {name: "x"}}]}))
    record.read(event(3.0, {"choices": [{"delta": {}, "finish_reason": "stop"}]}))
    record.end(3.0)
    assert (record.first, record.chunks, record.ok) == (2.0, 1, True)


@pytest.mark.parametrize(
    ("chunk", "kind"),
    [
        ("{", BROKEN),
        ("7", BROKEN),
        ({"choices": [7]}, BROKEN),
        ({"choices": 7}, BROKEN),
        ({"choices": [{"delta": 7}]}, BROKEN),
        ({"error": {"message": "no room"}}, ERROR_EVENT),
    ],
)
def test_wrong_events(chunk: object, kind: str) -> None:
    """An event that reports an error, or that is not of OpenAI's API, makes the request a failure of its kind."""
    with pytest.raises(RequestFailed) as failed:
        Record(0.0).read(event(1.0, chunk))
    assert failed.value.kind == kind


def test_a_stream_that_ends_early() -> None:
    """A stream without [DONE] and without a finish reason has not answered."""
    record = Record(0.0)
    record.read(text(1.0))
    with pytest.raises(RequestFailed) as failed:
        record.end(2.0)
    assert failed.value.kind == CUT_OFF


def test_report() -> None:
    """Rates, spreads, failures by kind and goodput follow from the records; what was not sent counts as missed."""
    records = [served(10.0 + second, 10.5 + second, 10.6 + second, tokens=3) for second in range(4)]
    slow, broken, running = served(14.0, 16.0, 18.0, tokens=3), Record(15.0, 15.0), Record(16.0, 16.0)
    broken.fail(17.0, RequestFailed("HTTP 429", "full", status=429))
    report = report_of(
        targets("ttft:1s,itl:200ms"),
        [*records, slow, broken, running],
        began=10.0,
        until=20.0,
        last_due=17.0,
        not_sent=1,
        peak_in_flight=2,
        own_delay=NO_DELAY,
    )
    assert (report.offered, report.ok, report.failed, report.not_sent, report.unfinished) == (8, 5, 1, 1, 1)
    assert (report.offered_per_s, report.ok_per_s, report.output_tokens_per_s) == pytest.approx((1.0, 0.5, 1.5))
    assert (report.tokens_per_chunk, report.uncounted, report.empty) == (1.5, 0, 0)
    assert report.goodput is not None
    assert (report.goodput.fraction, report.goodput.per_s) == pytest.approx((0.5, 0.4))
    ttft = report.spreads["ttft"]
    assert (ttft.samples, ttft.mean, ttft.p50, ttft.max) == pytest.approx((5, 800.0, 500.0, 2000.0))
    assert report.spreads["itl"].p50 == pytest.approx(100.0)
    assert report.failures["HTTP 429"].count == 1
    shown = "\n".join(load_lines(report))
    for expected in (
        "8 offered at 1.00/s; 5 ok, 1 failed, 1 not sent, 1 unfinished",
        "1 x HTTP 429",
        "0.500 of the requests",
    ):
        assert expected in shown
    assert "WARNING" not in shown


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (OwnDelay(12.0, 30.0, 1.0, 0.1), "it sent 1 % of the requests at least 12 ms late"),
        (OwnDelay(None, None, 25.0, 0.1), "1 % of what it was to do was at least 25 ms late"),
        (OwnDelay(1.0, 1.0, 1.0, 0.97), "it used 97 % of the one core that it can use"),
    ],
)
def test_a_slow_generator_says_so(own: OwnDelay, reason: str) -> None:
    """A report warns where the generator's own delays distort it, and says which."""
    report = report_of(
        (), [served(0.0, 1.0)], began=0.0, until=1.0, last_due=None, not_sent=0, peak_in_flight=1, own_delay=own
    )
    assert report.offered_per_s is None
    assert any(line.startswith("WARNING") and reason in line for line in load_lines(report))

"""The files of `moiety batch`: lines of the input, and results of earlier runs."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from moiety.errors import FailedPrecondition, InvalidRequest
from moiety.tools.batch.lines import check_input, key_of, read_lines
from moiety.tools.batch.results import ResultFile

LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}


def result(custom_id: str) -> dict:
    """Returns a line of results."""
    return {"id": "batch_req_0", "custom_id": custom_id, "response": None, "error": {"code": "x", "message": "y"}}


def test_lines_are_read(tmp_path: Path) -> None:
    """Lines keep their numbers in the file; empty lines, other line ends and a byte order mark are no matter."""
    file = tmp_path / "in.jsonl"
    second = LINE | {"custom_id": "ü", "url": "/v1/completions"}
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(LINE).encode() + b"\r\n\n" + json.dumps(second).encode())
    assert [(line.number, line.custom_id, line.url) for line in read_lines(file)] == [
        (1, "a", "/v1/chat/completions"),
        (3, "ü", "/v1/completions"),
    ]
    assert check_input(file) == {key_of("a"), key_of("ü")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"line 2 = '\{': must be a JSON object"),
        ("[]", r"line 2 = '\[\]': must be a JSON object"),
        ("\udcff", "line 2 = .*: must be a JSON object"),
        (json.dumps(LINE | {"custom_id": 7}), "line 2: custom_id = 7"),
        (json.dumps(LINE | {"custom_id": ""}), "line 2: custom_id = ''"),
        (json.dumps(LINE | {"method": "GET"}), "line 2: method = 'GET': must be \"POST\""),
        (json.dumps(LINE | {"url": "http://elsewhere/v1/x"}), "line 2: url = "),
        (json.dumps(LINE | {"url": "/v1/../admin"}), "line 2: url = "),
        (json.dumps(LINE | {"body": "x"}), "line 2: body = 'x'"),
        (json.dumps(LINE | {"body": {"stream": True}}), r"line 2: body\.stream = true"),
        (json.dumps(LINE), "line 2: custom_id = 'a': must be unique, but line 1 has it too"),
    ],
)
def test_wrong_lines(tmp_path: Path, text: str, message: str) -> None:
    """A wrong line is named by number and field, and a second custom_id with both its lines."""
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps(LINE) + "\n" + text, errors="surrogateescape")
    with pytest.raises(InvalidRequest, match=message):
        check_input(file)


def test_an_empty_input(tmp_path: Path) -> None:
    """A file without a request is refused."""
    file = tmp_path / "in.jsonl"
    file.write_text("\n")
    with pytest.raises(InvalidRequest, match="at least one request"):
        check_input(file)


def test_results_are_found_again(tmp_path: Path) -> None:
    """What was appended is found again, after a line that was cut off anywhere has been dropped."""
    file = tmp_path / "out.jsonl"
    with ResultFile(file) as results:
        results.append(result("a"))
        results.append(result("b\n"))
    whole = file.read_bytes()
    torn = json.dumps(result("c")).encode()
    for size in range(len(torn) + 1):
        file.write_bytes(whole + torn[:size])
        with ResultFile(file) as results:
            assert [found[:2] for found in results.recover()] == [(1, "a"), (2, "b\n")]
            results.append(result("d"))
            assert [custom_id for _, custom_id, _ in results.recover()] == ["a", "b\n", "d"]


@pytest.mark.parametrize("text", ["notes\n", "notes", '{"custom_id": "a"}\n', '{"id": "x", "custom', "7\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, text: str) -> None:
    """A file that holds something else is refused, and stays as it is."""
    file = tmp_path / "notes.txt"
    file.write_text(text)
    with ResultFile(file) as results, pytest.raises(InvalidRequest, match=r"line 1 = .* the file was not changed"):
        list(results.recover())
    assert file.read_text() == text


def test_two_runs_of_one_file(tmp_path: Path) -> None:
    """A second run of a file is refused while the first one has it."""
    file = tmp_path / "out.jsonl"
    with ResultFile(file), pytest.raises(FailedPrecondition, match="another run writes to it"):
        ResultFile(file)
    with ResultFile(file):
        pass


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """Where a line does not fit, as on a full disk, the error names the file, and no part of the line remains."""
    file = tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ResultFile(file) as results:
        results.append(result("a" * 1_000_000))
        whole = file.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, limits[1]))
        try:
            with pytest.raises(FailedPrecondition, match=str(file)):
                results.append(result("b"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert file.read_bytes() == whole
        results.append(result("b"))
        assert [len(custom_id) for _, custom_id, _ in results.recover()] == [1_000_000, 1]

"""Lines of the log: what they say, and what they never do."""

import json
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from opentelemetry import trace

from jobs import logs
from tests.doc_blocks import Block, runs

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJlLW9mLWl0"


DOCUMENTED = runs("log")


class Said:
    """What was logged."""

    def __init__(self, captured: pytest.CaptureFixture[str]) -> None:
        self._captured = captured

    def lines(self) -> list[str]:
        return self._captured.readouterr().err.splitlines()

    def only(self) -> dict[str, Any]:
        (line,) = map(json.loads, self.lines())
        assert isinstance(line, dict)
        return line


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Said]:
    """What is logged; afterwards logging is as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    logs.begin()
    yield Said(capsys)
    logging.captureWarnings(capture=False)
    root.handlers = handlers
    root.setLevel(level)


def test_a_line_of_json_says_when_who_what_and_about_what(said: Said) -> None:
    logs.setup("json")
    logs.begin(job_id="a job", attempt=2)
    logs.bind(worker=7)
    logging.getLogger("some.package").warning("“%s”\nwent wrong", "it")
    line = said.only()
    at = datetime.fromisoformat(line.pop("timestamp"))
    assert at.utcoffset() is not None
    assert abs((at - datetime.now(at.tzinfo)).total_seconds()) < 10
    assert line == {
        "level": "warning",
        "logger": "some.package",
        "message": "“it”\nwent wrong",
        "job_id": "a job",
        "attempt": 2,
        "worker": 7,
    }
    logs.begin(request_id="the next one")
    logging.getLogger().info("hello")
    assert "job_id" not in said.only()


def test_a_line_of_json_has_its_traceback(said: Said) -> None:
    logs.setup("json", secrets=["the password"])
    logging.getLogger().error("Failed", exc_info=ValueError("the password is wrong"))
    assert said.only()["exception"] == "ValueError: … is wrong"


def test_a_line_of_text_is_for_people(said: Said) -> None:
    logs.setup("text")
    logs.begin(request_id="one")
    logging.getLogger("web").error("hello")
    (line,) = said.lines()
    assert line.endswith("Z ERROR web [request_id=one]: hello")


def test_other_packages_levels_and_handlers_give_way(said: Said) -> None:
    modal = logging.getLogger("modal-client")
    modal.addHandler(logging.StreamHandler())
    logs.setup("json")
    modal.warning("from the client")
    logging.getLogger("httpx").info("GET https://example.org/?token=abcdefghi")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    lines = [json.loads(line) for line in said.lines()]
    assert [line["message"] for line in lines] == ["from the client", "Uncaught"]
    assert "ZeroDivisionError" in lines[1]["exception"]


@pytest.mark.parametrize(
    ("logged", "left"),
    [
        ("postgresql://me:s3cr3tpw@db:5432/x", "postgresql://me:…@db:5432/x"),
        ("user=me password=s3cr3tpw host=db", "user=me password=… host=db"),
        (f"GET /audio/{JWT}?download=1", "GET /audio/eyJ…?download=1"),
        (f"Authorization: Bearer {JWT}", "Authorization: Bearer …"),
        ("pgs_0123abcd_" + "a" * 43 + "_0123abcd is unknown", "pgs_0123abcd_… is unknown"),
        ("signed with whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "signed with whsec_…"),
        ("https://s.co/a.mp3?token=abc.def-ghi&x=1", "https://s.co/a.mp3?token=…&x=1"),
        ("/a?X-Amz-Signature=0123456789abcdef", "/a?X-Amz-Signature=…"),
        ("/back?access_token=abcdef&x=1", "/back?access_token=…&x=1"),
        ("/in?next=%2Fa%3Ftoken%3Dabcdef", "/in?next=%2Fa%3Ftoken%3D…"),
        ("user=me password='s3cr3tpw' host=db", "user=me password='…' host=db"),
        ("{'user': 'me', 'password': 's3cr3tpw'}", "{'user': 'me', 'password': '…'}"),
        ("apikey=sb_secret_abcdefghijkl", "apikey=…"),
        ("it knows a very known secret of ours", "it knows a … of ours"),
        ("The token is not valid: token expired", "The token is not valid: token expired"),
    ],
)
def test_secrets_are_left_out(said: Said, logged: str, left: str) -> None:
    logs.setup("json", secrets=["very known secret", "own"])
    logging.getLogger().warning("%s", logged)
    assert said.only()["message"] == left


@pytest.mark.parametrize(
    "form",
    ['a+b/c "d" ü=', "a%2Bb%2Fc%20%22d%22%20%C3%BC%3D", "a%2Bb%2Fc+%22d%22+%C3%BC%3D",
     'a+b/c \\"d\\" ü=', 'a+b/c \\"d\\" \\u00fc='],
)  # fmt: skip
def test_a_known_secret_is_left_out_in_each_of_its_forms(said: Said, form: str) -> None:
    logs.setup("json", secrets=['a+b/c "d" ü='])
    logging.getLogger().warning("It is <%s>.", form)
    assert said.only()["message"] == "It is <…>."


FORGED = "a.mp3\n2026-11-26T10:00:00.000Z INFO jobs [-]: All is well\r\x1b[2J\x9b2J\u2028\udce9"


def test_what_users_send_makes_no_line_and_moves_no_cursor(said: Said) -> None:
    logs.setup("text")
    logging.getLogger().error("No file %s", FORGED, exc_info=ValueError(FORGED))
    first, *rest = said.lines()
    assert first.endswith("No file a.mp3")
    assert len(rest) == 3
    for line in rest:
        assert line.startswith("  ")
        assert line.isprintable()
    logs.setup("json")
    logging.getLogger().error("%s", FORGED)
    (line,) = said.lines()
    assert line.isprintable()
    assert json.loads(line)["message"] == FORGED


def test_what_can_not_be_logged_is_not_printed_instead(said: Said) -> None:
    logs.setup("json", secrets=["the password"])
    logging.getLogger("some.package").info("%d", "the password")
    assert said.only()["message"] == "A line could not be logged: TypeError"


def test_what_can_not_be_raised_is_logged_like_the_rest(said: Said) -> None:
    class Failing:
        def __del__(self) -> None:
            raise ValueError("the password")

    logs.setup("json", secrets=["the password"])
    Failing()
    assert "ValueError: …" in said.only()["exception"]


def test_a_long_line_takes_no_time_whatever_is_in_it(said: Said) -> None:
    logs.setup("json")
    begun = time.process_time()
    logging.getLogger().info("GET /%s", "eyJ-" * 16_000)  # as long as uvicorn takes it
    logging.getLogger().info("%s", "x" * 10_000_000)
    assert time.process_time() - begun < 1.0
    assert max(map(len, said.lines())) < 3 * logs.LONGEST


def test_a_secret_that_is_cut_does_not_stay_in_part(said: Said) -> None:
    secret = "a-secret-of-which-nobody-should-see-any-part"
    logs.setup("json", secrets=[secret])
    rest = "x" * (logs.LONGEST - 20)
    logging.getLogger().info("%s", f"{rest}{secret}{'x' * 99}{secret}{rest}")
    message = said.only()["message"]
    assert set(message) == {"x", "\n", "…"}
    assert len(message) > logs.LONGEST


@pytest.mark.parametrize("block", DOCUMENTED, ids=str)
def test_lines_are_as_the_documentation_has_them(said: Said, block: Block) -> None:
    logs.setup("json" if block.language == "json" else "text")
    logs.begin(job_id="0b9e…", attempt=1, worker=7)
    place = trace.SpanContext(0x4BF9 << 112, 0x00F0 << 48, is_remote=False)
    with trace.use_span(trace.NonRecordingSpan(place)):
        logging.getLogger("jobs.execution").info("Queue job %s failed: %s", 42, "no_speech")
    (line,) = said.lines()
    shortened = re.sub(r"\b([0-9a-f]{4})0{12,28}\b", r"\1…", line)
    at = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
    assert at.sub("at", shortened) == at.sub("at", block.code.strip())

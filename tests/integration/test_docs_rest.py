"""The requests of the documentation: real curl, a real server, and the answers that it shows."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import pytest

from jobs.models import Segment, Transcript
from jobs.settings import Settings
from tests.command_lines import without_comments
from tests.doc_blocks import Block, runs
from tests.live import serve
from tests.streams import Work
from web.app import create_app
from web.auth import issue_token

CURL = runs("curl")
STREAMS = runs("stream")
PROBLEMS = runs("problem")
PAGES = runs("page")
DOCUMENTS = sorted({block.document for block in CURL})
FUNCTIONS = [block for block in CURL if block.code.startswith("api() {")]

SEGMENTS = tuple(Segment(n, n + 1, f"Sentence {n}.", -0.1, 0.0, 1.0) for n in range(6))
RESULT = json.dumps(Transcript("The budget.", "en", 6.0, SEGMENTS, "none", "base").to_dict())
# Each answer's status goes to standard error, and what is refused is an error.
CURLRC = (
    'write-out = "%{stderr}%{http_code}\\n"\nfail-with-body\nsilent\nshow-error\nmax-time = 20\n'
)
SIZE = 91_724  # bytes, as the documents have it


@dataclass
class Step:
    """A command, and what the document says beside and below it."""

    command: str
    comments: list[str]


def steps(code: str) -> list[Step]:
    found: list[Step] = []
    pending = ""
    for line in code.splitlines(keepends=True):
        if not pending and line.startswith("#"):
            found[-1].comments.append(line.removeprefix("#").strip())
            continue
        pending += line
        command = without_comments(pending).strip()
        if command and complete(command):
            beside = re.search(r"\s# (.*)$", line)
            found.append(Step(command, [beside[1]] if beside else []))
            pending = ""
    assert not pending.strip(), pending
    return found


def complete(command: str) -> bool:
    try:
        shlex.split(command)
    except ValueError:
        return False
    return not command.endswith("\\")


class Reader:
    """Somebody who types what a document says, with their own ids in the place of its examples'."""

    def __init__(self, work: Work, settings: Settings, user: UUID, url: str, folder: Path) -> None:
        self.work, self.user, self.folder = work, user, folder
        self.file_path = f"{user}/talk.mp3"
        self.job = self.upload_url = ""
        self.stream = ""
        self.environment = {
            "PATH": os.environ["PATH"], "CURL_HOME": str(folder), "URL": url,
            "TOKEN": issue_token(settings, user, lifetime=600), "USER_ID": str(user),
        }  # fmt: skip
        (folder / ".curlrc").write_text(CURLRC)
        (folder / "talk.mp3").write_bytes(bytes(SIZE))
        stored = Path(settings.storage_dir, self.file_path)
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.write_bytes(bytes(SIZE))

    def follow(self, block: Block) -> None:
        """Do what a block says. Its comments say what is answered."""
        if status := block.options.get("job"):
            self.job = str(self.make_job(status))
        for step in steps(block.code):
            status, answer = self.run(step.command, block)
            for comment in step.comments:
                documented = re.match(r"(\d{3} )?(?=[{\[])", comment)
                if documented is None:
                    continue
                if documented[1]:
                    assert status == documented[1].strip(), block.name
                same(example(comment[documented.end() :]), json.loads(answer), block.name)
            self.notice(answer)

    def run(self, command: str, block: Block) -> tuple[str, str]:
        for short, mine in {
            "6f1c…/talk.mp3": self.file_path, "0b9e…": self.job, "<url>": self.upload_url,
        }.items():  # fmt: skip
            if short in command:
                assert mine, f"{block.name}: nothing before it says {short}"
                command = command.replace(short, mine)
        for short, make in {"1c2d…": self.make_job, "2d3e…": self.make_delivery}.items():
            if short in command:
                command = command.replace(short, str(make()))
        assert "…" not in command, f"{block.name}: {command}"
        script = "\n".join([*(function.code for function in FUNCTIONS), command])
        with subprocess.Popen(
            ["bash", "-ec", script],
            cwd=self.folder, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stderr is not None
            heard = ""
            if block.options.get("job") == "processing":
                for line in process.stdout:
                    heard += line
                    if line.startswith("data: ") and "event: partial" in heard:
                        self.complete(UUID(self.job))
                        break
            output, status = process.stdout.read(), process.stderr.read()
        assert process.returncode == 0, f"{block.name}: {command}\n{status}\n{heard}{output}"
        if "/events" in command:
            self.stream = heard + output
        return status.strip(), heard + output

    def notice(self, answer: str) -> None:
        """Remember what the next commands need, and be the worker."""
        try:
            told = json.loads(answer)
        except ValueError:
            return
        if "filePath" in told:
            self.file_path = told["filePath"]
        if told.get("url", "").startswith("/"):
            self.upload_url = self.environment["URL"] + told["url"]
        elif "url" in told:
            self.upload_url = told["url"]
        if "jobId" in told:
            self.job = told["jobId"]
            self.work.start(UUID(self.job))
            self.complete(UUID(self.job))

    def make_job(self, status: str = "queued") -> UUID:
        job = self.work.insert(self.user)
        if status in {"processing", "completed"}:
            self.work.start(job)
        if status == "processing":
            self.work.plan(job, 2)
            self.work.store(job, 0, "Hello there.")
        if status == "completed":
            self.complete(job)
        return job

    def make_delivery(self) -> UUID:
        """Make a webhook that was given up."""
        self.work.execute(
            "insert into webhook_endpoints (user_id, url) values (%s, 'https://example.org/hook')",
            (self.user,),
        )
        self.work.execute("select cancel_processing_job(%s)", (self.make_job(),))
        self.work.execute(
            "update procrastinate.procrastinate_jobs set status = 'failed'"
            " where queue_name = 'webhooks'"
        )
        ((delivery,),) = self.work.execute("select id from webhook_deliveries")
        made: UUID = delivery
        return made

    def complete(self, job: UUID) -> None:
        with self.work.at_once():
            self.work.execute(
                "insert into processing_job_waveforms (job_id, peaks) values (%s, '{0,17,255}')",
                (job,),
            )
            self.work.execute(
                "update processing_jobs set result = %s, audio_seconds = 6 where id = %s",
                (RESULT, job),
            )
            self.work.set_queue_status("succeeded", job)


def example(text: str) -> Any:
    """Read the JSON at the beginning of a text. "…" stands for anything, as do examples of ids."""
    text = re.sub(r"\{…\}", '"…"', re.sub(r", …\]", "]", text))
    text = re.sub(r"\b[0-9a-f]{4}…", "…", text)
    return json.JSONDecoder().raw_decode(text)[0]


def same(documented: Any, real: Any, where: str) -> None:
    """Compare names and kinds of all values, and of texts what the document has."""
    if documented == "…" or documented is None:
        return
    if isinstance(documented, dict):
        assert documented.keys() == real.keys(), where
        for name, value in documented.items():
            same(value, real[name], f"{where} {name}")
    elif isinstance(documented, list):
        assert isinstance(real, list), where
        assert real, where
        same(documented[0], real[0], where)
    elif isinstance(documented, str) and not re.match(r"\d{4}-", documented):
        pattern = ".*".join(map(re.escape, documented.split("…")))
        assert re.fullmatch(pattern, real), f"{where}: {documented} / {real}"
    else:
        kinds = (int, float) if type(documented) in {int, float} else type(documented)
        assert isinstance(real, kinds), f"{where}: {documented} / {real}"


def events(stream: str) -> dict[str, dict[str, Any]]:
    """Return the last event of each kind."""
    found = {}
    for event in re.split(r"(?:\r?\n){2}", stream.strip()):
        fields = dict(line.split(": ", 1) for line in event.splitlines() if ": " in line)
        if "event" in fields:
            found[fields["event"]] = json.loads(fields["data"])
    return found


@pytest.fixture
def work(database: str) -> Iterator[Work]:
    with Work(database) as work:
        yield work


@pytest.fixture
def server(settings: Settings) -> Iterator[str]:
    with serve(create_app(settings)) as url:
        yield url


@pytest.mark.parametrize("document", DOCUMENTS)
def test_requests_in_the_documentation(
    document: str, work: Work, settings: Settings, user: UUID, server: str, tmp_path: Path
) -> None:
    work.execute("insert into pgscribe.operators (user_id) values (%s)", (user,))
    reader = Reader(work, settings, user, server, tmp_path)
    blocks = [block for block in CURL + STREAMS if block.document == document]
    for block in sorted(blocks, key=lambda block: block.line):
        if block in STREAMS:
            documented, real = events(block.code), events(reader.stream)
            assert real.keys() >= documented.keys(), block.name
            for name, data in documented.items():
                assert data.keys() <= real[name].keys(), f"{block.name}: {name}"
        else:
            reader.follow(block)


def test_the_problem_in_the_documentation(settings: Settings, user: UUID, server: str) -> None:
    (block,) = PROBLEMS
    documented = json.loads(block.code)
    field = documented["field"].removeprefix("options.")
    answer = httpx2.post(
        f"{server}/process",
        json={"filePath": f"{user}/talk.mp3", "options": {field: "base"}},
        headers={"Authorization": f"Bearer {issue_token(settings, user, lifetime=60)}"},
    )
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.status_code == documented["status"]
    same(documented, answer.json(), block.name)


def test_a_wrong_answer_in_a_document_is_found() -> None:
    real = {"jobId": "x", "status": "queued", "peaks": [1]}
    same(example('{"jobId": "0b9e…", "status": "queued", "peaks": [0, 17, …]}, and more'), real, "")
    for text in (
        '{"jobId": "…", "status": "queued"}',
        '{"jobId": "…", "status": "queud", "peaks": [1]}',
        '{"jobId": "…", "status": "queued", "peaks": "1"}',
        '{"jobId": "…", "status": "queued", "peaks": ["1"]}',
    ):
        with pytest.raises((AssertionError, TypeError)):
            same(example(text), real, "")


def test_links_for_templates_lead_to_a_page(server: str) -> None:
    for block in PAGES:
        (path,) = re.findall(r'href="\{\{ \.SiteURL \}\}([^"]+)"', block.code)
        path = path.replace("{{ .TokenHash }}", "5f2a")
        shown = httpx2.get(server + path)
        assert shown.status_code == 200, path
        assert "5f2a" in shown.text

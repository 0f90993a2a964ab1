"""The Python of docs/python.md, on a real server whose jobs are completed as they come in."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from jobs.client import RequestFailed
from jobs.settings import Settings
from tests.doc_blocks import Block, blocks
from tests.live import serve
from tests.standin import TRANSCRIPT, Standin, event
from web.app import create_app
from web.auth import issue_token

BLOCKS = list(blocks("python.md", "python"))
# In the place of a worker; its name makes it the last of the triggers.
WORKER = """
create function complete_jobs() returns trigger language plpgsql
  security definer set search_path = public, pg_temp as $$
begin
  update procrastinate.procrastinate_jobs set status = 'doing' where status = 'todo';
  update processing_jobs set result = '{result}' where status = 'processing';
  update procrastinate.procrastinate_jobs set status = 'succeeded' where status = 'doing';
  return null;
end $$;
create trigger zz_complete_jobs after insert on processing_jobs
  for each statement execute function complete_jobs();
"""


@pytest.fixture
def app(settings: Settings, conn: psycopg.Connection) -> Iterator[str]:
    conn.execute(WORKER.replace("{result}", json.dumps(TRANSCRIPT)).encode())
    with serve(create_app(settings)) as url:
        yield url


@pytest.fixture
def standin() -> Iterator[tuple[str, UUID]]:
    standin = Standin()
    job_id = standin.add(status="completed", progress=1, result=TRANSCRIPT)
    standin.files[standin.jobs[job_id]["file_path"]] = b"audio"
    standin.streams = [
        [
            event("partial", "1", text="Hello"),
            event("job", "2", id=str(job_id), status="completed", progress=1),
            event("end", "3"),
        ]
    ]
    with serve(standin.app()) as url:
        yield url, job_id


def test_python_in_the_documentation(
    app: str,
    standin: tuple[str, UUID],
    settings: Settings,
    user: UUID,
    sample: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(sample, "talk.mp3")
    names: dict[str, Any] = {
        "token": issue_token(settings, user, lifetime=600),
        "file_path": f"{user}/talk.mp3",
    }
    printed = {}
    for block in BLOCKS:
        code = compile(block.code, block.name, "exec")
        (where,) = block.how
        if where == "compile":
            continue
        names["url"] = app if where == "app" else standin[0]
        if where == "standin":
            names["job_id"] = standin[1]
        exec(code, names)
        printed[block.name] = capsys.readouterr().out
    texts = list(printed.values())
    assert texts[0] == "completed Hello there.\n"
    assert names["texts"] == ["Hello there."] * 2
    assert texts[2] == "Hello\ncompleted 100%\n"
    assert len(texts[3].splitlines()) == 3
    assert Path("copy.mp3").read_bytes() == b"audio"
    assert len(names["ids"]) == 2
    assert isinstance(names["failed"], RequestFailed)
    assert texts[-1].startswith("422 invalid_input options.modle options.modle: unknown option")


def test_most_of_it_runs() -> None:
    hows: list[Block] = [block for block in BLOCKS if block.how != ("compile",)]
    assert len(hows) >= 7

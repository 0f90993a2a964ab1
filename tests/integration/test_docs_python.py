"""The Python of the documentation, on a real server whose jobs are completed as they come in."""

import ast
import json
import re
import shutil
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import CodeType
from typing import Any
from uuid import UUID

import psycopg
import pytest
from openai import OpenAI

from jobs.client import RequestFailed
from jobs.settings import Settings
from modal_functions import status
from modal_functions.config import Config
from tests.doc_blocks import Block, checks, runs
from tests.live import serve
from tests.standin import TRANSCRIPT, Standin, event
from web.app import create_app
from web.auth import issue_token

APP = runs("app")
STANDIN = runs("standin")
COMPILED = checks("compile")
CALLS = checks("function")
DOCUMENTS = sorted({block.document for block in APP + STANDIN})
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


@pytest.fixture
def names(
    settings: Settings, user: UUID, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Any]]:
    """What the documents take for granted, in a folder with a recording."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(sample, "talk.mp3")
    token = issue_token(settings, user, lifetime=600)
    with Path("talk.mp3").open("rb") as file:
        yield {
            "OpenAI": OpenAI, "file": file, "file_path": f"{user}/talk.mp3",
            "token": token, "token_or_api_key": token,
        }  # fmt: skip


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # snippets are short
@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_in_the_documentation(
    document: str,
    app: str,
    standin: tuple[str, UUID],
    names: dict[str, Any],
    conn: psycopg.Connection,
    capsys: pytest.CaptureFixture[str],
) -> None:
    blocks = [block for block in APP + STANDIN if block.document == document]
    printed = []
    for block in sorted(blocks, key=lambda block: block.line):
        if block.kind == "app":
            names["url"] = app
        else:
            names["url"], names["job_id"] = standin
        exec(compiled(block, app), names)
        printed.append(capsys.readouterr().out)
    statuses = [row[0] for row in conn.execute("select status from processing_jobs")]
    submitted = sum(".create(model=" in block.code.replace("\n    ", "") for block in blocks)
    assert len(statuses) >= submitted
    assert set(statuses) <= {"completed"}
    if document == "docs/python.md":
        check_the_clients_guide(printed, names)


def compiled(block: Block, url: str) -> CodeType:
    return compile(block.code.replace("https://pgscribe.example.org", url), block.name, "exec")


def check_the_clients_guide(printed: list[str], names: dict[str, Any]) -> None:
    assert printed[0] == "completed Hello there.\n"
    assert names["texts"] == ["Hello there."] * 2
    assert printed[2] == "Hello\ncompleted 100%\n"
    assert len(printed[3].splitlines()) == 3
    assert Path("copy.mp3").read_bytes() == b"audio"
    assert len(names["ids"]) == 2
    assert isinstance(names["failed"], RequestFailed)
    assert printed[-1].startswith("422 invalid_input options.modle options.modle: unknown option")
    assert len(printed) >= 7


def test_what_is_only_compiled_imports_what_there_is() -> None:
    for block in COMPILED:
        compiled(block, "")
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom):
                assert node.module, block.name
                module = import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), block.name
            elif isinstance(node, ast.Import):
                assert all(find_spec(name.name) for name in node.names), block.name


def test_calls_on_modal_fit_the_functions() -> None:
    """The app has the name, and the function takes the arguments; tests/modal runs them."""
    for block in CALLS:
        asked = "".join(block.code.splitlines(keepends=True)[1:])
        app, function = re.findall(r'from_name\("([\w-]+)", "(\w+)"\)', block.code)[0]
        assert app == Config().app_name
        (call,) = (node for node in ast.walk(ast.parse(asked)) if isinstance(node, ast.Call))
        assert isinstance(call.func, ast.Attribute)
        assert (call.func.attr, call.keywords) == ("remote", [])
        signature(getattr(status, function)).bind(*call.args)

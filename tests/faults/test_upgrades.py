"""An upgrade while all runs: workers of the version before, and migrations that must wait."""

import functools
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from uuid import UUID

import ffmpeg
import imageio_ffmpeg
import psycopg
import pytest

from db import migrate
from db.embedded import EmbeddedPostgres
from tests.conftest import REPO
from tests.faults.fleet import Database, Fleet, Jobs, until
from tests.receiver import receiving

BEFORE = "ea8a2a6"  # the commit whose workers go on while this version's migrations are applied
ALIVE = "select count(*) from procrastinate.procrastinate_workers"
DELIVERED = "select count(*) from webhook_deliveries where status = 'delivered'"
LONGEST_WAIT = 8.0  # seconds; a job's way has a few statements, of which each may wait one
NEXT = migrate.Migration(
    "29990101000000", "next", "alter table public.processing_jobs add column new_column integer;"
)


@pytest.fixture
def one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next version bring a migration that needs a lock on a table of every job's."""
    known = migrate.migrations()
    monkeypatch.setattr(migrate, "migrations", lambda: [*known, NEXT])
    monkeypatch.setattr(migrate, "PAUSES", (0.5,) * 100)


@contextmanager
def reading(db: Database) -> Iterator[int]:
    """Hold a transaction that has read the jobs, as a dump does; yield its process's id."""
    with psycopg.connect(db.url, application_name="a dump") as conn:
        conn.execute("select count(*) from processing_jobs")
        yield conn.info.backend_pid


@pytest.mark.usefixtures("one_more")
def test_a_migration_that_has_to_wait_stops_nobody(
    fleet: Fleet, jobs: Jobs, db: Database, user: UUID, settled: Callable[[], None]
) -> None:
    fleet.start_ready(concurrency=4)
    said: list[str] = []
    migrating = threading.Thread(
        target=migrate.migrate, args=(db.url, lambda one: said.append(one.filename), said.append)
    )
    with reading(db) as dump:
        migrating.start()
        until(lambda: said, "the migration has been held up")
        waits: list[float] = []
        while len(said) < 3 or len(waits) < 2:  # from one attempt of its to the next
            begun = time.monotonic()
            job = jobs.insert_one(user, "sleep")
            until(functools.partial(jobs.count, f"id = '{job}' and completed_at is not null"), "")
            waits.append(time.monotonic() - begun)
    migrating.join()
    assert said[0].startswith(f"{NEXT.filename} waits for a dump (pid {dump}, in a transaction ")
    assert "processing_jobs" in said[0]
    assert said[-1] == NEXT.filename
    assert max(waits) < LONGEST_WAIT
    settled()


@pytest.mark.usefixtures("one_more")
def test_a_migration_that_waits_for_too_long_says_for_whom(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "PAUSES", ())
    with reading(db) as dump, pytest.raises(migrate.MigrationBlocked) as blocked:
        migrate.migrate(db.url)
    assert "pg_terminate_backend(<pid>)" in str(blocked.value)
    assert f"pid {dump}," in str(blocked.value)
    with psycopg.connect(db.url) as conn:
        conn.execute("select pg_advisory_lock(hashtextextended('pgscribe migrate', 0))")
        conn.commit()
        monkeypatch.setattr(migrate, "PATIENCE", 0.05)
        with pytest.raises(migrate.MigrationBlocked, match="Another `pgscribe migrate`"):
            migrate.migrate(db.url)
    assert migrate.migrate(db.url) == 1


@pytest.mark.usefixtures("one_more")
def test_a_migration_waits_for_the_ledger_too_and_its_work_may_take_long(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "PAUSES", (0.0,))
    said: list[str] = []
    with psycopg.connect(db.url) as conn:
        conn.execute("lock table supabase_migrations.schema_migrations in share mode")
        with pytest.raises(migrate.MigrationBlocked):
            migrate.migrate(db.url, on_blocked=said.append)
    assert len(said) == 1
    slow = replace(NEXT, sql="select pg_sleep(1.2);")
    known = [one for one in migrate.migrations() if one != NEXT]
    monkeypatch.setattr(migrate, "migrations", lambda: [*known, slow])
    limited = psycopg.conninfo.make_conninfo(db.url, options="-c statement_timeout=1s")
    assert migrate.migrate(limited) == 1


@pytest.fixture(scope="module")
def version_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the version before, as git has them."""
    archive = ["git", "-C", str(REPO), "archive", BEFORE, "jobs", "db", "web", "modal_functions"]
    try:
        done = subprocess.run(archive, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no git")
    if done.returncode != 0:
        pytest.skip(f"this checkout's history has no {BEFORE} (it may be shallow)")
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture
def old_database(
    version_before: Path, postgres: EmbeddedPostgres, database_names: Iterator[str]
) -> Iterator[Database]:
    """A database as that version's `pgscribe migrate` has made it."""
    name = next(database_names)
    postgres.create_database(name)
    postgres.bootstrap(name)
    url = postgres.url(database=name)
    environment = os.environ | {"PYTHONPATH": str(version_before), "PGSCRIBE_DATABASE_URL": url}
    subprocess.run(
        [sys.executable, "-m", "jobs.cli", "migrate"],
        env=environment, cwd=version_before, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    with Database(url) as db:
        yield db
    postgres.drop_database(name)


@contextmanager
def worker_of(source: Path, database: str, folder: Path, models: Path) -> Iterator[None]:
    """Run that version's `pgscribe worker`, as an operator would."""
    folder.mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(source),
        "PGSCRIBE_DATABASE_URL": database,
        "PGSCRIBE_STORAGE_DIR": str(folder.parent / "storage"),
        "PGSCRIBE_SCRATCH_DIR": str(folder / "scratch"),
        "PGSCRIBE_MODELS_DIR": str(models),
        "PGSCRIBE_WEBHOOK_NETWORKS": "127.0.0.0/8",
    }
    ours = subprocess.run(
        [sys.executable, "-c", "import jobs; print(jobs.__file__)"],
        env=environment, cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ours.stdout.startswith(str(source)), "it is that version's code"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "worker", "--stop-with-stdin"],
            env=environment, cwd=folder, stdin=subprocess.PIPE, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield
    finally:
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture
def clip(sample: Path, tmp_path: Path) -> Path:
    """The first 4 s of the sample, in storage."""
    path = tmp_path / "storage" / "shared" / "clip.wav"
    path.parent.mkdir(parents=True)
    recording = ffmpeg.input(str(sample), t=4).output(str(path), ac=1, ar=16000)
    recording.run(cmd=imageio_ffmpeg.get_ffmpeg_exe(), quiet=True)
    return path


def test_workers_of_the_version_before_go_on_during_and_after_the_migrations(
    version_before: Path, old_database: Database, clip: Path, tmp_path: Path, models_dir: Path
) -> None:
    """First the database is migrated, while they work; then workers are replaced, one by one."""
    db, jobs = old_database, Jobs(old_database)
    user = jobs.make_user()
    clip.parent.rename(clip.parent.with_name(str(user)))
    options = json.dumps({"model": "tiny.en"})
    with receiving() as receiver, worker_of(version_before, db.url, tmp_path / "old", models_dir):
        db.rows("insert into webhook_endpoints (user_id, url) values (%s, %s)", user, receiver.url)
        before = jobs.end(jobs.insert_one(user, "not-there.wav"))
        until(lambda: db.value(DELIVERED) == 1, "the old worker tells of it")
        migrate.migrate(db.url)
        after = jobs.end(jobs.insert_one(user, clip.name, options=options))
        until(lambda: db.value(DELIVERED) == 2, "the old worker tells of it, too")
        with worker_of(REPO, db.url, tmp_path / "new", models_dir):
            until(lambda: db.value(ALIVE) == 2, "both work")
            both = [jobs.end(job) for job in jobs.insert(user, "not-there.wav", 4)]
            until(lambda: db.value(DELIVERED) == 6, "they tell of all")
    assert (after["status"], after["attempt"]) == ("completed", 1)
    assert after["result"]["text"]
    ends = {(row["attempt"], row["error_code"]) for row in (before, *both)}
    assert ends == {(1, "file_not_found")}
    told = [json.loads(request.body)["data"]["id"] for request in receiver.requests]
    assert sorted(told) == sorted(str(row["id"]) for row in (before, after, *both))
